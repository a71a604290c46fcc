"""MT-ViT: every image gets as many tokens as it needs, before the first block (arXiv 2203.01587).

The paper's abstract fixes the idea: several tails, one encoder, a predictor that picks one tail per image. Its details
are not public; the grids, the tails' convolutions (those of DVT), the predictor and the cost rule here are our design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_count, check_real, check_sequence
from ..nn.method import Method
from ..nn.patch_embed import Tail
from ..nn.vision_transformer import VisionTransformer, ViTConfig
from ..ops import ragged_patch_embed
from ..ragged import RaggedTokens
from ._tail_init import resize_kernel, resize_pos_embed
from ._tail_predictor import TailPredictor


@dataclass(frozen=True)
class MTViTConfig:
    """
    Attributes:
        grids: patches along one side of each tail, rising; the last is the backbone's own.
        predictor_size: side of the image the predictor looks at, pixels, in [16, 4096].
        predictor_width: times as many channels as the smallest predictor's, >= 1; its operations grow with the square.
        force_tail: take this tail for every image, without asking the predictor; None: ask.
        cost_weight: weight of a tail's relative cost against its score; larger is cheaper, negative dearer.
        class_head: let the predictor tell classes, too, and score by how sure of one it is; see ``TailPredictor``.
    """

    grids: tuple[int, ...] = (7, 10, 14)
    predictor_size: int = 96
    force_tail: int | None = None
    cost_weight: float = 0.0
    predictor_width: int = 1
    class_head: bool = False

    def __post_init__(self) -> None:
        check_sequence("grids", self.grids)
        object.__setattr__(self, "grids", tuple(self.grids))  # the one way into a frozen dataclass
        for grid in self.grids:
            check_count("grids", grid, 1)
        if not self.grids or any(later <= earlier for earlier, later in zip(self.grids, self.grids[1:])):
            raise ValueError(f"grids must rise and hold at least one tail, got {self.grids}")
        check_count("predictor_size", self.predictor_size, 16, 4096)
        check_count("predictor_width", self.predictor_width, 1)
        check_choice("class_head", self.class_head, (True, False))
        if self.force_tail is not None:
            check_count("force_tail", self.force_tail, 0, len(self.grids) - 1)
        check_real("cost_weight", self.cost_weight, -1e9, 1e9)


class MTViTState(NamedTuple):
    """Between two blocks."""

    tail: Tensor  # (B,) int32
    logits: Tensor | None  # (B, K) of the predictor, None where a tail was forced


class MTViT(Method):
    """All tails of a batch share one packed pass through the encoder; their convolutions are read, not called.

    Trace extras: ``tail`` (B,), int64; ``predictor_logits`` (B, K), unless a tail was forced.
    """

    config_class = MTViTConfig
    cost_field = "cost_weight"
    config: MTViTConfig

    @property
    def counts_are_dynamic(self) -> bool:
        return self.config.force_tail is None

    def attach(self, model: VisionTransformer) -> None:
        sizes, grids = model.config, self.config.grids
        if grids[-1] != sizes.grid_size:
            raise ValueError(f"grids must end with the backbone's own grid {sizes.grid_size}, got {grids[-1]}")
        self.geometry = tuple(tail_geometry(sizes.img_size, grid) for grid in grids)
        self.lengths = tuple(1 + grid**2 for grid in grids)  # tokens of an image
        if not hasattr(self, "predictor"):
            self.predictor = TailPredictor(
                sizes.in_chans,
                len(grids),
                self.config.predictor_size,
                self.config.predictor_width,
                sizes.num_classes if self.config.class_head else 0,
            )
            # the dearest tail is the backbone's own patch embedding
            self.projections = nn.ModuleList(
                nn.Conv2d(sizes.in_chans, sizes.embed_dim, kernel, kernel, padding)
                for kernel, padding in self.geometry[:-1]
            )
            self.pos_embeds = nn.ParameterList(
                nn.Parameter(torch.zeros(1, 1 + grid**2, sizes.embed_dim)) for grid in grids[:-1]
            )
            self.initialise_tails(model)
        predictor = 0 if self.config.force_tail is not None else self.predictor.macs()
        costs = [tail_macs(sizes, grid, kernel) for grid, (kernel, _) in zip(grids, self.geometry)]
        self.relative_costs = tuple((cost + predictor) / costs[-1] for cost in costs)

    @torch.no_grad()
    def initialise_tails(self, model: VisionTransformer, names: Sequence[str] | None = None) -> None:
        """Derive the cheaper tails, or those of their parameters that are named, from the dearest one."""
        source = model.patch_embed.proj
        tails = zip(self.config.grids, self.geometry, self.projections, self.pos_embeds)
        for index, (grid, (kernel, _), conv, table) in enumerate(tails):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            assert source.bias is not None
            if names is None or f"projections.{index}.weight" in names:
                conv.weight.copy_(resize_kernel(source.weight, kernel))
            if names is None or f"projections.{index}.bias" in names:
                conv.bias.copy_(source.bias)
            if names is None or f"pos_embeds.{index}" in names:
                table.copy_(resize_pos_embed(model.pos_embed, grid))

    def embed(self, model: VisionTransformer, images: Tensor) -> tuple[RaggedTokens, MTViTState]:
        config = self.config
        if config.force_tail is None:
            found = self.predictor.choose(images, self.relative_costs, float(config.cost_weight))
            if found is None:
                logits = self.predictor(images)
                tail = choose_tail(logits, self.relative_costs, config.cost_weight)
            else:
                logits, tail = found
        else:
            logits = None
            tail = torch.full((len(images),), config.force_tail, dtype=torch.int32, device=images.device)
        x, offsets = self.tokenise(model, images, tail)
        lengths = self.lengths
        if config.force_tail is None:
            tokens = RaggedTokens(x, None, offsets, lengths[-1]).trimmed()
        else:
            length = lengths[config.force_tail]
            tokens = RaggedTokens(x[: len(images) * length], None, offsets, length)
        return tokens, MTViTState(tail, logits)

    def tokenise(self, model: VisionTransformer, images: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Each image through its tail (B,) int32: what ``ragged_patch_embed`` gives."""
        own: dict[str, Any] = self._modules  # a module's attribute look-up would cost more than the check
        parts = own["projections"], own["pos_embeds"], model.patch_embed
        native = model.embed_natively(images, tail, parts, lambda: self._tails(model))
        if native is not None:
            return native
        tails = self._tails(model)
        return ragged_patch_embed(
            images,
            tail,
            model.cls_token[0],
            [each.conv.weight for each in tails],
            [cast("Tensor", each.conv.bias) for each in tails],
            [each.table[0] for each in tails],
            [each.stride for each in tails],
            [each.padding for each in tails],
        )

    def _tails(self, model: VisionTransformer) -> list[Tail]:
        convs = [*self.projections, model.patch_embed.proj]
        # by number: PyTorch 2.11 cannot compile a walk over the list
        tables = [*(self.pos_embeds[index] for index in range(len(self.pos_embeds))), model.pos_embed]
        return [Tail(conv, table, *geometry) for conv, table, geometry in zip(convs, tables, self.geometry)]

    def extras(self, first_rows: Tensor, states: list[MTViTState]) -> dict[str, Tensor]:
        state = states[-1]
        extras = {"tail": state.tail.long()}
        if state.logits is not None:
            extras["predictor_logits"] = state.logits
        return extras


def choose_tail(logits: Tensor, relative_costs: tuple[float, ...], cost_weight: float) -> Tensor:
    """The best of score minus weighted cost for each image, (B, K) to (B,) int32; equals go to the cheaper tail."""
    # filled on the device: a copy from the host would wait for it
    costs = torch.cat([logits.new_full((1,), cost, dtype=torch.float32) for cost in relative_costs])
    # argmax takes the first of equals on no device by promise: the maximum of falling ranks does
    value = logits.float() - cost_weight * costs
    best = value == value.amax(dim=1, keepdim=True)
    ranks = torch.arange(logits.shape[1], 0, -1, device=logits.device)
    return (best * ranks).argmax(dim=1).to(torch.int32)


def tail_geometry(img_size: int, grid: int) -> tuple[int, int]:
    """Kernel (and stride) and padding in pixels that cut an image into exactly grid x grid patches."""
    kernel = math.ceil(img_size / grid)
    padding = math.ceil((kernel * grid - img_size) / 2)
    if (img_size + 2 * padding - kernel) // kernel + 1 != grid:
        raise ValueError(f"grids must divide an image of {img_size} pixels into patches, got {grid}")
    return kernel, padding


def tail_macs(sizes: ViTConfig, grid: int, kernel: int) -> float:
    """Multiply-accumulates of one image through a tail and the encoder."""
    tokens, dim = 1 + grid**2, sizes.embed_dim
    block = (4 + 2 * sizes.mlp_ratio) * tokens * dim**2 + 2 * tokens**2 * dim
    return sizes.depth * block + grid**2 * sizes.in_chans * kernel**2 * dim + sizes.num_classes * dim
