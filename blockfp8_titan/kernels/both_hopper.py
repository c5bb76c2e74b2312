"""Kernels for Hopper that quantise along rows and columns, in Gluon: every tile is read once, and stays in shared memory for its columns.

A tile of fp32 in registers, as the portable kernels hold it, leaves room for two or three programs on a multiprocessor, and for none
where several results are computed of one tile. Here what a thread needs at a time is small:

1. A thread has pieces of rows. Eight lanes share a row, so that its maximum is found by shuffles; rows are quantised and stored at
   once. What they were quantised from, in bf16, goes to shared memory.
2. After a barrier a thread reads runs of eight rows of two columns, two runs of which are neighbours. Four lanes share a column, and
   16 rows of a column are 16 bytes of the transposed payload: nothing moves between threads once more.

Neighbouring columns are held as one word of two bf16, and computed with as two tensors, of the even and of the odd ones. M and the
strides are multiples of 16 here, and operands begin at multiples of 16 bytes. A program has eight warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import BLOCK as _BLOCK
from .producers import gate_gradient, swiglu, up_gradient
from .scaling import block_multiplier, quotient

BLOCK = gl.constexpr(_BLOCK)
WORDS = gl.constexpr(_BLOCK // 2)  # of a row of a tile
ROWS = gl.constexpr(32)  # of a piece of a tile
PIECES = gl.constexpr(4)

BY_ROW = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))
BY_RUN = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 8], [0, 1]))
BY_COLUMN = gl.constexpr(gl.BlockedLayout([16, 1], [4, 8], [1, 8], [0, 1]))
# Lanes that share a column read runs of eight rows one after the other: the swizzle sends them to different banks.
SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 8, 4, [1, 0]))


@gluon.jit
def _two_of_bf16(words):
    """int32 words of two bf16 -> the lower and the upper ones as fp32."""
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _two_of_e4m3(words):
    """int16 words of two e4m3 -> the lower and the upper ones as fp32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, c, d;
        .reg .b32 ab, cd;
        mov.b32 {a, b}, $4;
        cvt.rn.f16x2.e4m3x2 ab, a;
        cvt.rn.f16x2.e4m3x2 cd, b;
        mov.b32 {a, b}, ab;
        mov.b32 {c, d}, cd;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, c;
        cvt.f32.f16 $2, b;
        cvt.f32.f16 $3, d;
        }""",
        "=&f,=&f,=&f,=f,r",
        [words],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _bf16_words(even, odd):
    """Two fp32 -> words of their bf16, rounded to nearest, as int32."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _e4m3_words(even, odd):
    """Two fp32 -> words of their e4m3, as int16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        cvt.rn.satfinite.e4m3x2.f32 a, $3, $1;
        cvt.rn.satfinite.e4m3x2.f32 b, $4, $2;
        mov.b32 $0, {a, b};
        }""",
        "=r,f,f,f,f",
        [even, odd],
        dtype=gl.int16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _e4m3_of_rows(x):
    """fp32 -> e4m3, where four neighbouring rows are a thread's."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b;
        cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
        mov.b32 $0, {a, b};
        }""",
        "=r,f,f,f,f",
        [x],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _larger_of_bf16(a, b):
    """Words of the larger magnitudes of two bf16, NaN if one is; their signs are of no meaning."""
    return gl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _store_columns(x, dq, q_ptr, m, k, M, mask):
    """Quantise every second column and store it transposed."""
    q = _e4m3_of_rows(quotient(x, dq, True))
    # From the order of `_rows_of` to that of the matrix, in which a thread has 16 rows after each other.
    q = q.reshape((2, 2, 4, 8, WORDS)).permute((0, 2, 1, 3, 4)).reshape((BLOCK, WORDS))
    gl.store(q_ptr + k[None, :] * M + m[:, None], gl.convert_layout(q, BY_COLUMN, assert_trivial=True), mask=mask)


@gluon.jit
def _store_tile_columns(buf, q_ptr, dq_ptr, row, column, M, K, POW2: gl.constexpr, SQUARE: gl.constexpr):
    """Quantise the columns of a tile in shared memory and store them transposed, with their multipliers: one if SQUARE."""
    rows, columns = M - row * BLOCK, K - column * BLOCK
    m = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, BY_COLUMN))
    k = 2 * gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_COLUMN))
    k_dq = 2 * gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_RUN))
    mask = (m < rows)[:, None] & (k < columns)[None, :]
    q_ptr += (column * BLOCK).to(gl.int64) * M + row * BLOCK
    words = buf.load(BY_RUN)
    largest = gl.reduce(words, 0, _larger_of_bf16)
    even, odd = _two_of_bf16(words)
    if SQUARE:
        largest = gl.reduce(largest, 0, _larger_of_bf16)
        dq = block_multiplier(gl.maximum(largest << 16 & 0x7FFFFFFF, largest & 0x7FFF0000), POW2)
        gl.store(dq_ptr + (row.to(gl.int64) * gl.cdiv(K, BLOCK) + column), dq)
        _store_columns(even, dq, q_ptr, m, k, M, mask)
        _store_columns(odd, dq, q_ptr + M, m, k, M, mask)
    else:
        dq_ptrs = dq_ptr + (row.to(gl.int64) * K + column * BLOCK) + k_dq
        dq = block_multiplier(largest << 16 & 0x7FFFFFFF, POW2)
        _store_columns(even, dq[None, :], q_ptr, m, k, M, mask)
        gl.store(dq_ptrs, dq, mask=k_dq < columns)
        dq = block_multiplier(largest & 0x7FFF0000, POW2)
        _store_columns(odd, dq[None, :], q_ptr + M, m, k, M, mask)
        gl.store(dq_ptrs + 1, dq, mask=k_dq < columns)


@gluon.jit
def _rows_of(i):
    """The rows of piece i of a tile: four runs of eight, one of each of the four lanes that will share a column."""
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
    return i // 2 * 64 + i % 2 * 8 + r // 8 * 16 + r % 8


@gluon.jit
def _words():
    return gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_ROW))


@gluon.jit
def _inside(m, row, column, M, K):
    """Which rows m of a tile there are, and which of their words."""
    in_rows = m < M - row * BLOCK
    return in_rows, in_rows[:, None] & (_words() < (K - column * BLOCK) // 2)[None, :]


@gluon.jit
def _first_word(ptr, dtype: gl.constexpr, row, column, stride):
    """Of a tile. From there, offsets are 32-bit numbers, which take half of the registers."""
    start = (row * BLOCK).to(gl.int64) * (stride // 2) + column * WORDS
    return ptr.to(gl.pointer_type(dtype), bitcast=True) + start


@gluon.jit
def _load(ptr, m, stride, mask):
    return gl.load(ptr + m[:, None] * (stride // 2) + _words()[None, :], mask=mask, other=0)


@gluon.jit
def _store_rows(words, q_ptr, dq_ptr, m, K, in_rows, mask, POW2: gl.constexpr):
    """Quantise rows m of a tile, words of bf16, and store payload and multipliers. Pointers are to the tile's first ones."""
    largest = gl.reduce(words, 1, _larger_of_bf16)
    dq = block_multiplier(gl.maximum(largest << 16 & 0x7FFFFFFF, largest & 0x7FFF0000), POW2)
    even, odd = _two_of_bf16(words)
    q = _e4m3_words(quotient(even, dq[:, None], True), quotient(odd, dq[:, None], True))
    gl.store(q_ptr + m[:, None] * (K // 2) + _words()[None, :], q, mask=mask)
    gl.store(dq_ptr + m, dq, mask=in_rows)


@gluon.jit
def _quantize_1x128_both_kernel(x_ptr, x_q_ptr, x_dq_ptr, xt_q_ptr, xt_dq_ptr, M, K, x_stride, POW2: gl.constexpr):
    """As `quantize._quantize_1x128_both_kernel`, for bf16 x."""
    buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    row, column = gl.program_id(1), gl.program_id(0)
    x_ptr = _first_word(x_ptr, gl.int32, row, column, x_stride)
    q_ptr = _first_word(x_q_ptr, gl.int16, row, column, K)
    dq_ptr = x_dq_ptr + (column.to(gl.int64) * M + row * BLOCK)
    _, mask = _inside(_rows_of(0), row, column, M, K)
    following = _load(x_ptr, _rows_of(0), x_stride, mask)
    for i in gl.static_range(PIECES):
        words = following
        if i + 1 < PIECES:
            # One piece ahead: its loads run while this one is quantised.
            _, mask = _inside(_rows_of(i + 1), row, column, M, K)
            following = _load(x_ptr, _rows_of(i + 1), x_stride, mask)
        buf.slice(i * ROWS, ROWS).store(words)
        m = _rows_of(i)
        in_rows, mask = _inside(m, row, column, M, K)
        _store_rows(words, q_ptr, dq_ptr, m, K, in_rows, mask, POW2)
    _store_tile_columns(buf, xt_q_ptr, xt_dq_ptr, row, column, M, K, POW2, False)


@gluon.jit
def _values(words, dq):
    """Words of bf16, or of e4m3 with multipliers, as two fp32."""
    if words.dtype == gl.int16:
        even, odd = _two_of_e4m3(words)
    else:
        even, odd = _two_of_bf16(words)
    return even * dq, odd * dq


@gluon.jit
def _load_inputs(
    i, dh_ptr, gate_ptr, gate_dq_ptr, up_ptr, up_dq_ptr, row, column, M, K, dh_stride, gate_stride, up_stride, PAYLOADS: gl.constexpr
):  # fmt: skip
    """Words of piece i of a tile, and what those of gate and up are to be multiplied with. Pointers are to the tile's first ones."""
    m = _rows_of(i)
    in_rows, mask = _inside(m, row, column, M, K)
    dh = _load(dh_ptr, m, dh_stride, mask)
    gate = _load(gate_ptr, m, gate_stride, mask)
    up = _load(up_ptr, m, up_stride, mask)
    if PAYLOADS:
        gate_dq = gl.load(gate_dq_ptr + m, mask=in_rows, other=0.0)[:, None]
        up_dq = gl.load(up_dq_ptr + m, mask=in_rows, other=0.0)[:, None]
    else:
        gate_dq = 1.0
        up_dq = 1.0
    return dh, gate, gate_dq, up, up_dq


@gluon.jit
def _quantize_swiglu_gradients_kernel(
    dh_ptr,
    gate_ptr,
    gate_dq_ptr,
    up_ptr,
    up_dq_ptr,
    dgate_q_ptr,
    dgate_dq_ptr,
    dgatet_q_ptr,
    dgatet_dq_ptr,
    dup_q_ptr,
    dup_dq_ptr,
    dupt_q_ptr,
    dupt_dq_ptr,
    ht_q_ptr,
    ht_dq_ptr,
    M,
    K,
    dh_stride,
    gate_stride,
    up_stride,
    WITH_H: gl.constexpr,
    POW2: gl.constexpr,
    SQUARE: gl.constexpr,
):
    """As `producers._quantize_swiglu_gradients_kernel`, for bf16 dh."""
    PAYLOADS: gl.constexpr = gate_ptr.dtype.element_ty == gl.float8e4nv
    PER_WORD: gl.constexpr = gl.int16 if PAYLOADS else gl.int32  # two values of gate or up
    # Allocations of their own: between stores to one and the same, Triton has the warps wait for each other.
    dgate_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    dup_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    if WITH_H:
        h_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    row, column = gl.program_id(1), gl.program_id(0)
    dh_ptr = _first_word(dh_ptr, gl.int32, row, column, dh_stride)
    gate_ptr = _first_word(gate_ptr, PER_WORD, row, column, gate_stride)
    up_ptr = _first_word(up_ptr, PER_WORD, row, column, up_stride)
    start_dq = column.to(gl.int64) * M + row * BLOCK
    gate_dq_ptr += start_dq
    up_dq_ptr += start_dq
    dgate_q_ptr = _first_word(dgate_q_ptr, gl.int16, row, column, K)
    dup_q_ptr = _first_word(dup_q_ptr, gl.int16, row, column, K)
    following = _load_inputs(
        0, dh_ptr, gate_ptr, gate_dq_ptr, up_ptr, up_dq_ptr, row, column, M, K, dh_stride, gate_stride, up_stride, PAYLOADS
    )  # fmt: skip
    for i in gl.static_range(PIECES):
        dh_words, gate_words, gate_dq, up_words, up_dq = following
        if i + 1 < PIECES:
            # One piece ahead: its loads run while this one is computed with.
            following = _load_inputs(
                i + 1, dh_ptr, gate_ptr, gate_dq_ptr, up_ptr, up_dq_ptr, row, column, M, K, dh_stride, gate_stride, up_stride,
                PAYLOADS,
            )  # fmt: skip
        dh_even, dh_odd = _two_of_bf16(dh_words)
        gate_even, gate_odd = _values(gate_words, gate_dq)
        up_even, up_odd = _values(up_words, up_dq)
        dgate = _bf16_words(gate_gradient(dh_even, gate_even, up_even), gate_gradient(dh_odd, gate_odd, up_odd))
        dup = _bf16_words(up_gradient(dh_even, gate_even), up_gradient(dh_odd, gate_odd))
        dgate_buf.slice(i * ROWS, ROWS).store(dgate)
        dup_buf.slice(i * ROWS, ROWS).store(dup)
        if WITH_H:
            h = _bf16_words(swiglu(gate_even, up_even), swiglu(gate_odd, up_odd))
            h_buf.slice(i * ROWS, ROWS).store(h)
        m = _rows_of(i)
        in_rows, mask = _inside(m, row, column, M, K)
        _store_rows(dgate, dgate_q_ptr, dgate_dq_ptr + start_dq, m, K, in_rows, mask, POW2)
        _store_rows(dup, dup_q_ptr, dup_dq_ptr + start_dq, m, K, in_rows, mask, POW2)
    _store_tile_columns(dgate_buf, dgatet_q_ptr, dgatet_dq_ptr, row, column, M, K, POW2, False)
    _store_tile_columns(dup_buf, dupt_q_ptr, dupt_dq_ptr, row, column, M, K, POW2, False)
    if WITH_H:
        _store_tile_columns(h_buf, ht_q_ptr, ht_dq_ptr, row, column, M, K, POW2, SQUARE)
