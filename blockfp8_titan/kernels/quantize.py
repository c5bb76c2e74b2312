"""Quantisation and transposition kernels, portable. One program handles one 128x128 tile; see `tiles` for what they share."""

import triton
import triton.language as tl

from .scaling import amax_bits, block_multiplier, quantize, quotient
from .tiles import BLOCK, store_columns, store_rows, store_transposed, this_tile, tile, tile_in_runs


@triton.jit
def _quantize_1x128_kernel(x_ptr, x_q_ptr, x_dq_ptr, M, K, x_stride, POW2: tl.constexpr):
    """x [M, K] -> x_q [M, K] and x_dq [ceil(K/128), M]."""
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    m, k, mask = tile(row, column, M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    store_rows(x, column, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2, BF16)


@triton.jit(do_not_specialize=["M"])  # see pack_e4m3
def _quantize_1x128_both_kernel(
    x_ptr,
    x_q_ptr,
    x_dq_ptr,
    xt_q_ptr,
    xt_dq_ptr,
    M,
    K,
    x_stride,
    xt_stride,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
):
    """x [M, K] -> x_q [M, K], x_dq [ceil(K/128), M], xt_q [K, xt_stride] and xt_dq [ceil(M/128), K].

    PADDED: xt_stride > M; columns of xt_q past M become zero. xt_stride is a multiple of 16.
    """
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    m, k, mask = tile_in_runs(row, column, M, K, RUN)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    store_rows(x, column, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2, BF16)
    store_columns(x, row, column, m, k, xt_q_ptr, xt_dq_ptr, M, K, xt_stride, RUN, PADDED, POW2, BF16, False)


@triton.jit(do_not_specialize=["M"])  # see pack_e4m3
def _quantize_columns_kernel(
    x_ptr,
    xt_q_ptr,
    xt_dq_ptr,
    M,
    K,
    x_stride,
    xt_stride,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """x [M, K] -> the last two results of `_quantize_1x128_both_kernel`; if SQUARE, xt_dq is [ceil(M/128), ceil(K/128)]."""
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    m, k, mask = tile_in_runs(row, column, M, K, RUN)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    store_columns(x, row, column, m, k, xt_q_ptr, xt_dq_ptr, M, K, xt_stride, RUN, PADDED, POW2, BF16, SQUARE)


@triton.jit
def _quantize_128x128_kernel(w_ptr, w_q_ptr, w_dq_ptr, N, K, w_stride, POW2: tl.constexpr):
    """w [N, K] -> w_q [N, K] and w_dq [ceil(N/128), ceil(K/128)]."""
    BF16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    n, k, mask = tile(row, column, N, K)
    w = tl.load(w_ptr + n[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    quotients = _divide_block(w, row, column, w_dq_ptr, POW2, BF16)
    tl.store(w_q_ptr + n[:, None] * K + k[None, :], quotients.to(tl.float8e4nv), mask=mask)


@triton.jit
def _divide_block(w, row, column, w_dq_ptr, POW2: tl.constexpr, BF16: tl.constexpr):
    """A tile divided by the one multiplier that it shares, which is stored."""
    dq = block_multiplier(tl.max(amax_bits(w, 1), 0), POW2)
    tl.store(w_dq_ptr + row * tl.num_programs(0) + column, dq)
    return quotient(w, dq, BF16)


@triton.jit(do_not_specialize=["N"])  # see pack_e4m3
def _quantize_128x128_both_kernel(
    w_ptr,
    w_q_ptr,
    w_dq_ptr,
    wt_q_ptr,
    N,
    K,
    w_stride,
    wt_stride,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
):
    """w [N, K] -> w_q [N, K], w_dq [ceil(N/128), ceil(K/128)] and wt_q [K, wt_stride].

    PADDED: wt_stride > N; columns of wt_q past N become zero. wt_stride is a multiple of 16.
    """
    BF16: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    n, k, mask = tile_in_runs(row, column, N, K, RUN)
    w = tl.load(w_ptr + n[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    quotients = _divide_block(w, row, column, w_dq_ptr, POW2, BF16)
    tl.store(w_q_ptr + n[:, None] * K + k[None, :], quotients.to(tl.float8e4nv), mask=mask)
    store_transposed(quotients, row, column, n, k, wt_q_ptr, N, K, wt_stride, RUN, PADDED)


@triton.jit
def _shard_tile(M, K, first_row):
    """Offsets and mask of this program's tile of rows [first_row, first_row + M) of a taller matrix, and the tile's row of blocks there.

    Tiles are blocks of that matrix: the first and the last row of tiles may reach past the M rows that are here.
    """
    block = first_row // BLOCK + tl.program_id(1)
    m = (block * BLOCK - first_row).to(tl.int64) + tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return m, k, ((m >= 0) & (m < M))[:, None] & (k < K)[None, :], block


@triton.jit
def _amax_128x128_kernel(w_ptr, bits_ptr, M, K, w_stride, first_row):
    """Rows first_row to first_row + M of w -> the rows of bits [ceil(N/128), ceil(K/128)] whose blocks they touch."""
    m, k, mask, block = _shard_tile(M, K, first_row)
    w = tl.load(w_ptr + m[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(bits_ptr + block * tl.num_programs(0) + tl.program_id(0), tl.max(amax_bits(w, 1), 0))


@triton.jit
def _quantize_rows_kernel(w_ptr, w_dq_ptr, w_q_ptr, M, K, w_stride, first_row):
    """Rows first_row to first_row + M of w, with the multipliers [ceil(N/128), ceil(K/128)] of all of w -> w_q [M, K]."""
    m, k, mask, block = _shard_tile(M, K, first_row)
    w = tl.load(w_ptr + m[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    dq = tl.load(w_dq_ptr + block * tl.num_programs(0) + tl.program_id(0))
    tl.store(w_q_ptr + m[:, None] * K + k[None, :], quantize(w, dq, False), mask=mask)  # dq may be of anything


@triton.jit
def _transpose_kernel(x_ptr, xt_ptr, M, K, x_stride, xt_stride):
    """e4m3 x [M, K] -> xt [K, xt_stride >= M], zero past M; moved as bytes."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    xt_ptr = xt_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    row, column = this_tile()
    m, k, mask = tile(row, column, M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0)
    xt_ptrs = xt_ptr + k[:, None].to(tl.int64) * xt_stride + m[None, :]
    tl.store(xt_ptrs, tl.trans(x), mask=(k < K)[:, None] & (m < xt_stride)[None, :])
