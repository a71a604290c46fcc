"""Whether a module's own class and parameters say what it computes, so that a kernel may stand in for it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def is_plain(module: nn.Module) -> bool:
    """Nobody watches this module or has put another ``forward`` on it."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def modules_are_watched() -> bool:
    """Somebody wants to see every module run."""
    return bool(torch_module._has_any_global_hook())


def is_plain_norm(norm: nn.Module) -> bool:
    return affine(norm) is not None


# Parameters are read from the dicts that hold them: a module's attribute look-up would cost more than all checks here.


def affine(norm: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon; None: the layer norm must run itself."""
    if not (type(norm) is nn.LayerNorm and is_plain(norm)):
        return None
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None or bias is None:
        return None
    return weight, bias, norm.eps
