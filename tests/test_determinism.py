"""The same bits from every launch: a race between warps, or a read of what nobody wrote, would show now and then."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blockfp8_titan import ops
from blockfp8_titan.ops import gemm as gemm_ops

from .data import draw, poisoned

# (M, N, K): a part of a tile, ragged in every dimension, K of many and of few blocks, more tiles than a GPU has multiprocessors.
GEMMS = [(1, 16, 16), (515, 528, 640), (144, 272, 129), (512, 768, 8192), (4097, 1040, 256)]
MATRICES = [(1, 16), (129, 208), (1003, 1296), (4096, 1024)]

Run = Callable[[], Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


def gemm_runs(device: str, M: int, N: int, K: int) -> dict[str, Run]:
    def columns(m: int) -> tuple[Tensor, Tensor]:
        # As dw has them: any K, rows at multiples of 16 bytes. No NaN, which would hide what differs.
        return ops.quantize_1x128_both(draw("outliers", K, m + -m % 16, torch.float32).to(device))[2:]

    a_q, a_dq = columns(M)
    a = a_q[:M], a_dq[:M].t().contiguous().t()
    b_q, b_dq = ops.quantize_128x128(draw("uniform", K, N, torch.float32).to(device))
    by_kind = {"1x128_128x128": (ops.transpose_fp8(b_q), b_dq.t()), "1x128_1x128": columns(N)}
    runs: dict[str, Run] = {}
    for kind, b in by_kind.items():
        for dtype in (torch.bfloat16, torch.float32):
            name = f"gemm_{kind} {M}x{N}x{K} {dtype}"
            op = getattr(ops, f"gemm_{kind}")
            runs[name] = lambda op=op, b=b, dtype=dtype: op(*a, *b, dtype)
            if device == "cuda":
                runs[f"{name} triton"] = lambda op=op, b=b, dtype=dtype: op(*a, *b, dtype, backend="triton")
                per_row = kind == "1x128_1x128"
                runs[f"{name} portable"] = lambda b=b, dtype=dtype, per_row=per_row: gemm_ops._portable(
                    *a, *b, per_row, dtype
                )
    return runs


def quantize_runs(device: str, M: int, K: int) -> dict[str, Run]:
    x = draw("outliers", M, K, torch.bfloat16).to(device)
    q, dq = ops.quantize_128x128(x)
    size = f"{M}x{K}"
    return {
        f"quantize_1x128 {size}": lambda: ops.quantize_1x128(x),
        f"quantize_1x128_both {size}": lambda: ops.quantize_1x128_both(x),
        f"quantize_128x128 {size}": lambda: ops.quantize_128x128(x),
        f"quantize_rows {size}": lambda: ops.quantize_rows(x, dq, 0),
        f"transpose_fp8 {size}": lambda: ops.transpose_fp8(q),
    }


def words(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Results as integers, which tells 0 from -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [x.view(integers[x.element_size()]) for x in ((out,) if isinstance(out, Tensor) else out)]


@pytest.mark.parametrize(
    "device, batches, size", [("cpu", 1, 1), pytest.param("cuda", 25, 8, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_every_launch_gives_the_same_bits(device, batches, size):
    """200 launches on a GPU, in batches that follow each other closely, while another stream takes multiprocessors away."""
    runs: dict[str, Run] = {}
    for shape in GEMMS if device == "cuda" else GEMMS[:3]:
        runs |= gemm_runs(device, *shape)
    for shape in MATRICES if device == "cuda" else MATRICES[:2]:
        runs |= quantize_runs(device, *shape)
    first = {name: [x.clone() for x in words(run())] for name, run in runs.items()}
    other = torch.randn(1024, 1024, device=device)
    stream = torch.cuda.Stream() if device == "cuda" else None
    for _ in range(batches):
        for name, run in runs.items():
            with torch.cuda.stream(stream):  # None: stay
                other @ other
            outs = [run() for _ in range(size)]
            for out in outs:
                for i, (expected, got) in enumerate(zip(first[name], words(out), strict=True)):
                    assert torch.equal(expected, got), f"result {i} of {name}"
