"""The scale formula, once: every kernel that quantises calls these device functions.

Their PyTorch twin is `reference.block_multiplier` and the division there; results are equal bit for bit.
"""

import triton
import triton.language as tl

from ..formats import E4M3_MAX as _E4M3_MAX
from ..formats import EPS as _EPS

E4M3_MAX = tl.constexpr(_E4M3_MAX)
EPS = tl.constexpr(_EPS)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, fp32, as int32: ordered as the magnitudes are, Inf above every number and NaN above Inf.

    A maximum over these keeps a NaN, which a floating-point maximum drops.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def block_multiplier(amax_bits, POW2: tl.constexpr):
    """The dequantisation multiplier, fp32, of blocks with these greatest `magnitude_bits`; NaN where one is Inf or NaN."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), EPS)
    dq = tl.div_rn(amax, E4M3_MAX)
    if POW2:
        dq = ((dq.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax_bits < 0x7F800000, dq, float("nan"))


@triton.jit
def quantize(x, dq, reciprocal):
    """e4m3(x / dq), with reciprocal = 1 / dq rounded to nearest; all three of one shape or broadcast to it.

    Three multiply-adds give the correctly rounded quotient that a division instruction takes about ten for (P. Markstein, IBM
    J. Res. Dev. 34, 1990): the residual of a first quotient is exact in an FMA and corrects it.
    No clamp: |x / dq| <= 448 (1 + 2^-23), which the cast rounds to 448. NaN casts to 0x7F.
    """
    quotient = x * reciprocal
    # In this order of signs -0 stays -0.
    excess = tl.fma(quotient, dq, -x)
    return tl.fma(-excess, reciprocal, quotient).to(tl.float8e4nv)
