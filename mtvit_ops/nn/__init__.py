"""Thin modules around the ops."""

from .attention import Attention
from .block import Block
from .checkpointed import checkpointed_twin
from .drop_path import drop_path_twin
from .levit import LeViT, LeViTConfig, fold_norms
from .linear import PackedLinear, pack_weights, unpack_weights
from .masked import masked_twin
from .method import Method
from .mlp import Mlp
from .patch_embed import PatchEmbed
from .trace import Trace
from .vision_transformer import VisionTransformer, ViTConfig

__all__ = [
    "Attention",
    "Block",
    "LeViT",
    "LeViTConfig",
    "Method",
    "Mlp",
    "PackedLinear",
    "PatchEmbed",
    "Trace",
    "ViTConfig",
    "VisionTransformer",
    "checkpointed_twin",
    "drop_path_twin",
    "fold_norms",
    "masked_twin",
    "pack_weights",
    "unpack_weights",
]
