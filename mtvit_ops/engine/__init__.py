"""Running models: one CUDA graph a batch size."""

from .graph import CapturedModel, capture

__all__ = ["CapturedModel", "capture"]
