"""Quantisation and transposition kernels, portable. One program handles one 128x128 tile.

Operands are row-major; row strides are in elements. Rows and columns past the edge load as zero, which no maximum notices.
"""

import triton
import triton.language as tl

from ..formats import BLOCK as _BLOCK
from .scaling import amax_bits, block_multiplier, quantize, reciprocal

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _tile(M, K):
    """Offsets and mask of this program's tile of an [M, K] matrix; neighbouring programs walk along a row of tiles."""
    m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return m, k, (m < M)[:, None] & (k < K)[None, :]


@triton.jit
def _quantize_1x128_kernel(x_ptr, x_q_ptr, x_dq_ptr, M, K, x_stride, POW2: tl.constexpr):
    """x [M, K] -> x_q [M, K] and x_dq [ceil(K/128), M]."""
    m, k, mask = _tile(M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_rows(x, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2)


@triton.jit
def _store_rows(x, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2: tl.constexpr):
    """Quantise a tile's rows and store payload and multipliers."""
    dq = block_multiplier(amax_bits(x, 1), POW2)
    tl.store(x_q_ptr + m[:, None] * K + k[None, :], quantize(x, dq[:, None], reciprocal(dq)[:, None]), mask=mask)
    tl.store(x_dq_ptr + tl.program_id(0).to(tl.int64) * M + m, dq, mask=m < M)


@triton.jit
def _tile_by_eights(M, K):
    """As `_tile`, with rows in the order 0, 8, 16, ..., 120, 1, 9, ...: any order does, since a tile is one group of rows.

    With Triton's layout for 16-byte loads by four warps a thread then holds runs of eight neighbouring rows, and packs four
    payloads of a column into a word without leaving its registers. What goes through shared memory to be transposed is words, not
    bytes.
    """
    p = tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64) * BLOCK + p % 16 * 8 + p // 16
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return m, k, (m < M)[:, None] & (k < K)[None, :]


@triton.jit
def _pack_rows(payload):
    """uint8 [128 rows as `_tile_by_eights` orders them, 128 columns] -> int32 [128 columns, 32]: four rows in a word."""
    bytes_of_words = payload.to(tl.int32).reshape(2, 4, 16, BLOCK)
    shift = (tl.arange(0, 4) * 8)[None, :, None, None]
    # A sum of numbers without common bits is their union.
    return tl.sum(bytes_of_words << shift, 1).permute(2, 1, 0).reshape(BLOCK, 32)


@triton.jit
def _store_columns(x, m, k, xt_q_ptr, xt_dq_ptr, M, K, xt_stride, PADDED: tl.constexpr, POW2: tl.constexpr):
    """Quantise the columns of a tile in the order of `_tile_by_eights` and store them transposed, with their multipliers."""
    dq = block_multiplier(amax_bits(x, 0), POW2)
    payload = quantize(x, dq[None, :], reciprocal(dq)[None, :]).to(tl.uint8, bitcast=True)
    if PADDED:
        # Rows past M are zero, but in a block that holds NaN zero times its multiplier is NaN too.
        payload = tl.where((m < M)[:, None], payload, 0)
    # From the tile's own start, offsets are 32-bit numbers, which take half of the registers.
    stride = xt_stride // 4
    tile_ptr = xt_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (
        tl.program_id(0).to(tl.int64) * BLOCK * stride + tl.program_id(1) * 32
    )
    row, word = tl.arange(0, BLOCK), tl.arange(0, 32)
    inside = (k < K)[:, None] & (word < stride - tl.program_id(1) * 32)[None, :]
    tl.store(tile_ptr + row[:, None] * stride + word[None, :], _pack_rows(payload), mask=inside)
    tl.store(xt_dq_ptr + tl.program_id(1).to(tl.int64) * K + k, dq, mask=k < K)


@triton.jit
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
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
):
    """x [M, K] -> x_q [M, K], x_dq [ceil(K/128), M], xt_q [K, xt_stride] and xt_dq [ceil(M/128), K].

    PADDED: xt_stride > M; columns of xt_q past M become zero. xt_stride is a multiple of 16.
    """
    m, k, mask = _tile_by_eights(M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_rows(x, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2)
    _store_columns(x, m, k, xt_q_ptr, xt_dq_ptr, M, K, xt_stride, PADDED, POW2)


@triton.jit
def _quantize_128x128_kernel(w_ptr, w_q_ptr, w_dq_ptr, N, K, w_stride, POW2: tl.constexpr):
    """w [N, K] -> w_q [N, K] and w_dq [ceil(N/128), ceil(K/128)]."""
    n, k, mask = _tile(N, K)
    w = tl.load(w_ptr + n[:, None] * w_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    dq = block_multiplier(tl.max(amax_bits(w, 1), 0), POW2)
    w_q = quantize(w, dq, reciprocal(dq))
    tl.store(w_q_ptr + n[:, None] * K + k[None, :], w_q, mask=mask)
    tl.store(w_dq_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), dq)


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
    tl.store(w_q_ptr + m[:, None] * K + k[None, :], quantize(w, dq, reciprocal(dq)), mask=mask)


@triton.jit
def _transpose_kernel(x_ptr, xt_ptr, M, K, x_stride, xt_stride):
    """e4m3 x [M, K] -> xt [K, xt_stride >= M], zero past M; moved as bytes."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    xt_ptr = xt_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    m, k, mask = _tile(M, K)
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0)
    xt_ptrs = xt_ptr + k[:, None].to(tl.int64) * xt_stride + m[None, :]
    tl.store(xt_ptrs, tl.trans(x), mask=(k < K)[:, None] & (m < xt_stride)[None, :])
