"""Launches of the Hopper GEMM: tensor maps of its operands, counters of tiles, and what is remembered of a launch.

Encoding four or five tensor maps takes the host longer than all the rest of a launch. In training the caching allocator hands out the
same addresses step by step, so that a launch is decided by what an earlier one was.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formats import ceil_div
from .gemm_hopper import A_DQ_ROWS, BN, E4M3_TILE, FP32_VECTOR, _gemm_hopper_kernel, assembler_for, tiling_of
from .launch import repeatable, start

compiled: dict[tuple[int, torch.dtype, bool, int], Any] = {}
"""(device, c's dtype, b_per_row, rows of a tile) -> the compiled kernel: nothing else decides what is compiled."""


class _Address(int):
    """What a launch asks a tensor for."""

    def data_ptr(self) -> int:
        return self


class _Descriptor(TensorDescriptor):
    """TensorDescriptor without its checks: they cost 10 us each, and `multiply_scaled`'s contract covers them."""

    def __init__(self, base: Any, shape: Any, strides: Any, block_shape: list[int], layout: Any):
        self.base = base
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape
        self.layout = layout

    def of_address(self) -> "_Descriptor":
        """The same without the tensor."""
        return _Descriptor(_Address(self.base.data_ptr()), self.shape, self.strides, self.block_shape, self.layout)


def _columns(dq: torch.Tensor, block: int) -> tuple[_Descriptor, int]:
    """A one-dimensional TMA view of multipliers dq [rows, K blocks], and its column stride.

    A box may run past a column's end (into multipliers of rows that do not exist), never past the tensor's. TMA wants boxes at
    multiples of 16 bytes, hence columns at multiples of four rows: where dq has others, a copy is made.
    """
    rows, columns = dq.shape
    stride = dq.stride()[1]
    if stride % 4 or dq.data_ptr() % 16:
        padded = dq.new_empty((columns, ceil_div(rows, 4) * 4))
        padded[:, :rows].copy_(dq.t())
        dq = padded.t()[:rows]
        stride = dq.stride()[1]
    if columns == 1:
        stride = rows
    return _Descriptor(dq, [(columns - 1) * stride + rows], [1], [block], FP32_VECTOR), stride


COUNTERS = 1 << 16
_counters: dict[int, tuple[torch.Tensor, Iterator[int]]] = {}
"""device -> zeros, and how many of them were taken."""

REMEMBERED = 1 << 14
_launches: dict[tuple[Any, ...], Callable[[], None]] = {}
"""What decides a launch, addresses too -> the launch."""


def _counter(like: torch.Tensor, remembered: bool) -> torch.Tensor:
    """A zero on the device that no other launch counts with at the same time; the launch leaves it at zero.

    Launches that are remembered keep theirs, in turn: a quarter as many are remembered as there are. Others have one for themselves.
    """
    if not remembered:
        return like.new_zeros(1, dtype=torch.int32)
    device = like.get_device()
    if device not in _counters:
        # The memory pool of a CUDA graph, to which a thread may be bound, would take them back. No other thread is bound to it.
        with ThreadPoolExecutor(1) as thread:
            zeros = thread.submit(_zeros, device).result()
        # Of two threads one is heard, and both go on with its zeros.
        _counters.setdefault(device, (zeros, count()))
    zeros, taken = _counters[device]
    return zeros[next(taken) % COUNTERS]


def _zeros(device: int) -> torch.Tensor:
    zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # other streams use them
    return zeros


def multiply_scaled(
    a_q: torch.Tensor,
    a_dq: torch.Tensor,
    b_q: torch.Tensor,
    b_dq: torch.Tensor,
    c: torch.Tensor,
    b_per_row: bool,
    multiprocessors: int,
) -> None:
    """Write a b^T into c, and remember the launch where it can be repeated. The same bits whichever program takes which tile.

    Args:
        a_q: [M, K] float8_e4m3fn, rows contiguous and at multiples of 16 bytes; M, K >= 1.
        a_dq: [M, ceil(K/128)] fp32, M-contiguous.
        b_q: [N, K] float8_e4m3fn, as a_q.
        b_dq: [ceil(N/128), ceil(K/128)] fp32 of any strides, or with b_per_row [N, ceil(K/128)] fp32, N-contiguous.
        c: [M, N] bf16 or fp32, contiguous, rows at multiples of 16 bytes.
        b_per_row: b has a multiplier per row and K block rather than per 128x128 block.
        multiprocessors: of the device, which is the current one.
    """
    # With the same c there is no other launch at the same time, so that this one may keep its counter.
    key = (
        a_q.get_device(),
        c.dtype,
        b_per_row,
        a_q.shape,
        b_q.shape,
        c.data_ptr(),
        *(what for x in (a_q, a_dq, b_q, b_dq) for what in (x.data_ptr(), x.stride())),
    )
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and (launch := _launches.get(key)):
        launch()
        return
    M, K = a_shape = a_q.shape
    N, _ = b_shape = b_q.shape
    tiling = tiling_of(M, N, K, b_per_row, multiprocessors)
    a_dq_desc, a_dq_k = _columns(a_dq, A_DQ_ROWS.value)
    if b_per_row:
        b_dq_desc, b_dq_k = _columns(b_dq, BN.value)
        b_dq_n = 0
    else:
        b_dq_desc = None
        b_dq_n, b_dq_k = b_dq.stride()
    descriptors = (
        _Descriptor(a_q, a_shape, a_q.stride(), [64 * tiling.parts, 128], E4M3_TILE),
        _Descriptor(b_q, b_shape, b_q.stride(), [BN.value, 128], E4M3_TILE),
        _Descriptor(c, c.shape, c.stride(), [64, tiling.c_columns(c.dtype)], tiling.c_layout(c.dtype)),
        a_dq_desc,
        b_dq_desc,
    )
    numbers = (M, N, K, a_dq_k, b_dq_n, b_dq_k, b_per_row, *tiling.constants)
    # A copy has another address next time, and a graph that is being recorded may be replayed beside any other launch.
    copied = a_dq_desc.base is not a_dq or (b_dq_desc is not None and b_dq_desc.base is not b_dq)
    remembered = not copied and not capturing
    counter = _counter(a_q, remembered)
    grid = (min(ceil_div(M, tiling.rows) * ceil_div(N, BN.value), multiprocessors), 1, 1)
    device = a_q.get_device()
    variant = (device, c.dtype, b_per_row, tiling.rows)
    kernel = compiled.get(variant)
    if kernel is None:
        with assembler_for(b_per_row):
            kernel = _gemm_hopper_kernel[grid](*descriptors, b_dq, counter, *numbers, **tiling.options)
        compiled[variant] = kernel
        return
    of_addresses = tuple(descriptor and descriptor.of_address() for descriptor in descriptors)
    args = (*of_addresses, b_dq.data_ptr(), counter.data_ptr(), *numbers)
    if not remembered:
        start(kernel, device, grid, args)
        return
    launch = repeatable(kernel, device, grid, args)
    launch()
    if len(_launches) >= REMEMBERED:
        _launches.clear()
    _launches[key] = launch
