"""Linear layers through the fastest kernel there is for them on the CPU, with weights packed once on request."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _backend
from .._cpu_linear import onednn_dtypes, panel_columns, panel_dtypes
from .._register import is_transformed
from .plain import is_plain, modules_are_watched


def linear(x: Tensor, layer: nn.Module, *, gelu: bool = False) -> Tensor:
    """``layer(x)``, with an exact (erf) GELU behind it on request.

    For inference on the CPU this goes to PyTorch's oneDNN kernel or to ours (``_cpu_linear`` says which, and why); both
    take bias and GELU along in one pass and do not depend on the BLAS behind ``F.linear``.

    Args:
        x: tokens, (T, in_features), any float dtype.
        layer: an ``nn.Linear`` or a ``PackedLinear``; anything else is called as it is.
        gelu: apply the activation.

    Returns:
        (T, out_features), dtype of ``x``.

    Gradients flow wherever they are needed: PyTorch's own layers serve then. Hooks run, and so does a ``forward`` that
    was put on the layer.

    Equivalent PyTorch: ``F.gelu(layer(x)) if gelu else layer(x)``.
    """
    # a subclass of layer or weight (quantised, say) knows better how to multiply
    if type(layer) is PackedLinear or type(layer) is nn.Linear:
        weight = layer.weight
        if type(weight) is nn.Parameter and _serves(x, weight) and _is_itself(layer):
            if type(layer) is PackedLinear:
                weight = layer.packed_weight(weight)
            return cpu_linear(x, weight, layer.bias, gelu)
    y = layer(x)
    return F.gelu(y) if gelu else y


def linear_patches(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution over patches that do not overlap, as what it is: a linear layer on each patch.

    Args:
        images: (B, C, H, W), sides that are multiples of the kernel.
        conv: stride equal to its square kernel, no padding.

    Returns:
        (B, patches, out_channels), row by row.

    Equivalent PyTorch: ``conv(images).flatten(2).transpose(1, 2)``.
    """
    weight = conv.weight
    if not (type(weight) is nn.Parameter and _serves(images, weight) and _is_itself(conv)):
        return conv(images).flatten(2).transpose(1, 2)
    batch, channels, height, width = images.shape
    side = weight.shape[-1]
    grid = height // side, width // side
    patches = images.reshape(batch, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
    tokens = cpu_linear(patches.reshape(batch * grid[0] * grid[1], -1), weight.flatten(1), conv.bias)
    return tokens.unflatten(0, (batch, -1))


Packed = tuple[object, Tensor, Tensor]  # key, packed weight, weight it is made from


def packed_anew(kept: Packed | None, weight: Tensor) -> Packed:
    """What is kept, or the weight (N, ...) packed as (N, K) if it is another one or has changed since."""
    if kept is not None and kept[0] == _key(weight):
        return kept
    return _as_packed(weight, _pack(weight.detach().flatten(1)))


def _key(weight: Tensor) -> object:
    return weight.data_ptr(), weight._version, weight.dtype


def _as_packed(weight: Tensor, packed: Tensor) -> Packed:
    _watch_fused_steps()
    return _key(weight), packed, weight.detach()  # kept, so that no other weight can come to lie at its address


@cache
def _watch_fused_steps() -> None:
    """From the first packing on, steps of fused optimisers count as the changes they are."""
    register_optimizer_step_post_hook(_count_fused_step)


def _count_fused_step(optimiser: torch.optim.Optimizer, *_: object) -> None:
    for group in optimiser.param_groups:
        if group.get("fused"):  # the only ones that write weights without a new version
            for parameter in group["params"]:
                torch.autograd.graph.increment_version(parameter)


class PackedLinear(nn.Module):
    """An ``nn.Linear`` that also keeps its weight in the order in which the CPU's kernel reads it.

    Shares weight and bias, under the same names, with the layer it is made from. A weight that was changed in place,
    loaded, moved or cast is packed anew at the next use; changes through ``.data`` are not seen.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not _serves(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return cpu_linear(x, self.packed_weight(self.weight), self.bias)

    def packed_weight(self, weight: Tensor) -> Tensor:
        """``weight``, which is the layer's, as the kernel wants it."""
        if weight.is_inference():  # has no version to tell whether it changed
            return weight
        self._packed = kept = packed_anew(self._packed, weight)
        return kept[1]

    def can_keep(self) -> bool:
        """Whether ``keep`` may be given a packed weight: an inference tensor has no version to tell of a change."""
        return not self.weight.is_inference()

    def keep(self, packed: Tensor | None) -> None:
        """Use this as the weight as it is now, packed; None: let go of what was packed."""
        self._packed = None if packed is None else _as_packed(self.weight, packed)

    def __getstate__(self) -> dict[str, object]:
        # the packed copy can neither be copied nor stored; it is made anew
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_weights(model: nn.Module) -> nn.Module:
    """Make the ``nn.Linear`` layers of a model ``PackedLinear`` ones, in place, for faster inference on the CPU.

    Works on any model, ours or not; layers with hooks or a ``forward`` of their own, or whose weight is computed
    (``torch.nn.utils.prune``), are left alone. Ours also keep their patch embedding's weight packed then. Parameters
    and state dict stay what they are; memory grows by the size of the packed weights at the first inference. Training
    and other devices run as before. Changes through ``.data`` are not seen by what is packed.

    Args:
        model: any module; layers of a subclass of ``nn.Linear`` are left alone.

    Returns:
        The same model; a model that is itself an ``nn.Linear`` comes back as a new ``PackedLinear``.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if type(model) is nn.Linear and _can_be_packed(model):
        return PackedLinear(model).train(model.training)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _can_be_packed(child):
                setattr(parent, name, PackedLinear(child).train(child.training))
    return model


def _can_be_packed(layer: nn.Linear) -> bool:
    """Whether the layer's own parameters and nothing else say what it computes."""
    watched = layer._backward_hooks or layer._backward_pre_hooks
    return {"weight", "bias"} <= layer._parameters.keys() and is_plain(layer) and not watched


def _is_itself(layer: nn.Module) -> bool:
    """Whether a kernel may stand in for the layer here and now."""
    return is_plain(layer) and not modules_are_watched()


def unpack_weights(model: nn.Module) -> nn.Module:
    """Undo ``pack_weights``, in place; returns the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is PackedLinear:
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight, plain.bias = child.weight, child.bias
                setattr(parent, name, plain.train(child.training))
    return model


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """The kernel itself, (..., in_features) to (..., out_features), for the dtypes in ``linear_dtypes``."""
    if x.dtype in panel_dtypes():
        if x.dim() == 2:
            return _panel_kernel()(x, weight, bias, gelu)
        return _panel_kernel()(x.reshape(-1, x.shape[-1]), weight, bias, gelu).unflatten(0, x.shape[:-1])
    if gelu:  # "none" is GELU by erf, not by tanh
        return _onednn_kernel()(x, weight, bias, "gelu", [], "none")
    return _onednn_kernel()(x, weight, bias, "none", [], "")


def _pack(weight: Tensor) -> Tensor:
    """The weight as the kernel for its dtype wants it, where it can be had so."""
    if weight.dtype not in panel_dtypes():
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    if weight.shape[0] % panel_columns():
        return weight
    return torch.ops.mtvit_ops_cpp.pack_panels(weight)


@cache
def _onednn_kernel() -> Callable[..., Tensor]:
    return torch.ops.mkldnn._linear_pointwise.default


@cache
def _panel_kernel() -> Callable[..., Tensor]:
    return torch.ops.mtvit_ops_cpp.linear.default


def cpu_kernel_serves(x: Tensor) -> bool:
    """Whether a kernel takes ``x``: for inference on the CPU, where nothing asks for another way."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.numel() == 0 or torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    preferred = _backend.preferred_backend()
    if x.dtype in panel_dtypes():
        return preferred in (None, "cpp")
    return x.dtype in onednn_dtypes() and preferred != "reference"


def _serves(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype is x.dtype and weight.numel() > 0 and cpu_kernel_serves(x)
