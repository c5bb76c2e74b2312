"""The scale formula, once: every kernel that quantises calls these device functions.

Their PyTorch twin is `reference.block_multiplier` and the division there; results are equal bit for bit. Division instructions
are slow, so quotients are corrected instead (P. Markstein, IBM J. Res. Dev. 34, 1990): the residual of an approximate quotient
is exact in a fused multiply-add, and adding it times the reciprocal rounds as the true quotient does. Of bf16 less will do.
"""

import triton
import triton.language as tl

from ..formats import E4M3_MAX as _E4M3_MAX
from ..formats import EPS as _EPS
from .convert import approximate_reciprocal

E4M3_MAX = tl.constexpr(_E4M3_MAX)
E4M3_MAX_RECIPROCAL = tl.constexpr(float.fromhex("0x1.24924Ap-9"))  # 1 / 448 rounded to fp32
EPS = tl.constexpr(_EPS)
TINY = tl.constexpr(2.0**-64)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """The bits of max |x| along an axis, fp32, as int32: at 0x7F800000 for Inf, above for NaN, which a plain maximum would drop."""
    return tl.reduce(tl.abs(x), axis, _larger_or_nan).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def block_multiplier(amax_bits, POW2: tl.constexpr):
    """The dequantisation multiplier, fp32, of blocks with these `amax_bits`; NaN where a block holds Inf or NaN."""
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), EPS)
    dq = amax * E4M3_MAX_RECIPROCAL
    dq = tl.fma(tl.fma(dq, -E4M3_MAX, amax), E4M3_MAX_RECIPROCAL, dq)
    if POW2:
        dq = ((dq.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax_bits < 0x7F800000, dq, float("nan"))


@triton.jit
def quotient(x, dq, BF16: tl.constexpr):
    """What e4m3(x / dq) may be cast from; shapes broadcast. dq is from 2^-126 to 2^120, or NaN.

    BF16: x are bf16 in value, and so is the amax that dq is made of. Then two instructions do for each x instead of four: the error
    of the reciprocal is kept beside it, and the quotient is off by less than 2^-42 of itself before it is rounded (by more from
    dq = 2^104 on, where the error is no normal number). That it is enough was tried for every pair of x and amax, which are few
    (tests/test_scaling.py). Otherwise x / dq is rounded to nearest.
    """
    # Tiny blocks are lifted by an exact factor: their residuals would have bits below the least fp32.
    lift = tl.where(dq < TINY, 1 / TINY, 1.0)
    dq = dq * lift
    inverse = approximate_reciprocal(dq)
    if BF16:
        inverse *= 1 - 2.0**-22  # from below: the error is positive, and -0 stays -0
        error = tl.fma(dq * -1.0, inverse, 1.0) * inverse
        return tl.fma(x, inverse * lift, x * (error * lift))
    else:
        x = x * lift
        inverse = tl.fma(tl.fma(dq * -1.0, inverse, 1.0), inverse, inverse)
        approximate = x * inverse
        # Signs so placed that -0 stays -0; x * -1.0 folds into the instruction, where Triton 3.6 would compute -x as 0 - x.
        excess = tl.fma(approximate, dq, x * -1.0)
        return tl.fma(excess, inverse * -1.0, approximate)


@triton.jit
def quantize(x, dq, BF16: tl.constexpr):
    """e4m3(x / dq); shapes broadcast. BF16: see `quotient`.

    No clamp: |x / dq| <= 448 (1 + 2^-23), which the cast rounds to 448. NaN casts to 0x7F.
    """
    return quotient(x, dq, BF16).to(tl.float8e4nv)
