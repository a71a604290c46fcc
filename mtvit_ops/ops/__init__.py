"""The ops anyone can drop into a PyTorch model."""

from .class_attention import class_attention
from .gather_layer_norm import gather_layer_norm
from .halting_step import HaltingState, HaltingStep, halting_step, initial_halting_state
from .ragged_linear import ragged_linear, ragged_linear_residual, ragged_linear_residual_
from .ragged_patch_embed import ragged_patch_embed
from .scatter_residual import scatter_residual, scatter_residual_
from .scatter_residual_layer_norm import scatter_residual_layer_norm, scatter_residual_layer_norm_
from .slow_fast import slow_fast_merge, slow_fast_update
from .token_select import TokenSelection, token_select
from .varlen_attention import varlen_attention

__all__ = [
    "HaltingState",
    "HaltingStep",
    "TokenSelection",
    "class_attention",
    "gather_layer_norm",
    "halting_step",
    "initial_halting_state",
    "ragged_linear",
    "ragged_linear_residual",
    "ragged_linear_residual_",
    "ragged_patch_embed",
    "scatter_residual",
    "scatter_residual_",
    "scatter_residual_layer_norm",
    "scatter_residual_layer_norm_",
    "slow_fast_merge",
    "slow_fast_update",
    "token_select",
    "varlen_attention",
]
