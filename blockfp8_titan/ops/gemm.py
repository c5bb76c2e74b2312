"""Blockwise-scaled GEMMs: checks, backend choice, launch.

Named by the granularity of a and of b: y and dx are 1x128 times 128x128, dw is 1x128 times 1x128 or, of x
in blocks, also times 128x128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..formats import ALIGNMENT, BLOCK, ceil_div
from ..recipe import GemmBackend
from .backend import GemmKind, ResolvedBackend, is_datacenter, is_hopper, multiprocessors, resolve_gemm_backend
from .layouts import column_major
from .library import FLOATS, check_matrix, define, kernels, launch, on_device_of

_PAYLOADS, _MULTIPLIERS = (torch.float8_e4m3fn,), (torch.float32,)


def gemm_1x128_128x128(
    a_q: Tensor,
    a_dq: Tensor,
    b_q: Tensor,
    b_dq: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: GemmBackend = "auto",
    recomputed: bool = False,
) -> Tensor:
    """a b^T, accumulated in fp32 with one promotion per 128 of K.

    a ~= a_q * a_dq[:, k // 128];  b ~= b_q * b_dq[n // 128, k // 128]

    Args:
        a_q:  [M, K] float8_e4m3fn, rows contiguous.
        a_dq: [M, ceil(K/128)] fp32, M-contiguous.
        b_q:  [N, K] float8_e4m3fn, rows contiguous.
        b_dq: [ceil(N/128), ceil(K/128)] fp32.
        out_dtype: bf16 or fp32.
        backend: who multiplies, see `Recipe.gemm_backend`.
        recomputed: calls the op's overload of that name. It computes the same; selective activation checkpointing, which decides
            by overload, can save the results of the one and recompute those of the other.
    Returns:
        [M, N] in out_dtype, row-major.
    Raises:
        ValueError: names the argument, its value and the requirement; or the backend, and why it cannot run here.
    """
    _check(a_q, a_dq, b_q, b_dq, ceil_div(b_q.shape[0], BLOCK), out_dtype)
    op = torch.ops.blockfp8.gemm_1x128_128x128
    return (op.recomputed if recomputed else op.default)(a_q, a_dq, b_q, b_dq, out_dtype, backend)


def gemm_1x128_1x128(
    a_q: Tensor,
    a_dq: Tensor,
    b_q: Tensor,
    b_dq: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: GemmBackend = "auto",
) -> Tensor:
    """a b^T, accumulated in fp32 with one promotion per 128 of K.

    a ~= a_q * a_dq[:, k // 128];  b ~= b_q * b_dq[:, k // 128]

    Args:
        a_q:  [M, K] float8_e4m3fn, rows contiguous.
        a_dq: [M, ceil(K/128)] fp32, M-contiguous.
        b_q:  [N, K] float8_e4m3fn, rows contiguous.
        b_dq: [N, ceil(K/128)] fp32, N-contiguous.
        out_dtype: bf16 or fp32.
        backend: who multiplies, see `Recipe.gemm_backend`.
    Returns:
        [M, N] in out_dtype, row-major.
    Raises:
        ValueError: names the argument, its value and the requirement; or the backend, and why it cannot run here.
    """
    _check(a_q, a_dq, b_q, b_dq, b_q.shape[0], out_dtype)
    return torch.ops.blockfp8.gemm_1x128_1x128.default(a_q, a_dq, b_q, b_dq, out_dtype, backend)


def _check(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, b_dq_rows: int, out_dtype: torch.dtype) -> None:
    check_matrix("a_q", a_q, _PAYLOADS)
    check_matrix("b_q", b_q, _PAYLOADS)
    check_matrix("a_dq", a_dq, _MULTIPLIERS)
    check_matrix("b_dq", b_dq, _MULTIPLIERS)
    M, K = a_q.shape
    for name, q in (("a_q", a_q), ("b_q", b_q)):
        if q.stride()[1] != 1 and q.shape[1] > 1:
            raise ValueError(
                f"{name} has strides {tuple(q.stride())}: rows must be contiguous; call contiguous() on it"
            )
    if b_q.shape[1] != K:
        raise ValueError(
            f"a_q has shape {tuple(a_q.shape)} and b_q {tuple(b_q.shape)}: their second dimensions, K, must agree"
        )
    blocks = ceil_div(K, BLOCK)
    for name, dq, rows in (("a_dq", a_dq, M), ("b_dq", b_dq, b_dq_rows)):
        dq_rows, dq_blocks = dq.shape
        if dq_rows != rows or dq_blocks != blocks:
            raise ValueError(f"{name} has shape {tuple(dq.shape)}: must be {(rows, blocks)} for its payload")
    device = a_q.device
    for name, tensor in (("a_dq", a_dq), ("b_q", b_q), ("b_dq", b_dq)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and a_q on {device}: must be on one device")
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype = {out_dtype}: must be torch.bfloat16 or torch.float32")


def _cublas_misfit(a_q: Tensor, b_q: Tensor) -> str | None:
    """Why cuBLASLt does not take these shapes (tried with CUDA 13.0 on an H100); None where it does."""
    (M, K), N = a_q.shape, b_q.shape[0]
    for name, size, unit in (("M", M, 4), ("N", N, ALIGNMENT), ("K", K, ALIGNMENT)):
        if size == 0 or size % unit:
            return f"{name} = {size} is not a positive multiple of {unit}"
    return None


def _choose(a_q: Tensor, b_q: Tensor, backend: GemmBackend, kind: GemmKind) -> ResolvedBackend:
    chosen = resolve_gemm_backend(backend, a_q.device, kind)
    if chosen == "cublas" and (misfit := _cublas_misfit(a_q, b_q)):
        if backend == "cublas":
            raise ValueError(f'gemm_backend = "cublas": {misfit}; use "auto", which gives such shapes to Triton')
        return "triton"
    return chosen


def _fake(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    return a_q.new_empty((a_q.shape[0], b_q.shape[0]), dtype=out_dtype)


def _reference_1x128_128x128(a_q, a_dq, b_q, b_dq, out_dtype, backend):
    resolve_gemm_backend(backend, a_q.device, "1x128_128x128")
    return reference.gemm_1x128_128x128(a_q, a_dq, b_q, b_dq, out_dtype)


def _reference_1x128_1x128(a_q, a_dq, b_q, b_dq, out_dtype, backend):
    resolve_gemm_backend(backend, a_q.device, "1x128_1x128")
    return reference.gemm_1x128_1x128(a_q, a_dq, b_q, b_dq, out_dtype)


def _cuda_1x128_128x128(a_q, a_dq, b_q, b_dq, out_dtype, backend):
    match _choose(a_q, b_q, backend, "1x128_128x128"):
        case "reference":
            return reference.gemm_1x128_128x128(a_q, a_dq, b_q, b_dq, out_dtype)
        case "cublas":
            # cuBLASLt reads these multipliers along K, in rows of a multiple of four.
            if b_dq.shape[1] % 4:
                b_dq = F.pad(b_dq, (0, -b_dq.shape[1] % 4))
            return _cublas(a_q, a_dq, b_q, b_dq.contiguous().t(), F.ScalingType.BlockWise128x128, out_dtype)
        case "triton":
            return _triton(a_q, a_dq, b_q, b_dq, False, out_dtype)


def _cuda_1x128_1x128(a_q, a_dq, b_q, b_dq, out_dtype, backend):
    match _choose(a_q, b_q, backend, "1x128_1x128"):
        case "reference":
            return reference.gemm_1x128_1x128(a_q, a_dq, b_q, b_dq, out_dtype)
        case "cublas":
            return _cublas(a_q, a_dq, b_q, column_major(b_dq), F.ScalingType.BlockWise1x128, out_dtype)
        case "triton":
            return _triton(a_q, a_dq, b_q, b_dq, True, out_dtype)


def _cublas(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, b_scaling: object, out_dtype: torch.dtype) -> Tensor:
    return F.scaled_mm(
        a_q, b_q.t(), column_major(a_dq), F.ScalingType.BlockWise1x128, b_dq, b_scaling, output_dtype=out_dtype
    )


def _triton(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, b_per_row: bool, out_dtype: torch.dtype) -> Tensor:
    """The kernel for Hopper where it runs, else the portable one."""
    M, K = a_q.shape
    N = b_q.shape[0]
    device = a_q.device
    # Of the result, whose rows have no padding: an allocation begins at a multiple of 256 bytes.
    storable = N * out_dtype.itemsize % 16 == 0
    if M and N and K and storable and is_hopper(device) and _loads_by_tma(a_q) and _loads_by_tma(b_q):
        out = a_q.new_empty((M, N), dtype=out_dtype)
        with on_device_of(out):
            b_dq = column_major(b_dq) if b_per_row else b_dq
            kernels("gemm_hopper_launch").multiply_scaled(
                a_q, column_major(a_dq), b_q, b_dq, out, b_per_row, multiprocessors(device)
            )
        return out
    return _portable(a_q, a_dq, b_q, b_dq, b_per_row, out_dtype)


def _loads_by_tma(payload: Tensor) -> bool:
    """TMA wants the start of every row at a multiple of 16 bytes."""
    along_rows, along_k = payload.stride()
    return along_k == 1 and along_rows % 16 == 0 and payload.data_ptr() % 16 == 0


def _portable(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, b_per_row: bool, out_dtype: torch.dtype) -> Tensor:
    (M, K), N = a_q.shape, b_q.shape[0]
    out = a_q.new_empty((M, N), dtype=out_dtype)
    if out.numel() == 0:
        return out
    # Half tiles where whole ones would leave multiprocessors idle.
    block_m = 128 if ceil_div(M, 128) * ceil_div(N, 128) >= multiprocessors(a_q.device) else 64
    launch(
        kernels("gemm")._gemm_kernel,
        (ceil_div(M, block_m) * ceil_div(N, 128), 1, 1),
        (a_q, a_dq, b_q, b_dq, out, M, N, K, a_q.stride(0), b_q.stride(0), *a_dq.stride(), *b_dq.stride()),
        (b_per_row, K % BLOCK == 0, block_m, 128, 8),
        num_warps=8 if block_m == 128 else 4,
        # A stage takes 32 KiB of shared memory.
        num_stages=4 if is_datacenter(a_q.device) else 3,
        enable_fp_fusion=True,  # scaling and accumulation are one instruction; Triton 3.10 changes the default
    )
    return out


for _name, _reference, _cuda in (
    ("gemm_1x128_128x128", _reference_1x128_128x128, _cuda_1x128_128x128),
    ("gemm_1x128_128x128.recomputed", _reference_1x128_128x128, _cuda_1x128_128x128),
    ("gemm_1x128_1x128", _reference_1x128_1x128, _cuda_1x128_1x128),
):
    define(
        f"{_name}(Tensor a_q, Tensor a_dq, Tensor b_q, Tensor b_dq, ScalarType out_dtype, str backend) -> Tensor",
        reference=_reference,
        cuda=_cuda,
        fake=_fake,
    )
