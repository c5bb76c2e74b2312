"""Small warp-specialised kernels without a race, to show what compute-sanitizer's racecheck makes of such kernels.

    compute-sanitizer --tool racecheck python -m tests.warp_specialized

Racecheck (2025.3) seems to count on all threads of a program meeting at the same barriers. Here the first warpgroup meets at one of its
own, `bar.sync 0, 128`, before it tells the other warps their work. Both sides of that meet at a barrier of all threads, between writing
and reading, and again before the next writing; racecheck reports a race. Of the same kernel without the first warpgroup's own barriers
it reports none. In `handing` the first of three partitions hands numbers to the others by mbarriers, as the Hopper GEMM's tiles are.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# Warps and registers of the second and third partition, as the Hopper GEMM has them.
WARPS = gl.constexpr([4, 1])
REGISTERS = gl.constexpr([240, 24])
OPTIONS = {"num_warps": 4, "maxnreg": 168}


@gluon.jit
def _add(x_ptr, n, partition: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offsets = partition * 128 + gl.arange(0, 128, layout=layout)
    for _ in range(n):
        gl.store(x_ptr + offsets, gl.load(x_ptr + offsets) + 1)


@gluon.jit
def adding(x_ptr, n, MEET_BEFORE: gl.constexpr):
    """Each of three partitions adds n to its 128 numbers of x."""
    if MEET_BEFORE:
        by_one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        by_four: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        buffer = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        for _ in range(3):
            buffer.store(gl.load(x_ptr + gl.arange(0, 128, layout=by_one)))
            gl.store(x_ptr + gl.arange(0, 128, layout=by_four), buffer.load(by_four))
    gl.warp_specialize([(_add, (x_ptr, n, 0)), (_add, (x_ptr, n, 1)), (_add, (x_ptr, n, 2))], WARPS, REGISTERS)


@gluon.jit
def _hand_out(x_ptr, n, buffers, ready, empty, partition: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(n):
        mbarrier.wait(empty.index(i % 2), (i // 2 & 1) ^ 1)
        buffers.index(i % 2).store(gl.full([1], i, gl.int32, layout=layout))
        mbarrier.arrive(ready.index(i % 2), count=1)


@gluon.jit
def _sum_up(x_ptr, n, buffers, ready, empty, partition: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = 0
    for i in range(n):
        mbarrier.wait(ready.index(i % 2), i // 2 & 1)
        total += gl.max(buffers.index(i % 2).load(layout), 0)
        mbarrier.arrive(empty.index(i % 2), count=1)
    offsets = partition * 128 + gl.arange(0, 128, layout=layout)
    gl.store(x_ptr + offsets, gl.zeros([128], gl.float32, layout=layout) + total)


@gluon.jit
def handing(x_ptr, n):
    """One warp hands 0 to n - 1 to two warpgroups, which write the sum to their 128 numbers of x."""
    buffers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_up, (x_ptr, n, buffers, ready, empty, 0)),
            (_sum_up, (x_ptr, n, buffers, ready, empty, 1)),
            (_hand_out, (x_ptr, n, buffers, ready, empty, 2)),
        ],
        WARPS,
        REGISTERS,
    )


if __name__ == "__main__":
    for kernel, arguments, expected in (
        (adding, (False,), [5, 5, 5]),
        (adding, (True,), [5, 5, 5]),
        (handing, (), [10, 10, 0]),
    ):
        x = torch.zeros(3, 128, device="cuda")
        kernel[(1,)](x, 5, *arguments, **OPTIONS)
        assert x.tolist() == [[value] * 128 for value in expected]
        print(f"after {kernel.fn.__name__}{arguments}", flush=True)
