"""Published ways to drop tokens, each a configuration, a policy and explicit state."""

from .a_vit import AViT, AViTConfig
from .dense import Dense, DenseConfig
from .evo_levit import EvoLeViT, EvoLeViTConfig
from .evo_vit import EvoViT, EvoViTConfig
from .life import Life, LifeConfig
from .mt_vit import MTViT, MTViTConfig

__all__ = [
    "AViT",
    "AViTConfig",
    "Dense",
    "DenseConfig",
    "EvoLeViT",
    "EvoLeViTConfig",
    "EvoViT",
    "EvoViTConfig",
    "Life",
    "LifeConfig",
    "MTViT",
    "MTViTConfig",
]
