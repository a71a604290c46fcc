"""A thin ViT that owns the loop over blocks and lets a method act at named points."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from .._checks import check_real, check_tensor
from .._register import native_serves
from ..ragged import RaggedTokens
from .block import Block
from .block_run import BlockRun
from .classifier import classify_natively
from .linear import PackedLinear, linear
from .method import Method
from .patch_embed import NativeEmbedding, PatchEmbed, Tail
from .plain import is_plain
from .prepared import Prepared
from .trace import Trace, TraceRecorder


@dataclass(frozen=True)
class ViTConfig:
    """The backbone's sizes.

    Attributes:
        img_size: side of the square input, pixels, a multiple of ``patch_size``.
        patch_size: side of a patch, pixels.
        embed_dim: width, a multiple of ``num_heads``.
        depth: blocks.
        num_heads: attention heads.
        num_classes: outputs of the classifier.
        in_chans: image channels.
        mlp_ratio: hidden width of the MLP over ``embed_dim``, in (0, 1000].
        norm_eps: of every LayerNorm, in (0, 1].
    """

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int = 1000
    in_chans: int = 3
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "in_chans"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_real("mlp_ratio", self.mlp_ratio, 0.0, 1e3, open_low=True)
        check_real("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads {self.num_heads}, got {self.embed_dim}")

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.img_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2


class VisionTransformer(nn.Module):
    """A ViT with timm's parameter names, run by a method.

    Args:
        config: the backbone's sizes.
        method: what drops tokens, and when; its parameters appear as ``method.*``.
    """

    def __init__(self, config: ViTConfig, method: Method) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, dim))
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, config.norm_eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._prepared = Prepared()
        self.native_embedding = NativeEmbedding()
        _check_unattached(method, config)
        method.attach(self)
        method.model_config = config
        self.method = method

    @overload
    def forward(self, images: Tensor, *, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, images: Tensor, *, return_trace: Literal[True]) -> tuple[Tensor, Trace]: ...

    def forward(self, images: Tensor, *, return_trace: bool = False) -> Tensor | tuple[Tensor, Trace]:
        """Classify.

        Args:
            images: (B, in_chans, img_size, img_size), dtype and device of the weights; B may be 0.
            return_trace: also say which tokens lived how long (costs a little time).

        Returns:
            Logits (B, num_classes), or logits and a ``Trace``.

        Raises:
            TypeError, ValueError: images of another rank, size, dtype or device.
        """
        self.check_images(images)
        recorder = TraceRecorder() if return_trace else None
        if self._is_its_own():
            offsets, tokens, state = self._encode(images, recorder)
            logits = self._classify_tokens(tokens.x, offsets) if self.method.reads_class_tokens else None
            if logits is not None and recorder is None:
                return logits
            first_rows = _first_rows(offsets)
        else:
            first_rows, tokens, state = self.encode(images, recorder)
            logits = None
        if logits is None:
            logits = self.classify(self.method.readout(first_rows, tokens, state).to(images.dtype))
        return logits if recorder is None else (logits, recorder.trace(first_rows, self.method))

    def _is_its_own(self) -> bool:
        """Nobody has put another encoder, readout or classifier here, and wants it called."""
        kind, state = type(self), vars(self)
        same = kind.encode is VisionTransformer.encode and kind.classify is VisionTransformer.classify
        return same and not ("encode" in state or "classify" in state or "readout" in vars(self.method))

    def encode(self, images: Tensor, recorder: TraceRecorder | None = None) -> tuple[Tensor, RaggedTokens, Any]:
        """Embedding and all blocks, as the method has it.

        Args:
            images: as ``forward`` takes them, unchecked.
            recorder: is told what each block sees.

        Returns:
            The class tokens' rows (B,), int64; the tokens after the last block; the method's last state.
        """
        offsets, tokens, state = self._encode(images, recorder)
        return _first_rows(offsets), tokens, state

    def _encode(self, images: Tensor, recorder: TraceRecorder | None) -> tuple[Tensor, RaggedTokens, Any]:
        """``encode``, with the offsets of all tokens, (B + 1,), in place of the class tokens' rows."""
        method, inplace = self.method, not torch.is_grad_enabled()
        ragged = method.counts_are_dynamic
        acts_within = type(method).after_attention is not Method.after_attention
        whole = not acts_within or method.reads_scores_only  # it does not matter when the method hears of the scores
        # the CPU reads every count without waiting, a graph does not
        readable = self.cls_token.is_cpu and not torch.compiler.is_compiling()
        packs = whole and not inplace and (not ragged or readable)
        tokens, state = method.embed(self, images)
        offsets = tokens.cu_seqlens
        blocks = list(cast("list[Block]", self.blocks))
        native = inplace and all(type(block) is Block for block in blocks)
        # blocks between which nobody looks may run as one operator
        runs = method.runs_blocks and native and recorder is None and native_serves(tokens.x)
        run = BlockRun(blocks, self._prepared) if runs else None
        index = 0
        while index < len(blocks):
            tokens, state = method.before_block(index, tokens, state)
            ran_on = None if run is None else method.run_blocks_(index, run, tokens, state)
            if ran_on is not None:
                index, tokens, state = ran_on
                continue
            block = blocks[index]
            if recorder is not None:
                recorder.enter(tokens)
            scores = method.scores_at(index, recorder is not None)
            ran = block.run_(tokens, scores) if whole and native else None
            if ran is not None:
                tokens, state = method.after_attention(index, tokens, state, ran.scores)
            elif packs and tokens.rows is not None and block.takes_packed:
                tokens, received = _run_packed(block, tokens.trimmed() if ragged else tokens, scores)
                tokens, state = method.after_attention(index, tokens, state, received)
            else:
                attended = block.attend(tokens, scores=scores, inplace=inplace, ragged=ragged)
                tokens, state = method.after_attention(index, attended.tokens, state, attended.scores)
                # a method may have dropped tokens, or written some
                normed = attended.normed if tokens is attended.tokens else None
                tokens = block.feed_forward(tokens, inplace=inplace, ragged=ragged, normed=normed)
            tokens, state = method.after_block(index, tokens, state)
            if recorder is not None:
                recorder.leave(state)
            index += 1
        return offsets, tokens, state

    def classify(self, pooled: Tensor) -> Tensor:
        """Final norm and classifier, (B, D) to (B, num_classes)."""
        logits = self._classify_tokens(pooled, None)
        return linear(self.norm(pooled), self.head) if logits is None else logits

    def _classify_tokens(self, x: Tensor, offsets: Tensor | None) -> Tensor | None:
        """Logits of the class tokens, where one operator can read them from the stream (``classify_natively``)."""
        parts: dict[str, Any] = self._modules
        return classify_natively(x, offsets, parts["norm"], parts["head"], self._prepared)

    def check_images(self, images: Tensor) -> None:
        """Refuse what the model cannot read, in words."""
        side = self.config.img_size
        check_tensor("images", images, ("B", self.config.in_chans, side, side), self.cls_token.dtype, self.cls_token)

    def embed(self, images: Tensor) -> RaggedTokens:
        """Class token and patches with their positions, all alive."""
        native = self._embed_natively(images)
        if native is not None:
            return native
        patches = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        return RaggedTokens.from_dense(x)

    def _embed_natively(self, images: Tensor) -> RaggedTokens | None:
        embed = self._modules["patch_embed"]
        if type(embed) is not PatchEmbed:
            return None

        def tails() -> list[Tail]:
            return [Tail(embed.proj, self.pos_embed, self.config.patch_size, 0)] if is_plain(embed) else []

        made = self.embed_natively(images, None, (embed,), tails)
        return None if made is None else RaggedTokens(made[0], None, made[1], 1 + self.config.num_patches)

    def embed_natively(
        self,
        images: Tensor,
        chosen: Tensor | None,
        modules: Sequence[nn.Module],
        tails: Callable[[], Sequence[Tail]],
    ) -> tuple[Tensor, Tensor] | None:
        """``NativeEmbedding``'s, with weights packed once in a model whose linear layers are (``pack_weights``)."""
        keep = type(self._modules["head"]) is PackedLinear
        return self.native_embedding(images, chosen, self, modules, tails, keep)

    def with_method(self, method: Method) -> VisionTransformer:
        """The same weights, shared, run by another method."""
        _check_unattached(method, self.config)
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        method.attach(twin)
        method.model_config = self.config
        method.to(device=self.cls_token.device, dtype=self.cls_token.dtype)
        twin.method = method.train(self.training)
        return twin


def _first_rows(offsets: Tensor) -> Tensor:
    return offsets[:-1].long()


def _run_packed(
    block: Block, tokens: RaggedTokens, scores: Literal["class", "mean"] | None
) -> tuple[RaggedTokens, Tensor | None]:
    """A block in training: on a copy of the live rows, so that nothing as long as the residual stream is kept for the
    gradient, and two passes over it are all that dropped tokens cost."""
    live = RaggedTokens(tokens.packed(), None, tokens.cu_seqlens, tokens.max_seqlen, tokens.num_prefix_tokens)
    attended = block.attend(live, scores=scores)
    live = block.feed_forward(attended.tokens, normed=attended.normed)
    return tokens.with_packed(live.x), attended.scores


def check_flat(model: Any) -> None:
    """Refuse what is not one of the flat ViTs, in words."""
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a VisionTransformer, got {type(model).__name__}")


def _check_unattached(method: Method, config: ViTConfig) -> None:
    """A method may serve several models, but only of one size: its parameters and counts depend on it."""
    if method.model_config not in (None, config):
        raise ValueError(f"method must be new, got a {type(method).__name__} that runs a model of other sizes")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
