"""Blockwise-fp8 training of Llama for torchtitan.

Importing the package registers the model converter "blockwise_fp8" with torchtitan and lets its runs be recorded
(`metrics`). Everything else works without torchtitan.
"""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from .checkpointing import prepare_for_checkpointing
from .conversion import ConversionReport, convert_model, gather_weights_in_fp8
from .linear import BlockwiseFP8Linear
from .recipe import Recipe
from .rules import Rule
from .weight import refresh_scales

try:
    from . import metrics as _  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "torchtitan":
        raise

try:
    __version__ = version("blockfp8-titan")
except PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "BlockwiseFP8Linear",
    "ConversionReport",
    "Recipe",
    "Rule",
    "convert_model",
    "gather_weights_in_fp8",
    "ops",
    "prepare_for_checkpointing",
    "refresh_scales",
]
