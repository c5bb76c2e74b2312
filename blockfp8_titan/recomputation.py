"""What activation checkpointing computes again in backward, and what it keeps."""

from dataclasses import dataclass
from typing import Literal

ActivationSave = Literal["gemm", "balanced", "none"]
"""Which outputs of forward fp8 GEMMs selective checkpointing by op keeps; see `checkpointing`."""


@dataclass(frozen=True)
class Recomputation:
    """How a module behaves under activation checkpointing."""

    columns_apart: bool = False
    """
    Quantise for the forward GEMM and for dw by two ops, where one could. Compiled under a checkpoint, forward then runs the first
    alone and backward the second; otherwise each would run both and drop half.
    """

    output: bool = False
    """
    Of a linear: checkpointing computes the output of its forward GEMM again instead of keeping it. Of a norm: that of a linear that
    multiplies its result, so that backward needs the rows again too.
    """
