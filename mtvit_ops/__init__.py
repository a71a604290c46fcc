"""Adaptive vision transformers in which a removed token costs nothing on the clock."""

from pathlib import Path as _Path

from ._version import __version__

# a checkout keeps the Triton kernels beside the package, an installed wheel inside it: find both
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = ["__version__"]
