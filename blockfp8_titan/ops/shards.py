"""Quantisation of a weight's rows of which others are elsewhere: checks, allocation, launch.

The multipliers are those of the whole weight's 128x128 blocks: each process finds the largest magnitudes in its rows, and quantises
with the multipliers that follow from everybody's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..formats import BLOCK, ceil_div
from .backend import QuantizeBackend, use_reference
from .layouts import contiguous_rows, fill, row_major
from .library import FLOATS, check_aligned, check_matrix, define, kernels, launch


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
        check_matrix("w", w, FLOATS)
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
    check_matrix("w", w, FLOATS)
    check_aligned("w", w, 1)
    _check_table("w_dq", w_dq, torch.float32, w, first_row)
    return torch.ops.blockfp8.quantize_rows.default(w, w_dq, first_row, backend)


def _check_table(name: str, table: Tensor, dtype: torch.dtype, w: Tensor, first_row: int) -> None:
    """Raises ValueError unless table has a number for every block that rows first_row to first_row + M of a weight touch."""
    check_matrix(name, table, (dtype,))
    if table.device != w.device:
        raise ValueError(f"{name} is on {table.device}, w on {w.device}: must be on one device")
    M, K = w.shape
    least = ceil_div(first_row + M, BLOCK) if M else 0
    if first_row < 0 or table.shape[0] < least or table.shape[1] != ceil_div(K, BLOCK) or not table.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} and strides {table.stride()}, first_row is {first_row}: {name} must be contiguous "
            f"and [at least {least}, {ceil_div(K, BLOCK)}] for w of shape {tuple(w.shape)}, first_row at least 0"
        )


def _allocate_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    return row_major(w, *w.shape)


def _reference_amax_128x128_(ws: Sequence[Tensor], first_rows: Sequence[int], amax_bits: Sequence[Tensor]) -> None:
    for w, first_row, bits in zip(ws, first_rows, amax_bits, strict=True):
        amax = reference.amax_128x128(w, first_row)
        # The sign of a NaN's magnitude is anyone's guess.
        bits[first_row // BLOCK :][: amax.shape[0]] = amax.view(torch.int32) & 0x7FFFFFFF


def _reference_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    return fill(_allocate_rows(w, w_dq, first_row, backend), reference.quantize_rows(w, w_dq, first_row))


def _shard_grid(first_row: int, m: int, k: int) -> tuple[int, int, int]:
    """One program for each 128x128 block of the whole matrix that rows first_row to first_row + m touch."""
    return ceil_div(k, BLOCK), ceil_div(first_row + m, BLOCK) - first_row // BLOCK, 1


def _cuda_amax_128x128_(ws: Sequence[Tensor], first_rows: Sequence[int], amax_bits: Sequence[Tensor]) -> None:
    if ws and use_reference(ws[0], "auto"):
        return _reference_amax_128x128_(ws, first_rows, amax_bits)
    for w, first_row, bits in zip(ws, first_rows, amax_bits, strict=True):
        w = contiguous_rows(w)
        M, K = w.shape
        if M:
            args = (w, bits, M, K, w.stride(0), first_row)
            launch(kernels("quantize")._amax_128x128_kernel, _shard_grid(first_row, M, K), args, num_warps=4)


def _cuda_rows(w: Tensor, w_dq: Tensor, first_row: int, backend: str) -> Tensor:
    if use_reference(w, backend):
        return _reference_rows(w, w_dq, first_row, backend)
    w_q = _allocate_rows(w, w_dq, first_row, backend)
    w = contiguous_rows(w)
    M, K = w.shape
    if M:
        args = (w, w_dq, w_q, M, K, w.stride(0), first_row)
        launch(kernels("quantize")._quantize_rows_kernel, _shard_grid(first_row, M, K), args, num_warps=8)
    return w_q


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
