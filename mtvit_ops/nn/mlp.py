"""The token-wise network of a block."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import linear


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU, with timm's parameter names."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        return linear(linear(x, self.fc1, gelu=True), self.fc2)
