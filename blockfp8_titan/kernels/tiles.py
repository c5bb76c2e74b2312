"""What kernels that quantise share: where a 128x128 tile lies, and how a tile is quantised and stored along rows and columns.

Operands are row-major; row strides are in elements. Rows and columns past the edge load as zero, which no maximum notices.
"""

import triton
import triton.language as tl

from ..formats import BLOCK as _BLOCK
from .convert import pack_e4m3
from .scaling import amax_bits, block_multiplier, quantize, quotient

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def this_tile():
    """The row and column of this program's tile; neighbouring programs walk along a row of tiles."""
    return tl.program_id(1), tl.program_id(0)


@triton.jit
def tile(row, column, M, K):
    """Offsets and mask of a tile of an [M, K] matrix: the one in this row and column of tiles."""
    m = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = column * BLOCK + tl.arange(0, BLOCK)
    return m, k, (m < M)[:, None] & (k < K)[None, :]


@triton.jit
def tile_in_runs(row, column, M, K, RUN: tl.constexpr):
    """As `tile`, with rows in the order 0, RUN, 2 RUN, ..., 1, RUN + 1, ...: any order does, since a tile is one group of rows.

    In the layout that Triton gives a tile whose payload is stored by 16 bytes, a thread then holds runs of neighbouring rows, eight
    with four warps and four with eight, and casts four of a column into a word without leaving its registers. What goes through
    shared memory to be transposed is words, not bytes.
    """
    p = tl.arange(0, BLOCK)
    m = row.to(tl.int64) * BLOCK + p % (BLOCK // RUN) * RUN + p // (BLOCK // RUN)
    k = column * BLOCK + tl.arange(0, BLOCK)
    return m, k, (m < M)[:, None] & (k < K)[None, :]


@triton.jit
def store_rows(x, column, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2: tl.constexpr, BF16: tl.constexpr):
    """Quantise a tile's rows and store payload and multipliers. BF16: x are bf16 in value."""
    dq = block_multiplier(amax_bits(x, 1), POW2)
    tl.store(x_q_ptr + m[:, None] * K + k[None, :], quantize(x, dq[:, None], BF16), mask=mask)
    tl.store(x_dq_ptr + column.to(tl.int64) * M + m, dq, mask=m < M)


@triton.jit
def store_columns(
    x,
    row,
    column,
    m,
    k,
    xt_q_ptr,
    xt_dq_ptr,
    M,
    K,
    xt_stride,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    BF16: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Quantise the columns of a tile in the order of `tile_in_runs` and store them transposed, with their multipliers.

    BF16: x are bf16 in value. SQUARE: the tile has one multiplier, of a matrix [ceil(M/128), ceil(K/128)], and no more.
    """
    amax = amax_bits(x, 0)
    if SQUARE:
        dq = block_multiplier(tl.max(amax, 0), POW2)
        quotients = quotient(x, dq, BF16)
    else:
        dq = block_multiplier(amax, POW2)
        quotients = quotient(x, dq[None, :], BF16)
    store_transposed(quotients, row, column, m, k, xt_q_ptr, M, K, xt_stride, RUN, PADDED)
    if SQUARE:
        tl.store(xt_dq_ptr + row.to(tl.int64) * tl.cdiv(K, BLOCK) + column, dq)
    else:
        tl.store(xt_dq_ptr + row.to(tl.int64) * K + k, dq, mask=k < K)


@triton.jit
def store_transposed(quotients, row, column, m, k, xt_q_ptr, M, K, xt_stride, RUN: tl.constexpr, PADDED: tl.constexpr):
    """Cast a tile's quotients, in the order of `tile_in_runs`, to e4m3 and store them as part of [K, xt_stride].

    PADDED: xt_stride > M; columns past M become zero. xt_stride is a multiple of 16.
    """
    if PADDED:
        # Rows past M are zero, but in a block that holds NaN zero times its multiplier is NaN too.
        quotients = tl.where((m < M)[:, None], quotients, 0.0)
    # From the tile's own start, offsets are 32-bit numbers, which take half of the registers.
    stride = xt_stride // 4
    tile_ptr = xt_q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (column.to(tl.int64) * BLOCK * stride + row * 32)
    at, word = tl.arange(0, BLOCK), tl.arange(0, 32)
    inside = (k < K)[:, None] & (word < stride - row * 32)[None, :]
    tl.store(tile_ptr + at[:, None] * stride + word[None, :], _pack_rows(quotients, RUN), mask=inside)


@triton.jit
def _pack_rows(quotients, RUN: tl.constexpr):
    """fp32 [128 rows as `tile_in_runs` orders them, 128 columns] -> int32 [128 columns, 32]: e4m3 of four rows in a word."""
    runs = quotients.reshape(RUN // 4, 2, 2, BLOCK // RUN, BLOCK).permute(0, 3, 4, 1, 2)
    even, odd = tl.split(runs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return pack_e4m3(first, second, third, fourth).permute(2, 1, 0).reshape(BLOCK, 32)
