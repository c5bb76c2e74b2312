"""Quantisation and transposition: checks, allocation, launch.

`x ~= x_q * x_dq` per block; payloads are float8_e4m3fn, multipliers fp32. Multipliers per DeepSeek-V3 (arXiv:2412.19437, section
3.3.2): 1x128 for activations and gradients, 128x128 for weights; and for activations that dw is computed of under wgrad =
"fp8_block". `backend` is "auto" (Triton on GPUs that have e4m3) or "reference" (plain PyTorch).
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from .. import reference
from ..recipe import ScaleFormat
from .backend import QuantizeBackend, is_hopper, suits_both_hopper, use_reference
from .layouts import (
    E4M3,
    WIDEST,
    aligned_rows,
    block_multipliers,
    contiguous_rows,
    fill,
    group_multipliers,
    row_major,
    tiles,
    transposed_block_multipliers,
)
from .library import FLOATS, check_aligned, check_choice, check_matrix, define, kernels, launch

_SCALE_FORMATS, _BACKENDS = get_args(ScaleFormat), get_args(QuantizeBackend)


def quantize_1x128(
    x: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise rows of x in groups of 128.

    x ~= x_q * x_dq[:, k // 128]

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        x_q:  [M, K] float8_e4m3fn, row-major.
        x_dq: [M, ceil(K/128)] fp32, M-contiguous.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    return torch.ops.blockfp8.quantize_1x128.default(x, scale_format, backend)


def quantize_1x128_both(
    x: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise x in groups of 128 along K and, from the same read, its transpose in groups of 128 along M.

    x ~= x_q * x_dq[:, k // 128];  x^T ~= xt_q * xt_dq[:, m // 128]

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        x_q:   [M, K] float8_e4m3fn, row-major.
        x_dq:  [M, ceil(K/128)] fp32, M-contiguous.
        xt_q:  [K, M] float8_e4m3fn, rows at multiples of 16 bytes (padding is zero).
        xt_dq: [K, ceil(M/128)] fp32, K-contiguous.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    return torch.ops.blockfp8.quantize_1x128_both.default(x, scale_format, backend)


def quantize_1x128_columns(
    x: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise the transpose of x in groups of 128 along M: the last two results of `quantize_1x128_both`, alone.

    x^T ~= xt_q * xt_dq[:, m // 128]

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        xt_q:  [K, M] float8_e4m3fn, rows at multiples of 16 bytes (padding is zero).
        xt_dq: [K, ceil(M/128)] fp32, K-contiguous.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    return torch.ops.blockfp8.quantize_1x128_columns.default(x, scale_format, backend)


def quantize_128x128(
    w: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise w in square blocks of 128.

    w ~= w_q * w_dq[n // 128, k // 128]; w^T ~= w_q^T * w_dq^T holds as well.

    Args:
        w: [N, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        w_q:  [N, K] float8_e4m3fn, row-major.
        w_dq: [ceil(N/128), ceil(K/128)] fp32, row-major.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, w=w)
    return torch.ops.blockfp8.quantize_128x128.default(w, scale_format, backend)


def quantize_128x128_both(
    w: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto", after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise w in square blocks of 128 and transpose the payload, from one read: `quantize_128x128` and `transpose_fp8`.

    Args:
        w: [N, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
        after: see `transpose_fp8`.
    Returns:
        w_q:  [N, K] float8_e4m3fn, row-major.
        w_dq: [ceil(N/128), ceil(K/128)] fp32, row-major.
        wt_q: [K, N] float8_e4m3fn, rows at multiples of 16 bytes (padding is zero).
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, w=w)
    return torch.ops.blockfp8.quantize_128x128_both.default(w, scale_format, backend, after)


def quantize_128x128_columns(
    x: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise the transpose of x in square blocks of 128: payloads of `quantize_128x128_both` transposed, alone.

    x^T ~= xt_q * xt_dq[k // 128, m // 128]

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        xt_q:  [K, M] float8_e4m3fn, rows at multiples of 16 bytes (padding is zero).
        xt_dq: [ceil(K/128), ceil(M/128)] fp32, column-major.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    return torch.ops.blockfp8.quantize_128x128_columns.default(x, scale_format, backend)


def transpose_fp8(w_q: Tensor, *, after: Tensor | None = None) -> Tensor:
    """Transpose a payload: the fp8 tensor cores of Hopper read both operands along the contraction.

    Args:
        w_q: [N, K] float8_e4m3fn.
        after: any tensor that must be there first. Its values do not matter; one of backward keeps a compiler from moving this into
            forward, and its result from taking memory until backward.
    Returns:
        [K, N] float8_e4m3fn, rows at multiples of 16 bytes (row-major where N % 16 == 0; otherwise the padding is zero).
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_matrix("w_q", w_q, (E4M3,))
    return torch.ops.blockfp8.transpose_fp8.default(w_q, after)


def check_quantizable(scale_format: ScaleFormat, backend: QuantizeBackend, **matrices: Tensor) -> None:
    """Raises ValueError unless these can be quantised along their rows; matrices are named as the arguments are."""
    for name, x in matrices.items():
        check_matrix(name, x, FLOATS)
        check_aligned(name, x, 1)
        if x.shape[1] > WIDEST:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: dimension 1 must be at most {WIDEST:,}; split it")
    check_choice("scale_format", scale_format, _SCALE_FORMATS)
    check_choice("backend", backend, _BACKENDS)


# Allocation, which is the fake kernels as well


def _allocate_1x128(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return row_major(x, M, K), group_multipliers(x, M, K)


def _allocate_1x128_columns(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return aligned_rows(x, K, M), group_multipliers(x, K, M)


def _allocate_128x128_columns(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return aligned_rows(x, K, M), transposed_block_multipliers(x, K, M)


def _allocate_1x128_both(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_allocate_1x128(x, scale_format, backend), *_allocate_1x128_columns(x, scale_format, backend)


def _allocate_128x128(w: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    N, K = w.shape
    return row_major(w, N, K), block_multipliers(w, N, K)


def _allocate_128x128_both(
    w: Tensor, scale_format: str, backend: str, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = w.shape
    return *_allocate_128x128(w, scale_format, backend), aligned_rows(w, K, N)


def _allocate_transposed(w_q: Tensor, after: Tensor | None = None) -> Tensor:
    N, K = w_q.shape
    return aligned_rows(w_q, K, N)


# Reference


def _filled(allocate: Callable[..., tuple[Tensor, ...]], twin: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """What a twin computes, in the promised layouts."""

    def run(x: Tensor, scale_format: ScaleFormat, backend: str, after: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(map(fill, allocate(x, scale_format, backend), twin(x, scale_format)))

    return run


_reference_1x128 = _filled(_allocate_1x128, reference.quantize_1x128)
_reference_1x128_columns = _filled(_allocate_1x128_columns, reference.quantize_1x128_columns)
_reference_1x128_both = _filled(_allocate_1x128_both, reference.quantize_1x128_both)
_reference_128x128 = _filled(_allocate_128x128, reference.quantize_128x128)
_reference_128x128_both = _filled(_allocate_128x128_both, reference.quantize_128x128_both)
_reference_128x128_columns = _filled(_allocate_128x128_columns, reference.quantize_128x128_columns)


def _reference_transpose(w_q: Tensor, after: Tensor | None = None) -> Tensor:
    return fill(_allocate_transposed(w_q), reference.transpose_fp8(w_q))


# CUDA


def _cuda_1x128(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if use_reference(x, backend):
        return _reference_1x128(x, scale_format, backend)
    x_q, x_dq = _allocate_1x128(x, scale_format, backend)
    x = contiguous_rows(x)
    M, K = x.shape
    if M:
        args = (x, x_q, x_dq, M, K, x.stride(0))
        launch(kernels("quantize")._quantize_1x128_kernel, tiles(M, K), args, (scale_format == "pow2",), num_warps=8)
    return x_q, x_dq


def _launch_columns(
    kernel: Any, x: Tensor, args: tuple[Tensor | int, ...], padded: bool, scale_format: ScaleFormat, *more: bool
) -> None:
    """Launch a kernel that quantises columns of x; more: constants that it has besides."""
    # Capped, three programs run on a multiprocessor. Elsewhere that would spill.
    warps, registers = (4, 168) if is_hopper(x.device) and not padded else (8, None)
    constants = (32 // warps, padded, scale_format == "pow2", *more)
    launch(kernel, tiles(*x.shape), args, constants, num_warps=warps, maxnreg=registers)


def _cuda_1x128_columns(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if use_reference(x, backend):
        return _reference_1x128_columns(x, scale_format, backend)
    return _columns(x, _allocate_1x128_columns(x, scale_format, backend), False, scale_format)


def _cuda_128x128_columns(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if use_reference(x, backend):
        return _reference_128x128_columns(x, scale_format, backend)
    return _columns(x, _allocate_128x128_columns(x, scale_format, backend), True, scale_format)


def _columns(x: Tensor, outs: tuple[Tensor, Tensor], square: bool, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """square: a multiplier is one of 128x128."""
    xt_stride = outs[0].stride(0)
    x = contiguous_rows(x)
    M, K = x.shape
    if M:
        args = (x, *outs, M, K, x.stride(0), xt_stride)
        kernel = kernels("quantize")._quantize_columns_kernel
        _launch_columns(kernel, x, args, xt_stride != M, scale_format, square)
    return outs


def _cuda_1x128_both(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if use_reference(x, backend):
        return _reference_1x128_both(x, scale_format, backend)
    x_q, x_dq, xt_q, xt_dq = _allocate_1x128_both(x, scale_format, backend)
    x = contiguous_rows(x)
    M, K = x.shape
    if M:
        args = (x, x_q, x_dq, xt_q, xt_dq, M, K, x.stride(0))
        padded = xt_q.stride(0) != M
        if suits_both_hopper(padded, x):
            kernel = kernels("both_hopper")._quantize_1x128_both_kernel
            launch(kernel, tiles(M, K), args, (scale_format == "pow2",), num_warps=8)
        else:
            kernel = kernels("quantize")._quantize_1x128_both_kernel
            _launch_columns(kernel, x, (*args, xt_q.stride(0)), padded, scale_format)
    return x_q, x_dq, xt_q, xt_dq


def _cuda_128x128(w: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if use_reference(w, backend):
        return _reference_128x128(w, scale_format, backend)
    w_q, w_dq = _allocate_128x128(w, scale_format, backend)
    w = contiguous_rows(w)
    N, K = w.shape
    if N:
        args = (w, w_q, w_dq, N, K, w.stride(0))
        launch(kernels("quantize")._quantize_128x128_kernel, tiles(N, K), args, (scale_format == "pow2",), num_warps=8)
    return w_q, w_dq


def _cuda_128x128_both(
    w: Tensor, scale_format: ScaleFormat, backend: str, after: Tensor | None = None
) -> tuple[Tensor, ...]:
    if use_reference(w, backend):
        return _reference_128x128_both(w, scale_format, backend)
    w_q, w_dq, wt_q = _allocate_128x128_both(w, scale_format, backend)
    w = contiguous_rows(w)
    N, K = w.shape
    if N:
        args = (w, w_q, w_dq, wt_q, N, K, w.stride(0), wt_q.stride(0))
        launch(
            kernels("quantize")._quantize_128x128_both_kernel,
            tiles(N, K),
            args,
            (4, wt_q.stride(0) != N, scale_format == "pow2"),
            num_warps=8,
        )
    return w_q, w_dq, wt_q


def _cuda_transpose(w_q: Tensor, after: Tensor | None = None) -> Tensor:
    if use_reference(w_q, "auto"):
        return _reference_transpose(w_q)
    out = _allocate_transposed(w_q)
    w_q = contiguous_rows(w_q)
    N, K = w_q.shape
    if w_q.numel():
        args = (w_q, out, N, K, w_q.stride(0), out.stride(0))
        launch(kernels("quantize")._transpose_kernel, tiles(N, K), args, num_warps=8)
    return out


define(
    "quantize_1x128(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
    reference=_reference_1x128,
    cuda=_cuda_1x128,
    fake=_allocate_1x128,
)
define(
    "quantize_1x128_columns(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
    reference=_reference_1x128_columns,
    cuda=_cuda_1x128_columns,
    fake=_allocate_1x128_columns,
)
define(
    "quantize_128x128_columns(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
    reference=_reference_128x128_columns,
    cuda=_cuda_128x128_columns,
    fake=_allocate_128x128_columns,
)
define(
    "quantize_1x128_both(Tensor x, str scale_format, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_1x128_both,
    cuda=_cuda_1x128_both,
    fake=_allocate_1x128_both,
)
define(
    "quantize_128x128(Tensor w, str scale_format, str backend) -> (Tensor, Tensor)",
    reference=_reference_128x128,
    cuda=_cuda_128x128,
    fake=_allocate_128x128,
)
define(
    "quantize_128x128_both(Tensor w, str scale_format, str backend, Tensor? after=None) -> (Tensor, Tensor, Tensor)",
    reference=_reference_128x128_both,
    cuda=_cuda_128x128_both,
    fake=_allocate_128x128_both,
)
define(
    "transpose_fp8(Tensor w_q, Tensor? after=None) -> Tensor",
    reference=_reference_transpose,
    cuda=_cuda_transpose,
    fake=_allocate_transposed,
)
