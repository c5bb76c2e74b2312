"""The numbers that define the format: shared by the kernels, the reference and the checks."""

BLOCK = 128
"""Elements that share one multiplier, along each scaled dimension (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn (OCP 8-bit floating point specification 1.0)."""

EPS = E4M3_MAX * 2.0**-126
"""Least amax of a block: keeps the multiplier a normal fp32 and its reciprocal finite.

The field's usual 1e-12 flushes whole blocks of activation gradients to zero once the loss is averaged over millions of tokens.
"""

ALIGNMENT = 16
"""in_features and out_features must be multiples of this: fp8 tensor cores and TMA read rows in units of 16 bytes."""


def ceil_div(a: int, b: int) -> int:
    """The least integer not below a / b."""
    return (a + b - 1) // b


def round_up(a: int, b: int) -> int:
    """The least multiple of b not below a."""
    return ceil_div(a, b) * b
