"""Read what a GPU did from a Chrome trace of torch.profiler: kernels by group, exposed communication, idle time."""

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a kernel does, by the op that launched it and its own name; the first match decides.
GROUPS = (
    ("NCCL all-gather", r"nccl\w*AllGather"),
    ("NCCL reduce-scatter", r"nccl\w*ReduceScatter"),
    ("NCCL all-reduce", r"nccl\w*AllReduce"),
    ("NCCL other", r"ncclDevKernel|ncclKernel"),
    ("inductor", r"\btriton_(poi|red|per|for|mix)_"),
    (
        "copies and casts",
        r"[Mm]emcpy|[Mm]emset|_foreach_copy_|split_with_sizes|chunk_cat|CatArray|(direct|bfloat16|float8)_copy",
    ),
    ("fp8 GEMM", r"blockfp8::gemm|_scaled_mm|nvjet_qq|\b_gemm_(hopper_)?kernel|gemm_1x128_128"),
    ("quantise", r"blockfp8::|quantize|blockwise_(act|weight)_quant|\b_(transpose|rms_norm_rstd)_kernel"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("optimizer and norm", r"multi_tensor_apply|[Aa]dam|_foreach_"),
    ("bf16 GEMM", r"aten::(mm|addmm|bmm|baddbmm)\b|nvjet|gemm|cublas|splitK|\btriton_tem_"),
    ("other", r""),
)
COMMUNICATION = ("NCCL all-gather", "NCCL reduce-scatter", "NCCL all-reduce", "NCCL other")
COPIES = ("copies and casts",)
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
STEP = "ProfilerStep#"


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the GPU; times in µs on the trace's clock."""

    name: str
    op: str
    """The innermost operator that launched it; empty where the trace does not tell."""
    start: float
    end: float

    @property
    def group(self) -> str:
        text = f"{self.op} {self.name}"
        return next(group for group, pattern in GROUPS if re.search(pattern, text))

    @property
    def label(self) -> str:
        """The name without C++ template arguments and signature."""
        name = self.name.removeprefix("void ").replace("(anonymous namespace)::", "")
        return re.sub(r"[<(].*", "", name).strip()[:100]


@dataclass(frozen=True)
class Trace:
    """What ran, by start, and the window in µs: the last profiled step, or from the first kernel to the last where no step is marked."""

    kernels: tuple[Kernel, ...]
    window: tuple[float, float]


def read_trace(path: Path) -> Trace:
    """Of a file that `torch.profiler` exported, gzipped or not.

    Raises:
        ValueError: no kernel ran on a GPU.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return trace_of(json.load(file)["traceEvents"], str(path))


def trace_of(events: Sequence[dict[str, Any]], source: str) -> Trace:
    complete = [event for event in events if event.get("ph") == "X"]
    ops = {
        event["args"]["External id"]: event["name"]
        for event in complete
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    steps = [event for event in complete if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)]
    begin = max((event["ts"] for event in steps), default=None)
    kernels = [
        Kernel(
            event["name"],
            ops.get(event.get("args", {}).get("External id"), ""),
            event["ts"],
            event["ts"] + event["dur"],
        )
        for event in complete
        if event.get("cat") in ON_GPU and (begin is None or event["ts"] >= begin)
    ]
    if not kernels:
        raise ValueError(f"{source}: no kernel ran on a GPU; profile on a machine that has one")
    kernels.sort(key=lambda kernel: kernel.start)
    end = max(kernel.end for kernel in kernels)
    if begin is None:
        return Trace(tuple(kernels), (kernels[0].start, end))
    step_end = max(event["ts"] + event["dur"] for event in steps)
    return Trace(tuple(kernels), (begin, max(end, step_end)))


Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint, sorted intervals that cover the same."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Of what they cover; overlaps count once."""
    return sum(end - start for start, end in union(intervals))


def timeline(trace: Trace) -> dict[str, float]:
    """The window's µs, shared out: each moment counts once, for the first of these that it belongs to.

    compute: a kernel runs that neither communicates nor copies. exposed communication: NCCL runs and no such kernel.
    exposed copies: only copies run. idle: nothing runs.
    """
    compute, communication, copies = [], [], []
    for kernel in trace.kernels:
        kind = communication if kernel.group in COMMUNICATION else copies if kernel.group in COPIES else compute
        kind.append((kernel.start, kernel.end))
    covered = [length(compute), length(compute + communication), length(compute + communication + copies)]
    window = trace.window[1] - trace.window[0]
    return {
        "compute": covered[0],
        "exposed communication": covered[1] - covered[0],
        "exposed copies": covered[2] - covered[1],
        "idle": window - covered[2],
    }


def gaps(trace: Trace) -> list[tuple[float, str]]:
    """When nothing ran: µs, and the label of the kernel that ended it, "end of the step" after the last; longest first."""
    found = []
    end = trace.window[0]
    for kernel in trace.kernels:
        if kernel.start > end:
            found.append((kernel.start - end, kernel.label))
        end = max(end, kernel.end)
    if trace.window[1] > end:
        found.append((trace.window[1] - end, "end of the step"))
    return sorted(found, reverse=True)


def summarise(trace: Trace) -> dict[str, Any]:
    """Ready for JSON: window_ms; timeline_ms; groups and kernels, by falling time, with calls, ms and share of the window; idle,
    by falling time: what a gap came before, how many gaps, ms and longest_ms.

    Kernels of different streams overlap, so that shares may add up to more than 1.
    """
    window = trace.window[1] - trace.window[0]

    def row(kernels: Sequence[Kernel]) -> dict[str, Any]:
        us = sum(kernel.end - kernel.start for kernel in kernels)
        return {"calls": len(kernels), "ms": us / 1e3, "share": us / window}

    groups: dict[str, list[Kernel]] = {}
    labels: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in trace.kernels:
        groups.setdefault(kernel.group, []).append(kernel)
        labels.setdefault((kernel.label, kernel.op, kernel.group), []).append(kernel)
    kernels = [{"kernel": k, "op": op, "group": group, **row(found)} for (k, op, group), found in labels.items()]
    idle: dict[str, list[float]] = {}
    for us, before in gaps(trace):
        idle.setdefault(before, []).append(us)
    waits = [
        {"before": label, "gaps": len(us), "ms": sum(us) / 1e3, "longest_ms": max(us) / 1e3}
        for label, us in idle.items()
    ]
    return {
        "window_ms": window / 1e3,
        "timeline_ms": {name: us / 1e3 for name, us in timeline(trace).items()},
        "launches": len(trace.kernels),
        "groups": dict(sorted(((g, row(found)) for g, found in groups.items()), key=lambda item: -item[1]["ms"])),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]),
        "idle": sorted(waits, key=lambda wait: -wait["ms"]),
    }
