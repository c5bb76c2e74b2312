"""Quantisation and transposition kernels, portable. One program handles one 128x128 tile.

Operands are row-major; row strides are in elements. Rows and columns past the edge load as zero, which no maximum notices.
"""

import triton
import triton.language as tl

from ..formats import BLOCK as _BLOCK
from .scaling import block_multiplier, magnitude_bits, quantize, reciprocal

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _tile(M, K):
    """Offsets and mask of this program's tile of an [M, K] matrix; neighbouring programs walk along a row of tiles."""
    m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return m, k, (m < M)[:, None] & (k < K)[None, :]


@triton.jit
def _quantize_1x128_kernel(
    x_ptr,
    x_q_ptr,
    x_dq_ptr,
    xt_q_ptr,
    xt_dq_ptr,
    M,
    K,
    x_stride,
    xt_stride,
    BOTH: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
):
    """x [M, K] -> x_q [M, K] and x_dq [ceil(K/128), M]; if BOTH also xt_q [K, xt_stride] and xt_dq [ceil(M/128), K].

    PADDED: xt_stride > M; columns of xt_q past M become zero.
    """
    m, k, mask = _tile(M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = magnitude_bits(x)

    dq = block_multiplier(tl.max(bits, 1), POW2)
    x_q = quantize(x, dq[:, None], reciprocal(dq)[:, None])
    tl.store(x_q_ptr + m[:, None] * K + k[None, :], x_q, mask=mask)
    tl.store(x_dq_ptr + tl.program_id(0).to(tl.int64) * M + m, dq, mask=m < M)

    if BOTH:
        dq = block_multiplier(tl.max(bits, 0), POW2)
        xt_q = quantize(x, dq[None, :], reciprocal(dq)[None, :])
        if PADDED:
            # Rows past M are zero, but in a block that holds NaN zero times its multiplier is NaN too.
            payload = tl.where((m < M)[:, None], xt_q.to(tl.uint8, bitcast=True), 0)
            xt_q = payload.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        xt_q_ptrs = xt_q_ptr + k[:, None].to(tl.int64) * xt_stride + m[None, :]
        tl.store(xt_q_ptrs, tl.trans(xt_q), mask=(k < K)[:, None] & (m < xt_stride)[None, :])
        tl.store(xt_dq_ptr + tl.program_id(1).to(tl.int64) * K + k, dq, mask=k < K)


@triton.jit
def _quantize_128x128_kernel(w_ptr, w_q_ptr, w_dq_ptr, N, K, w_stride, POW2: tl.constexpr):
    """w [N, K] -> w_q [N, K] and w_dq [ceil(N/128), ceil(K/128)]."""
    n, k, mask = _tile(N, K)
    w = tl.load(w_ptr + n[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    dq = block_multiplier(tl.max(tl.max(magnitude_bits(w), 1), 0), POW2)
    w_q = quantize(w, dq, reciprocal(dq))
    tl.store(w_q_ptr + n[:, None] * K + k[None, :], w_q, mask=mask)
    tl.store(w_dq_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), dq)


@triton.jit
def _transpose_kernel(x_ptr, xt_ptr, M, K, x_stride, xt_stride):
    """e4m3 x [M, K] -> xt [K, xt_stride >= M], zero past M; moved as bytes."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    xt_ptr = xt_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    m, k, mask = _tile(M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0)
    xt_ptrs = xt_ptr + k[:, None].to(tl.int64) * xt_stride + m[None, :]
    tl.store(xt_ptrs, tl.trans(x), mask=(k < K)[:, None] & (m < xt_stride)[None, :])
