"""The network that looks at an image and says which of MT-ViT's tails it needs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._register import native_kernel, native_serves
from ..nn.linear import PackedLinear
from ..nn.plain import is_plain, modules_are_watched
from ..nn.prepared import Prepared


class TailPredictor(nn.Module):
    """A strided CNN so small that asking it costs little against the cheapest tail.

    In evaluation mode on the CPU, where no gradient is wanted, it is one native operator, which keeps float32 inside.

    Args:
        in_chans: image channels.
        num_tails: K.
        image_size: side of what it looks at, pixels.
        width: times as many channels as ``WIDTHS``.
        num_classes: of a classifier that reads the same features; the entropy of its answer is one more of them for the
            scores, since how hard an image is shows in how many classes it could be. 0: none.
    """

    WIDTHS = (16, 32, 64, 96)

    def __init__(self, in_chans: int, num_tails: int, image_size: int, width: int = 1, num_classes: int = 0) -> None:
        super().__init__()
        self.image_size = image_size
        self._prepared = Prepared()
        first, *wider = (width * channels for channels in self.WIDTHS)
        layers: list[nn.Module] = [*_conv(in_chans, first, 3, 4, 1)]
        for before, after in zip([first, *wider], wider):
            layers += [*_conv(before, before, 3, 2, before), *_conv(before, after, 1, 1, 1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(wider[-1] + (num_classes > 0), num_tails)
        # no tail is preferred before training
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if num_classes:
            self.head_cls = nn.Linear(wider[-1], num_classes)
            nn.init.trunc_normal_(self.head_cls.weight, std=0.02)
            nn.init.zeros_(self.head_cls.bias)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        found = self._predict_natively(images, (), 0.0)
        return self.judge(self.look(images))[0] if found is None else found[0]

    def choose(
        self, images: Tensor, relative_costs: tuple[float, ...], cost_weight: float
    ) -> tuple[Tensor, Tensor] | None:
        """Scores (B, K), and for each image the best tail of score minus weighted cost, (B,) int32, in one operator.

        None: it cannot serve here, or somebody watches the predictor.
        """
        if type(self) is not TailPredictor or not is_plain(self):
            return None
        return self._predict_natively(images, relative_costs, cost_weight)

    def _predict_natively(
        self, images: Tensor, costs: tuple[float, ...], cost_weight: float
    ) -> tuple[Tensor, Tensor] | None:
        # in this order: the compiler need not look into the second
        if self.training or not native_serves(images) or modules_are_watched():
            return None
        folded = self._prepared.arguments("predictor", (self,), images, lambda _, x: self._folded(x))
        if folded is None:
            return None
        found: tuple[Tensor, Tensor] = native_kernel("predict_tails")(
            images, self.image_size, *folded, costs, cost_weight
        )
        return found

    def _folded(self, images: Tensor) -> tuple[Tensor, list[int]] | None:
        """All that depends on no image, and its sizes; None as ``_native_arguments``."""
        given = self._native_arguments(images)
        if given is None:
            return None
        layers, _, head, *_, class_weight, _ = given
        widths = [layer.shape[0] for layer in layers[::10]]  # of the first convolution and of each pair's last
        classes = 0 if class_weight is None else class_weight.shape[0]
        return native_kernel("fold_tail_predictor")(*given), [*widths, layers[0].shape[1], head.shape[0], classes]

    def judge(self, features: Tensor) -> tuple[Tensor, Tensor | None]:  # (B, P) -> (B, K), (B, num_classes)
        """Scores of the tails and logits of the classes; None without a classifier."""
        if "head_cls" not in self._modules:
            return self.head(features), None
        logits = self.head_cls(features)
        # not entr: its gradient is NaN at a probability of 0
        log_shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
        entropy = -(log_shares.exp() * log_shares).sum(dim=1, keepdim=True)
        return self.head(torch.cat([features, entropy.to(features.dtype)], dim=1)), logits

    def look(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, P)
        """What is judged."""
        size = (self.image_size, self.image_size)
        # no gradient reaches the image; resampling in float32, since not every device resamples half floats
        small = F.interpolate(images.detach().float(), size, mode="bilinear", antialias=True, align_corners=False)
        return self.features(small.to(images.dtype)).mean(dim=(2, 3))

    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        side, total = self.image_size, 0
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                side = (side - 1) // layer.stride[0] + 1
                total += side**2 * layer.weight.numel()
        return total + sum(part.weight.numel() for part in self.children() if isinstance(part, nn.Linear))

    def _native_arguments(self, images: Tensor) -> tuple[Any, ...] | None:
        """Those behind images and size; None: somebody changed a layer or watches it, so all must run themselves."""
        layers: list[Tensor] = []
        eps = None
        parts = [*self.features._modules.values()]
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        shapes = _geometry(len(self.WIDTHS))
        heads = [self._modules["head"]]
        if "head_cls" in self._modules:
            heads.append(self._modules["head_cls"])
        if len(parts) != 6 * len(self.WIDTHS) - 3 or not is_plain(self.features):
            return None
        if not all(head is not None and type(head) in (nn.Linear, PackedLinear) and is_plain(head) for head in heads):
            return None
        # parameters are read from the dicts that hold them: attribute look-up would cost as much as the convolutions
        for index, part in enumerate(parts):
            if part is None or type(part) is not kinds[index % 3] or not is_plain(part):
                return None
            parameters = part._parameters
            if index % 3 == 0:
                weight = parameters.get("weight")
                if weight is None or parameters.get("bias") is not None or not _has_geometry(part, *shapes[index // 3]):
                    return None
                layers.append(weight)
            elif index % 3 == 1:
                eps = part.eps if eps is None else eps
                mean, var = part._buffers["running_mean"], part._buffers["running_var"]
                if part.eps != eps or mean is None or var is None or part.training:
                    return None
                layers += [parameters.get("weight"), parameters.get("bias"), mean, var]  # type: ignore[list-item]
        linear = [head._parameters.get(name) for head in heads for name in ("weight", "bias")]  # type: ignore[union-attr]
        for tensor in [*layers, *linear]:
            # a subclass, quantised, say, knows better
            if tensor is None or type(tensor) not in (nn.Parameter, Tensor):
                return None
            if not tensor.is_cpu or tensor.dtype is not images.dtype:
                return None
        return layers, eps, *linear, *[None] * (4 - len(linear))


def _conv(width: int, wider: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(width, wider, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(wider), nn.ReLU()]


@cache
def _geometry(widths: int) -> list[tuple[int, int, bool]]:
    """Kernel, stride and whether each channel stays by itself, of every convolution."""
    return [(3, 4, False), *((3, 2, True), (1, 1, False)) * (widths - 1)]


def _has_geometry(conv: Any, kernel: int, stride: int, alone: bool) -> bool:
    groups = conv.in_channels if alone else 1
    square = (conv.kernel_size, conv.stride, conv.padding) == ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2)
    return square and conv.dilation == (1, 1) and conv.groups == groups and conv.padding_mode == "zeros"
