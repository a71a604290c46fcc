"""Adaptive vision transformers in which a removed token costs nothing on the clock."""

from pathlib import Path as _Path

from ._backend import available_backends, use_backend
from ._extension import build_info, has_extension
from ._version import __version__
from .calibrate import Calibration, calibrate
from .checkpoints import LoadReport, load_checkpoint
from .engine import CapturedModel, capture
from .flops import MacCount, count_macs
from .models import create_method, create_model, list_models
from .nn import Method, Trace, VisionTransformer, ViTConfig, pack_weights, unpack_weights
from .ragged import RaggedTokens

# a checkout keeps the Triton kernels beside the package, an installed wheel inside it: find both
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = [
    "Calibration",
    "CapturedModel",
    "LoadReport",
    "MacCount",
    "Method",
    "RaggedTokens",
    "Trace",
    "ViTConfig",
    "VisionTransformer",
    "__version__",
    "available_backends",
    "build_info",
    "calibrate",
    "capture",
    "count_macs",
    "create_method",
    "create_model",
    "has_extension",
    "list_models",
    "load_checkpoint",
    "pack_weights",
    "unpack_weights",
    "use_backend",
]
