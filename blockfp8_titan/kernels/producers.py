"""Kernels that compute what is then quantised: RMSNorm, SwiGLU and its gradients. The result itself is never written.

It is computed in fp32 and rounded once to its inputs' dtype, so that what is quantised is what an unfused kernel would have written.
ROWS and COLUMNS say which layouts are stored; pointers of the other are not used. SQUARE: columns are quantised in blocks of 128x128.
Names and layouts as in `quantize` and `tiles`.
"""

import triton
import triton.language as tl

from .convert import round_to_bf16, to_fp32
from .scaling import amax_bits, block_multiplier, quantize
from .tiles import BLOCK, store_columns, store_rows, this_tile, tile_in_runs

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _root_of_sigmoid(x):
    """The square root of 1 / (1 + exp(-x)) in fp32, to a few units in the last place.

    A root and a product are three instructions fewer than `/`, which guards against divisors that do not occur here.
    """
    return tl.rsqrt(1.0 + tl.exp2(x * MINUS_LOG2_E))


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up, all fp32."""
    root = _root_of_sigmoid(gate)
    return gate * (root * root) * up


@triton.jit
def gate_gradient(dh, gate, up):
    """The gradient of gate, all fp32."""
    root = _root_of_sigmoid(gate)
    sigmoid = root * root
    slope = tl.fma(gate * sigmoid, tl.fma(root * -1.0, root, 1.0), sigmoid)  # of silu: sigmoid + silu (1 - sigmoid)
    return dh * (up * slope)


@triton.jit
def up_gradient(dh, gate):
    """The gradient of up, all fp32."""
    root = _root_of_sigmoid(gate)
    return dh * (gate * (root * root))


@triton.jit
def _round_to(x, ptr):
    """x, fp32, rounded to the dtype that ptr points to, as fp32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return round_to_bf16(x)
    else:  # needed: Triton would compile the return after the branch too
        return x


@triton.jit
def _load_tile(x_ptr, row, m, k, stride, mask):
    """A tile in the order of `tile_in_runs`. From its first row on, offsets are 32-bit numbers, which take half of the registers; stride
    is at most 2^24."""
    first = row.to(tl.int64) * BLOCK
    offsets = (m - first).to(tl.int32)[:, None] * stride + k[None, :]
    return tl.load(x_ptr + first * stride + offsets, mask=mask, other=0.0)


@triton.jit
def _values(x, x_dq_ptr, column, m, M):
    """A tile as fp32: of bf16, of fp32 or, with multipliers, of a payload quantised along rows."""
    if x.dtype == tl.float8e4nv:
        dq = tl.load(x_dq_ptr + column.to(tl.int64) * M + m, mask=m < M, other=0.0)
        return x.to(tl.float32) * dq[:, None]
    else:  # needed: Triton would compile the return after the branch too
        return to_fp32(x)


@triton.jit
def _store(
    y,
    row,
    column,
    m,
    k,
    mask,
    y_q_ptr,
    y_dq_ptr,
    yt_q_ptr,
    yt_dq_ptr,
    M,
    K,
    yt_stride,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    BF16: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """Quantise a tile in the order of `tile_in_runs`, and store it in the layouts asked for. BF16: y are bf16 in value."""
    if ROWS:
        store_rows(y, column, m, k, mask, y_q_ptr, y_dq_ptr, M, K, POW2, BF16)
    if COLUMNS:
        store_columns(y, row, column, m, k, yt_q_ptr, yt_dq_ptr, M, K, yt_stride, RUN, PADDED, POW2, BF16, SQUARE)


@triton.jit(do_not_specialize=["M"])  # see pack_e4m3
def _quantize_swiglu_kernel(
    gate_ptr,
    up_ptr,
    h_q_ptr,
    h_dq_ptr,
    ht_q_ptr,
    ht_dq_ptr,
    M,
    K,
    gate_stride,
    up_stride,
    ht_stride,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """gate, up [M, K] -> h = silu(gate) * up, quantised."""
    BF16: tl.constexpr = gate_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    m, k, mask = tile_in_runs(row, column, M, K, RUN)
    gate = _load_tile(gate_ptr, row, m, k, gate_stride, mask).to(tl.float32)
    up = _load_tile(up_ptr, row, m, k, up_stride, mask).to(tl.float32)
    h = _round_to(swiglu(gate, up), gate_ptr)
    _store(
        h, row, column, m, k, mask, h_q_ptr, h_dq_ptr, ht_q_ptr, ht_dq_ptr, M, K, ht_stride, RUN, ROWS, COLUMNS, PADDED, POW2, BF16, SQUARE
    )  # fmt: skip


@triton.jit
def _quantize_swiglu_rows_kernel(
    gate_ptr,
    up_ptr,
    h_q_ptr,
    h_dq_ptr,
    gate_q_ptr,
    gate_dq_ptr,
    up_q_ptr,
    up_dq_ptr,
    M,
    K,
    gate_stride,
    up_stride,
    WITH_INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    POW2: tl.constexpr,
):
    """gate, up [M, K] -> h = silu(gate) * up, quantised along rows; gate and up too if WITH_INPUTS.

    A program has BLOCK_M rows of a group of columns: rows alone need no whole tile, and the fewer registers a program takes, the more
    run at a time. Neighbouring programs walk along rows.
    """
    BF16: tl.constexpr = gate_ptr.dtype.element_ty == tl.bfloat16
    groups = tl.cdiv(K, BLOCK)
    group = tl.program_id(0) % groups
    m = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = group * BLOCK + tl.arange(0, BLOCK)
    mask = (m < M)[:, None] & (k < K)[None, :]
    gate = to_fp32(tl.load(gate_ptr + m[:, None] * gate_stride + k[None, :], mask=mask, other=0.0))
    up = to_fp32(tl.load(up_ptr + m[:, None] * up_stride + k[None, :], mask=mask, other=0.0))
    h = _round_to(swiglu(gate, up), gate_ptr)
    store_rows(h, group, m, k, mask, h_q_ptr, h_dq_ptr, M, K, POW2, BF16)
    if WITH_INPUTS:
        store_rows(gate, group, m, k, mask, gate_q_ptr, gate_dq_ptr, M, K, POW2, BF16)
        store_rows(up, group, m, k, mask, up_q_ptr, up_dq_ptr, M, K, POW2, BF16)


@triton.jit(do_not_specialize=["M"])  # see pack_e4m3
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
    xt_stride,
    WITH_H: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """dh, gate, up [M, K] -> the gradients of gate and up, quantised along rows and columns, and h along columns, if SQUARE in
    blocks, if WITH_H.

    A program has a tile of one of them: with more it would need more registers than leave room for a second program. Its
    neighbours have the same tile of the others, and find what all read in L2. Multipliers of gate and up are used where these are
    payloads. xt_stride is that of all transposes.
    """
    RESULTS: tl.constexpr = 3 if WITH_H else 2
    BF16: tl.constexpr = dh_ptr.dtype.element_ty == tl.bfloat16
    row, column = tl.program_id(1), tl.program_id(0) // RESULTS
    result = tl.program_id(0) % RESULTS
    m, k, mask = tile_in_runs(row, column, M, K, RUN)
    # gate is loaded in each branch: where it is before them, the code of Triton 3.9 spills.
    if result < 2:
        dh = _load_tile(dh_ptr, row, m, k, dh_stride, mask)
        gate = _load_tile(gate_ptr, row, m, k, gate_stride, mask)
        if result == 0:
            up = _load_tile(up_ptr, row, m, k, up_stride, mask)
            x_q_ptr, x_dq_ptr, xt_q_ptr, xt_dq_ptr = dgate_q_ptr, dgate_dq_ptr, dgatet_q_ptr, dgatet_dq_ptr
            dx = gate_gradient(
                to_fp32(dh), _values(gate, gate_dq_ptr, column, m, M), _values(up, up_dq_ptr, column, m, M)
            )
            dx = _round_to(dx, dh_ptr)
        else:
            x_q_ptr, x_dq_ptr, xt_q_ptr, xt_dq_ptr = dup_q_ptr, dup_dq_ptr, dupt_q_ptr, dupt_dq_ptr
            dx = _round_to(up_gradient(to_fp32(dh), _values(gate, gate_dq_ptr, column, m, M)), dh_ptr)
        store_rows(dx, column, m, k, mask, x_q_ptr, x_dq_ptr, M, K, POW2, BF16)
        store_columns(dx, row, column, m, k, xt_q_ptr, xt_dq_ptr, M, K, xt_stride, RUN, PADDED, POW2, BF16, False)
    else:
        gate = _load_tile(gate_ptr, row, m, k, gate_stride, mask)
        up = _load_tile(up_ptr, row, m, k, up_stride, mask)
        h = swiglu(_values(gate, gate_dq_ptr, column, m, M), _values(up, up_dq_ptr, column, m, M))
        h = _round_to(h, dh_ptr)
        store_columns(h, row, column, m, k, ht_q_ptr, ht_dq_ptr, M, K, xt_stride, RUN, PADDED, POW2, BF16, SQUARE)


@triton.jit
def normalise(x, rstd, weight):
    """x * rstd * weight, all fp32, in the order of the PyTorch twin: no rounding differs."""
    return x * rstd * weight


@triton.jit
def _quantize_rms_norm_rows_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    y_q_ptr,
    y_dq_ptr,
    M,
    K,
    x_stride,
    eps,
    POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K], weight [K] -> rstd [M]; y = x * rstd * weight, quantised along rows. A program has whole rows: BLOCK_K >= K."""
    GROUPS: tl.constexpr = BLOCK_K // BLOCK
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / K + eps)
    tl.store(rstd_ptr + m, rstd, mask=m < M)
    y = _round_to(normalise(x, rstd[:, None], weight[None, :]), x_ptr)
    groups = y.reshape(BLOCK_M, GROUPS, BLOCK)
    dq = block_multiplier(amax_bits(groups, 2), POW2)
    y_q = quantize(groups, dq[:, :, None], BF16).reshape(BLOCK_M, BLOCK_K)
    tl.store(y_q_ptr + m[:, None] * K + k[None, :], y_q, mask=mask)
    group = tl.arange(0, GROUPS)
    in_matrix = (m < M)[:, None] & (group * BLOCK < K)[None, :]
    tl.store(y_dq_ptr + group[None, :].to(tl.int64) * M + m[:, None], dq, mask=in_matrix)


@triton.jit
def _rms_norm_rstd_kernel(x_ptr, rstd_ptr, M, K, x_stride, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [M, K] -> rstd [M] = rsqrt(mean(x^2) + eps), fp32."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(rstd_ptr + m, tl.rsqrt(tl.sum(squares, 1) / K + eps), mask=m < M)


@triton.jit(do_not_specialize=["M"])  # see pack_e4m3
def _quantize_rms_norm_kernel(
    x_ptr,
    weight_ptr,
    rstd_ptr,
    y_q_ptr,
    y_dq_ptr,
    yt_q_ptr,
    yt_dq_ptr,
    M,
    K,
    x_stride,
    yt_stride,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    POW2: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """x [M, K], weight [K], rstd [M] -> y = x * rstd * weight, quantised."""
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    row, column = this_tile()
    m, k, mask = tile_in_runs(row, column, M, K, RUN)
    x = to_fp32(_load_tile(x_ptr, row, m, k, x_stride, mask))
    rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    y = _round_to(normalise(x, rstd[:, None], weight[None, :]), x_ptr)
    _store(
        y, row, column, m, k, mask, y_q_ptr, y_dq_ptr, yt_q_ptr, yt_dq_ptr, M, K, yt_stride, RUN, ROWS, COLUMNS, PADDED, POW2, BF16, SQUARE
    )  # fmt: skip
