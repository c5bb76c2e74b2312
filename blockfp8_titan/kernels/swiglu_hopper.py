"""SwiGLU's gradients for Hopper, in Gluon: every tile is read once, and both layouts of all results come of that.

The portable kernel has a program for each result, because a tile of all of them takes more registers than leave room for a second
program. Here results wait in shared memory, rounded to bf16 as they are anyway, and what a thread needs at a time is small:

1. A thread computes pieces of rows. Eight lanes share a row, so that its maximum is found by shuffles; rows are quantised and
   stored at once. What they were quantised from goes to shared memory.
2. After the one barrier a thread reads runs of 16 rows of two columns. Four lanes share a column, and 16 rows of a column are 16
   bytes of the transposed payload: nothing moves between threads once more.

Neighbouring columns are held as one word of two bf16, and computed with as two tensors, of the even and of the odd ones.
"""

# Device code is compiled from a subset of Python: no starred tuples, and a constexpr condition needs a statement.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import BLOCK as _BLOCK
from .producers import gate_gradient, swiglu, up_gradient
from .scaling import block_multiplier, quotient

BLOCK = gl.constexpr(_BLOCK)
WORDS = gl.constexpr(_BLOCK // 2)


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
def _load_piece(
    dh_ptr, gate_ptr, gate_dq_ptr, up_ptr, up_dq_ptr, m, w, dh_stride, gate_stride, up_stride, in_rows, mask, PAYLOADS: gl.constexpr
):  # fmt: skip
    """Words of rows m of a tile, and what those of gate and up are to be multiplied with. Strides are in words."""
    dh = gl.load(dh_ptr + m[:, None] * dh_stride + w[None, :], mask=mask, other=0)
    gate = gl.load(gate_ptr + m[:, None] * gate_stride + w[None, :], mask=mask, other=0)
    up = gl.load(up_ptr + m[:, None] * up_stride + w[None, :], mask=mask, other=0)
    if PAYLOADS:
        gate_dq = gl.load(gate_dq_ptr + m, mask=in_rows, other=0.0)[:, None]
        up_dq = gl.load(up_dq_ptr + m, mask=in_rows, other=0.0)[:, None]
    else:
        gate_dq = 1.0
        up_dq = 1.0
    return dh, gate, gate_dq, up, up_dq


@gluon.jit
def _values(words, dq):
    """Words of bf16, or of e4m3 with multipliers, as two fp32."""
    if words.dtype == gl.int16:
        even, odd = _two_of_e4m3(words)
    else:
        even, odd = _two_of_bf16(words)
    return even * dq, odd * dq


@gluon.jit
def _store_rows(words, q_ptr, dq_ptr, row_q, m, w, K, in_rows, mask, POW2: gl.constexpr):
    """Quantise rows of words of bf16 and store payload and multipliers."""
    largest = gl.reduce(words, 1, _larger_of_bf16)
    dq = block_multiplier(gl.maximum(largest << 16 & 0x7FFFFFFF, largest & 0x7FFF0000), POW2)
    even, odd = _two_of_bf16(words)
    q = _e4m3_words(quotient(even, dq[:, None], True), quotient(odd, dq[:, None], True))
    start = q_ptr.to(gl.pointer_type(gl.int16), bitcast=True) + row_q
    gl.store(start + m[:, None] * (K // 2) + w[None, :], q, mask=mask)
    gl.store(dq_ptr + m, dq, mask=in_rows)


@gluon.jit
def _store_columns(x, amax_bits, q_ptr, dq_ptrs, m, k, M, in_columns, mask, POW2: gl.constexpr):
    """Quantise every second column and store it transposed, with its multipliers."""
    dq = block_multiplier(amax_bits, POW2)
    q = _e4m3_of_rows(quotient(x, dq[None, :], True))
    q = q.reshape((2, 2, 4, 8, WORDS)).permute((0, 2, 1, 3, 4)).reshape((BLOCK, WORDS))
    q = gl.convert_layout(q, m.type.layout.parent, assert_trivial=True)
    gl.store(q_ptr + k[None, :] * M + m[:, None], q, mask=mask)
    gl.store(dq_ptrs, dq, mask=in_columns)


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
):
    """As `producers._quantize_swiglu_gradients_kernel`, for bf16 dh, M a multiple of 16 and rows at multiples of 16 bytes."""
    RESULTS: gl.constexpr = 3 if WITH_H else 2
    PAYLOADS: gl.constexpr = gate_ptr.dtype.element_ty == gl.float8e4nv
    PER_WORD: gl.constexpr = gl.int16 if PAYLOADS else gl.int32  # two values of gate or up
    ROWS: gl.constexpr = 32  # of a piece of the tile
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    BY_RUN: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 8], [0, 1])
    BY_COLUMN: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [1, 8], [0, 1])
    # Lanes that share a column read runs of eight rows one after the other: the swizzle sends them to different banks.
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 8, 4, [1, 0])
    # Allocations of their own: between stores to one and the same, Triton has the warps wait for each other.
    dgate_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    dup_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)
    if WITH_H:
        h_buf = gl.allocate_shared_memory(gl.int32, [BLOCK, WORDS], SHARED)

    column = gl.program_id(0)
    start = gl.program_id(1).to(gl.int64) * BLOCK
    rows = M - start.to(gl.int32)
    columns = K - column * BLOCK
    # From a tile's own start, offsets are 32-bit numbers, which take half of the registers.
    dh_ptr = dh_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (start * (dh_stride // 2) + column * WORDS)
    gate_ptr = gate_ptr.to(gl.pointer_type(PER_WORD), bitcast=True) + (start * (gate_stride // 2) + column * WORDS)
    up_ptr = up_ptr.to(gl.pointer_type(PER_WORD), bitcast=True) + (start * (up_stride // 2) + column * WORDS)
    row_q = start * (K // 2) + column * WORDS
    row_dq = column.to(gl.int64) * M + start

    w = gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_ROW))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
    # Four runs of eight rows, one of each of the four lanes that will share a column.
    m_next = r // 8 * 16 + r % 8
    in_rows_next = m_next < rows
    mask_next = in_rows_next[:, None] & (w < columns // 2)[None, :]
    piece_next = _load_piece(
        dh_ptr, gate_ptr, gate_dq_ptr + row_dq, up_ptr, up_dq_ptr + row_dq, m_next, w, dh_stride // 2, gate_stride // 2,
        up_stride // 2, in_rows_next, mask_next, PAYLOADS,
    )  # fmt: skip
    for i in gl.static_range(BLOCK // ROWS):
        m, in_rows, mask, piece = m_next, in_rows_next, mask_next, piece_next
        if i + 1 < BLOCK // ROWS:
            # One piece ahead: its loads run while this one is computed with.
            m_next = (i + 1) // 2 * 64 + (i + 1) % 2 * 8 + r // 8 * 16 + r % 8
            in_rows_next = m_next < rows
            mask_next = in_rows_next[:, None] & (w < columns // 2)[None, :]
            piece_next = _load_piece(
                dh_ptr, gate_ptr, gate_dq_ptr + row_dq, up_ptr, up_dq_ptr + row_dq, m_next, w, dh_stride // 2, gate_stride // 2,
                up_stride // 2, in_rows_next, mask_next, PAYLOADS,
            )  # fmt: skip
        dh_words, gate_words, gate_dq, up_words, up_dq = piece
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
        _store_rows(dgate, dgate_q_ptr, dgate_dq_ptr + row_dq, row_q, m, w, K, in_rows, mask, POW2)
        _store_rows(dup, dup_q_ptr, dup_dq_ptr + row_dq, row_q, m, w, K, in_rows, mask, POW2)

    m = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, BY_COLUMN))
    k = 2 * gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_COLUMN))
    k_dq = 2 * gl.arange(0, WORDS, layout=gl.SliceLayout(0, BY_RUN))
    in_columns = k_dq < columns
    mask = (m < rows)[:, None] & (k < columns)[None, :]
    column_q = (column * BLOCK).to(gl.int64) * M + start
    column_dq = gl.program_id(1).to(gl.int64) * K + column * BLOCK
    for i in gl.static_range(RESULTS):
        if i == 0:
            buf, q_ptr, dq_ptr = dgate_buf, dgatet_q_ptr, dgatet_dq_ptr
        elif i == 1:
            buf, q_ptr, dq_ptr = dup_buf, dupt_q_ptr, dupt_dq_ptr
        else:
            buf, q_ptr, dq_ptr = h_buf, ht_q_ptr, ht_dq_ptr
        words = buf.load(BY_RUN)
        largest = gl.reduce(words, 0, _larger_of_bf16)
        even, odd = _two_of_bf16(words)
        q_ptr += column_q
        dq_ptrs = dq_ptr + column_dq + k_dq
        _store_columns(even, largest << 16 & 0x7FFFFFFF, q_ptr, dq_ptrs, m, k, M, in_columns, mask, POW2)
        _store_columns(odd, largest & 0x7FFF0000, q_ptr + M, dq_ptrs + 1, m, k, M, in_columns, mask, POW2)
