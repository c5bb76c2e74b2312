"""The blockwise-scaled GEMM for Hopper, in Gluon: c = a b^T with one fp32 promotion per 128 of K.

Persistent programs, one to a multiprocessor, take tiles from a common counter. With fixed shares, those that NCCL keeps from
starting would begin their whole share when others have ended, which doubles the time. In each program one warp brings tiles of a and
b, and a's multipliers, into shared memory by TMA; two or three warpgroups multiply and promote. A warpgroup owns one or two parts of
64 rows: every part of a K block is a fresh wgmma chain, whose result is scaled and added to the part's fp32 accumulator in registers
while the tensor cores work for another warpgroup.

A promotion takes about as long as another warpgroup's chain, so nothing else may stand between the end of one chain and the start
of the next: barriers are waited for and signalled while a chain runs. That asks for a stage of shared memory more than otherwise.

Gluon is experimental: what touches it is in this file, in `gemm_hopper_launch` and in `both_hopper`.
"""

# Device code is compiled from a subset of Python: no starred tuples, and a constexpr condition needs a statement.
# ruff: noqa: RUF005, SIM108

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import ceil_div

# Triton renamed its TMA copies after 3.6.
_tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BN = gl.constexpr(128)
A_DQ_ROWS = gl.constexpr(256)  # of a's multipliers in a box: a power of two, and no fewer than the rows of any tile
GROUP_M = gl.constexpr(8)  # height in tiles of a strip that is walked column by column, for the L2 cache


@gluon.jit
def _tile_coordinates(tile, num_m, num_n):
    width = GROUP_M * num_n
    first_m = tile // width * GROUP_M
    rows = gl.minimum(num_m - first_m, GROUP_M)
    inside = tile % width
    return first_m + inside % rows, inside // rows


@gluon.jit
def _load_tiles(
    a_desc, b_desc, a_dq_desc, b_dq_desc, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, tile_bufs, ready, empty, counter_ptr,
    M, N, K, a_dq_k, b_dq_k,
    B_PER_ROW: gl.constexpr, WARPGROUPS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    BM: gl.constexpr = 64 * PARTS * WARPGROUPS
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, BN)
    num_tiles = num_m * num_n
    stage = 0
    phase = 1
    tile = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    while tile < num_tiles:
        pm, pn = _tile_coordinates(tile, num_m, num_n)
        for k in range(gl.cdiv(K, 128)):
            mbarrier.wait(empty.index(stage), phase)
            if k == 0:
                tile_bufs.index(stage).store(gl.full([1], tile, gl.int32, layout=L))
            bar = ready.index(stage)
            if B_PER_ROW:
                mbarrier.expect(bar, (BM + BN) * 128 + (A_DQ_ROWS + BN) * 4)
                _tma_load(b_dq_desc, [k * b_dq_k + pn * BN], bar, b_dq_bufs.index(stage))
            else:
                mbarrier.expect(bar, (BM + BN) * 128 + A_DQ_ROWS * 4)
            _tma_load(a_dq_desc, [k * a_dq_k + pm * BM], bar, a_dq_bufs.index(stage))
            for w in gl.static_range(WARPGROUPS):
                _tma_load(a_desc, [pm * BM + w * 64 * PARTS, k * 128], bar, a_bufs.index(stage * WARPGROUPS + w))
            _tma_load(b_desc, [pn * BN, k * 128], bar, b_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # The stages are full, which hides the latency.
        tile = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if tile == num_tiles + gl.num_programs(0) - 1:
        # Each program asks once in vain; this was the last of them, and the counter is as it was.
        gl.store(counter_ptr, 0)
    mbarrier.wait(empty.index(stage), phase)
    tile_bufs.index(stage).store(gl.full([1], -1, gl.int32, layout=L))
    mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def _next_tile(tile_buf):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(tile_buf.load(L), 0)


@gluon.jit
def _promote(acc, part, a_dq, b_dq, B_PER_ROW: gl.constexpr):
    if B_PER_ROW:
        acc = acc + (part * b_dq[None, :]) * a_dq[:, None]
    else:
        acc = acc + part * (a_dq * b_dq)[:, None]
    # LLVM would sink the promotion below the next wgmma, which keeps two partial results alive and spills. An empty asm
    # statement with side effects stays where it is, and its operand with it.
    return gl.inline_asm_elementwise("", "=f,0", [acc], gl.float32, is_pure=False, pack=1)


@gluon.jit
def _slices(x, COLUMNS: gl.constexpr):
    """x [64, n] as a tuple of [64, COLUMNS], left to right."""
    if x.shape[1] == COLUMNS:
        return (x,)
    else:
        left, right = x.reshape((64, 2, x.shape[1] // 2)).permute((0, 2, 1)).split()
        return _slices(left, COLUMNS) + _slices(right, COLUMNS)


@gluon.jit
def _multiply_tiles(
    WARPGROUP: gl.constexpr, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
    M, N, K, b_dq_n, b_dq_k,
    B_PER_ROW: gl.constexpr, WARPGROUPS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = 64 * PARTS * WARPGROUPS
    C_COLUMNS: gl.constexpr = c_desc.block_type.shape[1]
    # While the chain of which part barriers are dealt with. The first is the earlier, which keeps the stages filled; a promotion with
    # two multiplies leaves less room beside it.
    BARRIERS: gl.constexpr = PARTS - 1 if B_PER_ROW else 0
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    L_C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C_COLUMNS, 32])
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, BN)
    num_k = gl.cdiv(K, 128)
    c_buf = c_bufs.index(WARPGROUP)
    stage = 0
    phase = 0
    mbarrier.wait(ready.index(stage), phase)
    tile = _next_tile(tile_bufs.index(stage))
    while tile >= 0:
        pm, pn = _tile_coordinates(tile, num_m, num_n)
        b_dq_ptrs = b_dq_ptr + pn * b_dq_n
        if not B_PER_ROW:
            b_dq_next = gl.load(b_dq_ptrs)
        acc = ()
        for _i in gl.static_range(PARTS):
            acc = acc + (gl.zeros((64, BN), gl.float32, layout=L),)
        part = gl.zeros((64, BN), gl.float32, layout=L)
        # Not `stage`: a name that has the same value before the loop as it is given within is taken for a constant.
        last_stage = 0
        for k in range(num_k):
            if not B_PER_ROW:
                # One K block ahead, so that no promotion waits for it.
                b_dq = b_dq_next
                b_dq_next = gl.load(b_dq_ptrs + gl.minimum(k + 1, num_k - 1) * b_dq_k)
            next_stage = stage + 1
            next_phase = phase
            if next_stage == STAGES:
                next_stage = 0
                next_phase = phase ^ 1
            a_buf = a_bufs.index(stage * WARPGROUPS + WARPGROUP)
            b_buf = b_bufs.index(stage).permute((1, 0))
            acc_next = ()
            for i in gl.static_range(PARTS):
                a = a_buf.slice(i * 64, 64)
                # use_acc=False: the chain starts from zero, `part` only tells which registers to use.
                running = warpgroup_mma(a, b_buf, part, use_acc=False, is_async=True)
                if i == 0:
                    # All parts' here: a read of shared memory after a barrier costs a synchronisation of the warpgroup.
                    a_dq = ()
                    for j in gl.static_range(PARTS):
                        a_dq_part = a_dq_bufs.index(stage).slice((WARPGROUP * PARTS + j) * 64, 64)
                        a_dq = a_dq + (a_dq_part.load(gl.SliceLayout(1, L)),)
                    if B_PER_ROW:
                        b_dq = b_dq_bufs.index(stage).load(gl.SliceLayout(0, L))
                if i == BARRIERS:
                    mbarrier.arrive(empty.index(last_stage), count=1, pred=k > 0)
                    mbarrier.wait(ready.index(next_stage), next_phase, pred=k + 1 < num_k)
                part = warpgroup_mma_wait(num_outstanding=0, deps=(running,))
                acc_next = acc_next + (_promote(acc[i], part, a_dq[i], b_dq, B_PER_ROW),)
            acc = acc_next
            last_stage = stage
            stage = next_stage
            phase = next_phase
        mbarrier.arrive(empty.index(last_stage), count=1)
        for i in gl.static_range(PARTS):
            slices = _slices(acc[i], C_COLUMNS)
            for j in gl.static_range(BN // C_COLUMNS):
                tma.store_wait(0)
                c_buf.store(gl.convert_layout(slices[j], L_C).to(c_desc.dtype))
                fence_async_shared()
                _tma_store(c_desc, [pm * BM + (WARPGROUP * PARTS + i) * 64, pn * BN + j * C_COLUMNS], c_buf)
        mbarrier.wait(ready.index(stage), phase)
        tile = _next_tile(tile_bufs.index(stage))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["M", "N", "K", "a_dq_k", "b_dq_n", "b_dq_k"],
    do_not_specialize_on_alignment=["b_dq_ptr", "counter_ptr"],
)
def _gemm_hopper_kernel(
    a_desc, b_desc, c_desc, a_dq_desc, b_dq_desc, b_dq_ptr, counter_ptr, M, N, K, a_dq_k, b_dq_n, b_dq_k,
    B_PER_ROW: gl.constexpr, WARPGROUPS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [N, K]^T; a_dq_k and b_dq_k are the multipliers' strides along K, b_dq_n b's along blocks of N."""
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES * WARPGROUPS, 64 * PARTS, 128], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, 128], b_desc.layout)
    c_bufs = gl.allocate_shared_memory(c_desc.dtype, [WARPGROUPS] + c_desc.block_type.shape, c_desc.layout)
    a_dq_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, A_DQ_ROWS], a_dq_desc.layout)
    if B_PER_ROW:
        b_dq_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BN], b_dq_desc.layout)
    else:
        b_dq_bufs = a_dq_bufs
    tile_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    # Literal tuples: a tuple bound to a name first would turn its constexprs into tensors.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    0, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
                    M, N, K, b_dq_n, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
                (_multiply_tiles, (
                    1, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
                    M, N, K, b_dq_n, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
                (_load_tiles, (
                    a_desc, b_desc, a_dq_desc, b_dq_desc, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, tile_bufs, ready, empty,
                    counter_ptr, M, N, K, a_dq_k, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    0, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
                    M, N, K, b_dq_n, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
                (_multiply_tiles, (
                    1, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
                    M, N, K, b_dq_n, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
                (_multiply_tiles, (
                    2, c_desc, b_dq_ptr, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, c_bufs, tile_bufs, ready, empty,
                    M, N, K, b_dq_n, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
                (_load_tiles, (
                    a_desc, b_desc, a_dq_desc, b_dq_desc, a_bufs, b_bufs, a_dq_bufs, b_dq_bufs, tile_bufs, ready, empty,
                    counter_ptr, M, N, K, a_dq_k, b_dq_k, B_PER_ROW, WARPGROUPS, PARTS, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


E4M3_TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
FP32_VECTOR = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@dataclass(frozen=True)
class Tiling:
    """How a tile of `rows` x 128 is shared out: to `warpgroups`, in `parts` of 64 rows each, through `stages` of shared memory."""

    warpgroups: int
    parts: int
    stages: int
    c_row_bytes: int
    """A warpgroup stores 64 rows of so many bytes at a time."""
    registers: int
    """Of a thread at the start: what a multiprocessor has for all warps, a fourth for one that loads. Then they trade."""

    @property
    def rows(self) -> int:
        return 64 * self.parts * self.warpgroups

    def c_columns(self, dtype: torch.dtype) -> int:
        return self.c_row_bytes // dtype.itemsize

    def c_layout(self, dtype: torch.dtype) -> gl.NVMMASharedLayout:
        return gl.NVMMASharedLayout(swizzle_byte_width=self.c_row_bytes, element_bitwidth=8 * dtype.itemsize, rank=2)

    @property
    def constants(self) -> tuple[int, int, int]:
        """The kernel's WARPGROUPS, PARTS, STAGES."""
        return self.warpgroups, self.parts, self.stages

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": 4, "maxnreg": self.registers, "enable_fp_fusion": True}


LOW = Tiling(warpgroups=3, parts=1, stages=5, c_row_bytes=64, registers=128)
"""192x128, which leaves shared memory for a fifth stage."""

HIGH = Tiling(warpgroups=2, parts=2, stages=4, c_row_bytes=128, registers=168)
"""256x128: less to load, and the two parts of a warpgroup share one read of b's multipliers."""


def tiling_of(M: int, N: int, K: int, b_per_row: bool, multiprocessors: int) -> Tiling:
    """The faster one for c [M, N].

    With a b per row HIGH: three warpgroups have no registers for the multipliers of 32 columns, and two fp32 operations an element
    take their time whatever the number of warpgroups. Else by the rows that the busiest multiprocessor computes, times what a row
    takes: so much for a K block and so much to begin and store, in K blocks of HIGH (fitted to five shapes on an H200).
    """
    if b_per_row:
        return HIGH

    def time(tiling: Tiling, k_block: float, ends: float) -> float:
        tiles = ceil_div(M, tiling.rows) * ceil_div(N, BN.value)
        return ceil_div(tiles, multiprocessors) * tiling.rows * (ceil_div(K, 128) * k_block + ends)

    return LOW if time(LOW, 0.972, 2.9) < time(HIGH, 1.0, 2.3) else HIGH


@contextmanager
def assembler_for(b_per_row: bool) -> Iterator[None]:
    """Where a compilation takes the ptxas that suits the kernel.

    Triton 3.6 assembles for Hopper with ptxas 12.8 and ships 12.9 for Blackwell. 12.9 lets the promotion's FFMAs yield the issue
    port to the other warpgroup's wgmma: 1.02 instead of 0.97 of cuBLASLt's speed on an H100. Where a promotion has a second
    multiply, 12.8's code is the faster: 1.05 against 1.00. Newer versions of Triton are left to their own choice.
    """
    with knobs.nvidia.scope():
        if not b_per_row and tuple(map(int, knobs.nvidia.ptxas.version.split("."))) < (12, 9):
            knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell.path
        yield
