"""How far a result may be from the truth: SQNR, relative error, and the one table of tolerances."""

import torch
from torch import Tensor

SQNR_FLOOR_DB: dict[str, float] = {
    "y": 28.0,
    "dx": 28.0,
    "dw": 28.0,
    "dw_fp8_block": 28.0,
    "dw_bf16": 45.0,
    "pow2": 28.0,
}
"""Least SQNR in dB against the fp32 linear, on normally distributed data; "pow2" is the floor of y, dx and dw under that scale format.

Rounding to e4m3 (3 mantissa bits) leaves about 31.5 dB of one operand and so about 28.5 of a product of two, whatever the block
size; a power-of-two multiplier wastes up to one binade of the format's range: more subnormals, no fewer mantissa bits.
"""

GEMM_RELATIVE_ERROR = 3e-3
"""Most ||out - exact|| / ||exact|| of a GEMM against fp32 on the dequantised operands; bf16 rounding of the result is 1.7e-3 of it."""


def sqnr(exact: Tensor, actual: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 20 log10(||exact|| / ||exact - actual||); inf where they are equal.

    NaN in either tensor gives NaN, which no floor accepts.
    """
    exact, actual = exact.double(), actual.double()
    return (20 * torch.log10(exact.norm() / (exact - actual).norm())).item()


def relative_error(exact: Tensor, actual: Tensor) -> float:
    """||actual - exact|| / ||exact||, in fp64; NaN where either holds NaN, which no bound accepts."""
    exact, actual = exact.double(), actual.double()
    return ((actual - exact).norm() / exact.norm()).item()
