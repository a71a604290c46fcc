"""Losses and training forwards of the methods."""

from .compute_loss import compute_loss

__all__ = ["compute_loss"]
