"""The portable blockwise-scaled GEMM: `tl.dot` on e4m3, for every GPU of compute capability 8.9 and up."""

import triton
import triton.language as tl

from ..formats import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _gemm_kernel(
    a_ptr,
    a_dq_ptr,
    b_ptr,
    b_dq_ptr,
    c_ptr,
    M,
    N,
    K,
    a_stride,
    b_stride,
    a_dq_stride_m,
    a_dq_stride_k,
    b_dq_stride_n,
    b_dq_stride_k,
    B_PER_ROW: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """c [M, N] = a [M, K] b [N, K]^T, each operand e4m3 with row stride `*_stride`.

    a_dq has one multiplier per row and 128 of K; b_dq the same (B_PER_ROW) or one per 128 rows and 128 of K.
    WHOLE_K: K is a multiple of 128.
    """
    tl.static_assert(BLOCK % BLOCK_N == 0, "a tile of b lies within one block of 128 rows")
    # Programs that run together share rows of a and of b in L2: they cover GROUP_M tiles of M before the next tile of N.
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * num_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * num_n)
    start_m = (first_m + within % group_m) * BLOCK_M
    start_n = within // group_m * BLOCK_N

    m = start_m + tl.arange(0, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK)
    # Rows past the edge repeat the last one, so that loads need no mask in M and N; the store has one.
    row_m = tl.minimum(m, M - 1).to(tl.int64)
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    a_ptrs = a_ptr + row_m[:, None] * a_stride + k[None, :]
    b_ptrs = b_ptr + row_n[:, None] * b_stride + k[None, :]
    a_dq_ptrs = a_dq_ptr + row_m * a_dq_stride_m
    b_dq_ptrs = b_dq_ptr + (row_n * b_dq_stride_n if B_PER_ROW else start_n // BLOCK * b_dq_stride_n)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.cdiv(K, BLOCK)):
        if WHOLE_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = (k < K - block * BLOCK)[None, :]
            a = tl.load(a_ptrs, mask=inside, other=0.0)
            b = tl.load(b_ptrs, mask=inside, other=0.0)
        a_dq = tl.load(a_dq_ptrs + block * a_dq_stride_k)
        b_dq = tl.load(b_dq_ptrs + block * b_dq_stride_k)
        # A fresh accumulator for each 128 of K: Hopper's fp8 tensor cores keep about 14 bits of a running sum.
        partial = tl.dot(a, tl.trans(b))
        if B_PER_ROW:
            acc += partial * a_dq[:, None] * b_dq[None, :]
        else:
            acc += partial * (a_dq * b_dq)[:, None]
        a_ptrs += BLOCK
        b_ptrs += BLOCK

    c_ptrs = c_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
