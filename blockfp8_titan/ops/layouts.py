"""How quantised tensors lie in memory.

The fake kernels allocate with these functions alone, so that shapes and strides cannot differ from the real ones.
"""

import torch
from torch import Tensor

from ..formats import ALIGNMENT, BLOCK, ceil_div, round_up

E4M3 = torch.float8_e4m3fn

WIDEST = 2**24
"""Elements that a row of what is quantised may have, and that rows may be apart: in a tile, kernels count in 32 bits."""

Quantized = tuple[Tensor, Tensor]
"""Payload and multipliers."""


def row_major(like: Tensor, m: int, k: int) -> Tensor:
    """A payload."""
    return like.new_empty((m, k), dtype=E4M3)


def aligned_rows(like: Tensor, m: int, k: int) -> Tensor:
    """A transposed payload: rows at multiples of 16 bytes."""
    out = like.new_empty((m, round_up(k, ALIGNMENT)), dtype=E4M3)
    # A view costs host time; of a symbolic size nothing is asked, that would compile a graph for it alone.
    return out if isinstance(k, int) and k % ALIGNMENT == 0 else out[:, :k]


def group_multipliers(like: Tensor, m: int, k: int) -> Tensor:
    """Multipliers of 1x128 groups of an [m, k] payload, m-contiguous."""
    return like.new_empty_strided((m, ceil_div(k, BLOCK)), (1, m), dtype=torch.float32)


def block_multipliers(like: Tensor, n: int, k: int) -> Tensor:
    """Multipliers of 128x128 blocks of an [n, k] payload, row-major."""
    return like.new_empty((ceil_div(n, BLOCK), ceil_div(k, BLOCK)), dtype=torch.float32)


def transposed_block_multipliers(like: Tensor, k: int, m: int) -> Tensor:
    """Multipliers of 128x128 blocks of a transposed, [k, m], payload: column-major, row-major for what was transposed."""
    return group_multipliers(like, ceil_div(k, BLOCK), m)


def fill(out: Tensor, value: Tensor) -> Tensor:
    """value in out's layout, zeros in the padding of its rows; value itself where it has that layout already."""
    if out.is_contiguous() and value.stride() == out.stride():
        return value
    if out.dtype == E4M3 and out.numel() and out.stride(0) != out.shape[1]:
        out.as_strided((out.shape[0], out.stride(0)), (out.stride(0), 1)).view(torch.uint8).zero_()
    return out.copy_(value)


def column_major(dq: Tensor) -> Tensor:
    """Multipliers of 1x128 groups as kernels read them: m-contiguous."""
    return dq if dq.stride() == (1, dq.shape[0]) else dq.t().contiguous().t()


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous and at most `WIDEST` apart, else a copy."""
    along_m, along_k = x.stride()
    return x if along_k == 1 and x.shape[1] <= along_m <= WIDEST else x.contiguous()


def tiles(m: int, k: int) -> tuple[int, int, int]:
    """A grid with one program for each 128x128 tile of an [m, k] matrix."""
    return ceil_div(k, BLOCK), ceil_div(m, BLOCK), 1
