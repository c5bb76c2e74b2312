"""Quantisation and transposition: checks, allocation, launch.

`x ~= x_q * x_dq` per block; payloads are float8_e4m3fn, multipliers fp32. Multipliers per DeepSeek-V3 (arXiv:2412.19437, section
3.3.2): 1x128 for activations and gradients, 128x128 for weights. `backend` is "auto" (Triton on GPUs that have e4m3) or
"reference" (plain PyTorch).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..formats import ALIGNMENT, BLOCK, ceil_div, round_up
from ..recipe import ScaleFormat
from .backend import is_datacenter, resolve_quantize_backend
from .library import check_aligned, check_choice, check_matrix, define, kernels, launch

QuantizeBackend = Literal["auto", "reference"]

_SCALE_FORMATS, _BACKENDS = get_args(ScaleFormat), get_args(QuantizeBackend)
_FLOATS = (torch.bfloat16, torch.float32)
_E4M3 = torch.float8_e4m3fn


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
    check_matrix("x", x, _FLOATS)
    check_aligned("x", x, 1)
    _check_choices(scale_format, backend)
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
    check_matrix("x", x, _FLOATS)
    check_aligned("x", x, 1)
    _check_choices(scale_format, backend)
    return torch.ops.blockfp8.quantize_1x128_both.default(x, scale_format, backend)


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
    check_matrix("w", w, _FLOATS)
    check_aligned("w", w, 1)
    _check_choices(scale_format, backend)
    return torch.ops.blockfp8.quantize_128x128.default(w, scale_format, backend)


def amax_128x128_(ws: Sequence[Tensor], first_rows: Sequence[int], amax_bits: Sequence[Tensor]) -> None:
    """Write the largest magnitudes of 128x128 blocks, for weights of which this process holds some rows.

    Magnitudes are written as the bits of fp32 numbers: as integers they order as the numbers do, Inf above and NaN above Inf, so
    that an integer maximum over processes keeps both.

    Args:
        ws: each [M, K] bf16 or fp32, rows first_row to first_row + M of a weight [N, K]; K % 16 == 0.
        first_rows: one for each of ws.
        amax_bits: for each of ws [ceil(N/128), ceil(K/128)] int32, contiguous. Where a block has rows in w, it is overwritten with
            the bits of their max |w|; others are left alone.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    if not len(ws) == len(first_rows) == len(amax_bits):
        raise ValueError(
            f"ws, first_rows and amax_bits have {len(ws)}, {len(first_rows)} and {len(amax_bits)} items: must have as many"
        )
    for w, first_row, bits in zip(ws, first_rows, amax_bits, strict=True):
        check_matrix("w", w, _FLOATS)
        check_aligned("w", w, 1)
        _check_table("amax_bits", bits, torch.int32, w, first_row)
    torch.ops.blockfp8.amax_128x128_.default(ws, first_rows, amax_bits)


def quantize_rows(w: Tensor, w_dq: Tensor, first_row: int, *, backend: QuantizeBackend = "auto") -> Tensor:
    """Quantise some rows of a weight with the multipliers of all its 128x128 blocks.

    Args:
        w: [M, K] bf16 or fp32, rows first_row to first_row + M of a weight [N, K]; K % 16 == 0.
        w_dq: [ceil(N/128), ceil(K/128)] fp32, contiguous: multipliers of the whole weight.
    Returns:
        [M, K] float8_e4m3fn, row-major: bit for bit the rows of `quantize_128x128` of the whole weight if w_dq is.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_matrix("w", w, _FLOATS)
    check_aligned("w", w, 1)
    _check_table("w_dq", w_dq, torch.float32, w, first_row)
    return torch.ops.blockfp8.quantize_rows.default(w, w_dq, first_row, backend)


def _check_table(name: str, table: Tensor, dtype: torch.dtype, w: Tensor, first_row: int) -> None:
    """Raises ValueError unless table has a number for every block that rows first_row to first_row + M of a weight touch."""
    check_matrix(name, table, (dtype,))
    M, K = w.shape
    least = ceil_div(first_row + M, BLOCK) if M else 0
    if first_row < 0 or table.shape[0] < least or table.shape[1] != ceil_div(K, BLOCK) or not table.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} and strides {table.stride()}, first_row is {first_row}: {name} must be contiguous "
            f"and [at least {least}, {ceil_div(K, BLOCK)}] for w of shape {tuple(w.shape)}, first_row at least 0"
        )


def transpose_fp8(w_q: Tensor) -> Tensor:
    """Transpose a payload: the fp8 tensor cores of Hopper read both operands along the contraction.

    Args:
        w_q: [N, K] float8_e4m3fn.
    Returns:
        [K, N] float8_e4m3fn, rows at multiples of 16 bytes (row-major where N % 16 == 0; otherwise the padding is zero).
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_matrix("w_q", w_q, (_E4M3,))
    return torch.ops.blockfp8.transpose_fp8.default(w_q)


def _check_choices(scale_format: ScaleFormat, backend: QuantizeBackend) -> None:
    check_choice("scale_format", scale_format, _SCALE_FORMATS)
    check_choice("backend", backend, _BACKENDS)


# Allocation: the fake kernels are these alone, so that shapes and strides cannot differ from the real ones.


def _row_major(rows: Tensor, m: int, k: int) -> Tensor:
    return rows.new_empty((m, k), dtype=_E4M3)


def _aligned_rows(like: Tensor, m: int, k: int) -> Tensor:
    out = like.new_empty((m, round_up(k, ALIGNMENT)), dtype=_E4M3)
    # A view costs host time; of a symbolic size nothing is asked, that would compile a graph for it alone.
    return out if isinstance(k, int) and k % ALIGNMENT == 0 else out[:, :k]


def _column_major(like: Tensor, m: int, k: int) -> Tensor:
    return like.new_empty_strided((m, ceil_div(k, BLOCK)), (1, m), dtype=torch.float32)


def _allocate_1x128(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    return _row_major(x, M, K), _column_major(x, M, K)


def _allocate_1x128_both(x: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    return _row_major(x, M, K), _column_major(x, M, K), _aligned_rows(x, K, M), _column_major(x, K, M)


def _allocate_128x128(w: Tensor, scale_format: str, backend: str) -> tuple[Tensor, Tensor]:
    N, K = w.shape
    return _row_major(w, N, K), w.new_empty((ceil_div(N, BLOCK), ceil_div(K, BLOCK)), dtype=torch.float32)


def _allocate_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    return _row_major(w, *w.shape)


def _allocate_transposed(w_q: Tensor) -> Tensor:
    N, K = w_q.shape
    return _aligned_rows(w_q, K, N)


def _fill(out: Tensor, value: Tensor) -> Tensor:
    """value in out's layout, zeros in the padding of its rows; value itself where it has that layout already."""
    if out.is_contiguous() and value.stride() == out.stride():
        return value
    if out.dtype == _E4M3 and out.numel() and out.stride(0) != out.shape[1]:
        out.as_strided((out.shape[0], out.stride(0)), (out.stride(0), 1)).view(torch.uint8).zero_()
    return out.copy_(value)


# Reference


def _reference_1x128(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    outs = _allocate_1x128(x, scale_format, backend)
    return tuple(map(_fill, outs, reference.quantize_1x128(x, scale_format)))


def _reference_1x128_both(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    outs = _allocate_1x128_both(x, scale_format, backend)
    return tuple(map(_fill, outs, reference.quantize_1x128_both(x, scale_format)))


def _reference_128x128(w: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    outs = _allocate_128x128(w, scale_format, backend)
    return tuple(map(_fill, outs, reference.quantize_128x128(w, scale_format)))


def _reference_amax_128x128_(ws: Sequence[Tensor], first_rows: Sequence[int], amax_bits: Sequence[Tensor]) -> None:
    for w, first_row, bits in zip(ws, first_rows, amax_bits, strict=True):
        amax = reference.amax_128x128(w, first_row)
        # The sign of a NaN's magnitude is anyone's guess.
        bits[first_row // BLOCK :][: amax.shape[0]] = amax.view(torch.int32) & 0x7FFFFFFF


def _reference_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    return _fill(_allocate_rows(w, w_dq, first_row, backend), reference.quantize_rows(w, w_dq, first_row))


def _reference_transpose(w_q: Tensor) -> Tensor:
    return _fill(_allocate_transposed(w_q), reference.transpose_fp8(w_q))


# CUDA


def _use_reference(x: Tensor, backend: str) -> bool:
    return backend == "reference" or resolve_quantize_backend(x.device) == "reference"


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, else a copy."""
    along_m, along_k = x.stride()
    return x if along_k == 1 and along_m >= x.shape[1] else x.contiguous()


def _grid(m: int, k: int) -> tuple[int, int, int]:
    return ceil_div(k, BLOCK), ceil_div(m, BLOCK), 1


def _cuda_1x128(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if _use_reference(x, backend):
        return _reference_1x128(x, scale_format, backend)
    x_q, x_dq = _allocate_1x128(x, scale_format, backend)
    x = _rows(x)
    M, K = x.shape
    if M:
        args = (x, x_q, x_dq, M, K, x.stride(0))
        launch(kernels("quantize")._quantize_1x128_kernel, _grid(M, K), args, (scale_format == "pow2",), num_warps=8)
    return x_q, x_dq


def _cuda_1x128_both(x: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if _use_reference(x, backend):
        return _reference_1x128_both(x, scale_format, backend)
    x_q, x_dq, xt_q, xt_dq = _allocate_1x128_both(x, scale_format, backend)
    x = _rows(x)
    M, K = x.shape
    if M:
        padded = xt_q.stride(0) != M
        launch(
            kernels("quantize")._quantize_1x128_both_kernel,
            _grid(M, K),
            (x, x_q, x_dq, xt_q, xt_dq, M, K, x.stride(0), xt_q.stride(0)),
            (padded, scale_format == "pow2"),
            num_warps=4,
            # Three programs on a multiprocessor: 89 to 92 % of copy bandwidth on an H100. Elsewhere, and padded, it would spill.
            maxnreg=168 if is_datacenter(x.device) and not padded else None,
        )
    return x_q, x_dq, xt_q, xt_dq


def _cuda_128x128(w: Tensor, scale_format: ScaleFormat, backend: str) -> tuple[Tensor, ...]:
    if _use_reference(w, backend):
        return _reference_128x128(w, scale_format, backend)
    w_q, w_dq = _allocate_128x128(w, scale_format, backend)
    w = _rows(w)
    N, K = w.shape
    if N:
        args = (w, w_q, w_dq, N, K, w.stride(0))
        launch(kernels("quantize")._quantize_128x128_kernel, _grid(N, K), args, (scale_format == "pow2",), num_warps=8)
    return w_q, w_dq


def _shard_grid(first_row: int, m: int, k: int) -> tuple[int, int, int]:
    """One program for each 128x128 block of the whole matrix that rows first_row to first_row + m touch."""
    return ceil_div(k, BLOCK), ceil_div(first_row + m, BLOCK) - first_row // BLOCK, 1


def _cuda_amax_128x128_(ws: Sequence[Tensor], first_rows: Sequence[int], amax_bits: Sequence[Tensor]) -> None:
    if ws and _use_reference(ws[0], "auto"):
        return _reference_amax_128x128_(ws, first_rows, amax_bits)
    for w, first_row, bits in zip(ws, first_rows, amax_bits, strict=True):
        w = _rows(w)
        M, K = w.shape
        if M:
            args = (w, bits, M, K, w.stride(0), first_row)
            launch(kernels("quantize")._amax_128x128_kernel, _shard_grid(first_row, M, K), args, num_warps=4)


def _cuda_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    if _use_reference(w, backend):
        return _reference_rows(w, w_dq, first_row, backend)
    w_q = _allocate_rows(w, w_dq, first_row, backend)
    w = _rows(w)
    M, K = w.shape
    if M:
        args = (w, w_dq, w_q, M, K, w.stride(0), first_row)
        launch(kernels("quantize")._quantize_rows_kernel, _shard_grid(first_row, M, K), args, num_warps=8)
    return w_q


def _cuda_transpose(w_q: Tensor) -> Tensor:
    if _use_reference(w_q, "auto"):
        return _reference_transpose(w_q)
    out = _allocate_transposed(w_q)
    w_q = _rows(w_q)
    N, K = w_q.shape
    if w_q.numel():
        launch(
            kernels("quantize")._transpose_kernel,
            _grid(N, K),
            (w_q, out, N, K, w_q.stride(0), out.stride(0)),
            num_warps=8,
        )
    return out


define(
    "quantize_1x128(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
    reference=_reference_1x128,
    cuda=_cuda_1x128,
    fake=_allocate_1x128,
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
    "amax_128x128_(Tensor[] ws, int[] first_rows, Tensor(a!)[] amax_bits) -> ()",
    reference=_reference_amax_128x128_,
    cuda=_cuda_amax_128x128_,
    fake=lambda ws, first_rows, amax_bits: None,
)
define(
    "quantize_rows(Tensor w, Tensor w_dq, int first_row, str backend) -> Tensor",
    reference=_reference_rows,
    cuda=_cuda_rows,
    fake=_allocate_rows,
)
define(
    "transpose_fp8(Tensor w_q) -> Tensor",
    reference=_reference_transpose,
    cuda=_cuda_transpose,
    fake=_allocate_transposed,
)
