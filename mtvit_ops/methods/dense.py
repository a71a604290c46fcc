"""The dense ViT: nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._checks import check_choice
from ..nn.method import Method
from ..ragged import RaggedTokens
from ._pooling import pool_tokens


@dataclass(frozen=True)
class DenseConfig:
    """
    Attributes:
        pool: what the classifier reads: the ``"class"`` token, or the ``"mean"`` of the patch tokens.
    """

    pool: str = "class"

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, ("class", "mean"))


class Dense(Method):
    """Every token through every block."""

    config_class = DenseConfig
    config: DenseConfig

    @property
    def reads_class_tokens(self) -> bool:
        return type(self).readout is Dense.readout and self.config.pool == "class"

    def readout(self, first_rows: Tensor, tokens: RaggedTokens, state: None) -> Tensor:
        return pool_tokens(tokens.x, first_rows, tokens.num_prefix_tokens, self.config.pool)
