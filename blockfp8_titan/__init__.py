"""Blockwise-fp8 training of Llama for torchtitan.

Importing the package registers the model converter "blockwise_fp8" with torchtitan, where that is installed.
"""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from .linear import BlockwiseFP8Linear
from .recipe import Recipe

try:
    __version__ = version("blockfp8-titan")
except PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = ["BlockwiseFP8Linear", "Recipe", "ops"]
