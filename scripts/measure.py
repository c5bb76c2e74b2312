"""How times are taken: candidates in turns, CUDA events, an emptied L2, medians and spreads. Shared by the benchmarks."""

import argparse
import importlib
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from blockfp8_titan.ops.backend import triton_obstacle

FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100
SAMPLE_US = 3000.0
MIN_ROUNDS, MAX_ROUNDS = 5, 20
MAX_LAUNCHES = 500  # a GPU queues about a thousand


def duration(text: str) -> float:
    """Seconds, as an argument of a script."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return value


@dataclass(frozen=True)
class Pace:
    """How a candidate is sampled: launches per sample, and the host's µs to issue one."""

    launches: int
    host_us: float


class Timer(Protocol):
    def pace(self, run: Callable[[], object]) -> Pace: ...
    def sample(self, run: Callable[[], object], pace: Pace) -> float: ...
    def synchronize(self) -> None: ...


class CudaTimer:
    """CUDA events around back-to-back launches, L2 emptied before.

    Args:
        device: the GPU.
        sample_us: how long the launches of a sample last together, roughly.
        least: launches of a sample at least.
        ahead: the GPU waits until the host has issued a sample's launches, so that gaps between kernels are the GPU's alone;
            else the host issues while the GPU works, as in training, and a slow host costs time.
    """

    def __init__(self, device: torch.device, *, sample_us: float = SAMPLE_US, least: int = 1, ahead: bool = True):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.sample_us = sample_us
        self.least = least
        self.ahead = ahead

    def pace(self, run: Callable[[], object]) -> Pace:
        run()
        self.synchronize()
        host_us = host_us_per_call(run, 5)
        us = self.sample(run, Pace(3, host_us))
        return Pace(min(max(math.ceil(self.sample_us / us), self.least), MAX_LAUNCHES), host_us)

    def sample(self, run: Callable[[], object], pace: Pace) -> float:
        """µs per launch."""
        self.flush.zero_()
        if self.ahead:
            torch.cuda._sleep(int(pace.launches * pace.host_us * 2000))  # at 2 cycles a ns
        self.start.record()
        for _ in range(pace.launches):
            run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1000 / pace.launches

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def host_us_per_call(run: Callable[[], object], calls: int) -> float:
    """The median of what calls take to return."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def interleave(
    runs: Mapping[str, tuple[Callable[[], object], Pace]], timer: Timer, deadline: float
) -> dict[str, list[float]]:
    """Sample candidates in turn, in a new order each round.

    Args:
        runs: by name what to launch and how to sample it.
        deadline: of `time.monotonic`; at least `MIN_ROUNDS` are sampled however long they take.
    Returns:
        µs per launch, one for each round and name; the first round, which warms up, is left out.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(0).shuffle
    for number in range(1 + MAX_ROUNDS):
        if number > MIN_ROUNDS and time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            us = timer.sample(*runs[name])
            if number > 0:
                samples[name].append(us)
    return samples


def spread(samples: Sequence[float]) -> float:
    """(90th - 10th percentile) / median."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(samples)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are aligned left."""
    align = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


PEERS = {
    "torchao": "torchao.prototype.blockwise_fp8_training.kernels",
    "fbgemm": "fbgemm_gpu.experimental.gen_ai",
    "deep_gemm": "deep_gemm",
}


def find_peers() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers that can be imported, and why the others cannot."""
    present, absent = {}, {}
    for name, module in PEERS.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a binary built for another torch raises whatever it likes
            absent[name] = reason(error)
        else:
            package = importlib.import_module(module.partition(".")[0])
            present[name] = getattr(package, "__version__", "of unknown version")
    return present, absent


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def fp8_gpu(program: str) -> torch.device | None:
    """The current GPU where our kernels run on it; else None, and stderr says why this program cannot go on."""
    if not torch.cuda.is_available():
        print(f"{program} times GPU kernels, and there is no CUDA GPU here", file=sys.stderr)
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    if obstacle := triton_obstacle(device):
        print(f"{program} times GPU kernels, and ours cannot run here: {obstacle}", file=sys.stderr)
        return None
    return device


def peak_tflops(gpu: str) -> dict[str, float] | None:
    """Dense tensor-core peaks from NVIDIA's data sheets; None for a GPU that is not among them."""
    peaks = {
        "H100 PCIe": (1513, 756),
        "H100 NVL": (1671, 835),
        "H200 NVL": (1671, 835),
        "H100": (1979, 989),
        "H200": (1979, 989),
        "B200": (4500, 2250),
    }
    found = next((peak for name, peak in peaks.items() if name in gpu), None)
    return dict(zip(("fp8", "bf16"), map(float, found), strict=True)) if found else None
