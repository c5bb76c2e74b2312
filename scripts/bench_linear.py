"""Time forward and backward of Llama's Linears and of a whole block under our converter and its peers, in one process.

    python scripts/bench_linear.py
    python scripts/bench_linear.py --flavors 8B 70B --tokens 8192 --subjects linears block --seconds 300
    python scripts/bench_linear.py --subjects wk --converters bf16 blockwise_fp8 --modes eager

Subjects: "linears", the seven of a block with inputs of their own, those that share one in Llama sharing it here; "block",
torchtitan's TransformerBlock; or one Linear by name. Weights are bf16, as FSDP2 hands them over; no activation checkpointing.
Eager and compiled candidates take turns on the same data, in a new order each round; a sample is the mean of back-to-back steps
that the host issues while the GPU works, as in training. Gradients are compared with those of bf16.

Torchao's blockwise kernels tune themselves for minutes: subjects with less time are measured without.

Writes NAME.json and NAME.md to --out. Exits with 2 where there is no suitable GPU, with 1 when a result is wrong.
"""

import argparse
import copy
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gpu_trace
import torch
import torch.nn as nn
from bench_kernels import Budget, measure
from candidates import GEMMS, GemmOperands
from linear_subjects import (
    BF16,
    CONVERTERS,
    MODES,
    SEQUENCE,
    SUBJECTS,
    Mode,
    Step,
    as_torchtitan_compiles,
    kernels_of,
    largest_error,
    memory_of,
    subject_of,
)
from measure import CudaTimer, Timer, duration, fp8_gpu, interleave, reason, spread, table
from provenance import provenance
from result_files import add_out, write_json, write_text
from shapes import FORWARD, Kind, Shape
from torch import Tensor
from torchtitan.models.llama3 import llama3_args

SAMPLE_US = 60_000.0
LEAST_STEPS = 3

# GEMMs, the roof


def gemms_of(sizes: Sequence[tuple[int, int]], tokens: int, dw: Kind) -> list[tuple[Kind, int, int, int]]:
    """The three GEMMs (kind, M, N, K) of each Linear."""
    found: list[tuple[Kind, int, int, int]] = []
    for out, into in sizes:
        found += [(FORWARD, tokens, out, into), (FORWARD, tokens, into, out), (dw, out, into, tokens)]
    return found


Roofs = dict[tuple[Kind, int, int, int], dict[str, float]]


def measure_roofs(
    gemms: Sequence[tuple[Kind, int, int, int]],
    names: Sequence[str],
    timer: Timer,
    device: torch.device,
    seconds: float,
) -> Roofs:
    """µs of each GEMM by contender of `candidates.GEMMS`; those that cannot run or are wrong are left out."""
    contenders = [contender for contender in GEMMS if contender.name in names]
    distinct = list(dict.fromkeys(gemms))
    roofs: Roofs = {}
    for gemm in distinct:
        operands = GemmOperands(Shape(*gemm, ("roof",)), device)
        budget = Budget(seconds / len(distinct))
        records = measure(*(contenders, operands, timer, budget, budget.left), work=None, base=BF16, copy_gbps=None)
        roofs[gemm] = {name: record["us"] for name, record in records.items() if "us" in record and not record["wrong"]}
    return roofs


def roof_us(gemms: Sequence[tuple[Kind, int, int, int]], contender: str, roofs: Roofs) -> float | None:
    """What the GEMMs alone take; None where one was not measured."""
    times = [roofs.get(gemm, {}).get(contender) for gemm in gemms]
    return None if None in times else sum(times)


# Measurement


def bench_subject(
    name: str,
    flavor: str,
    tokens: int,
    *,
    converters: Sequence[str],
    modes: Sequence[Mode],
    timer: Timer,
    ahead: Timer,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Measure one subject under all converters and modes.

    Args:
        timer: for steps that the host issues while the GPU works; gives us.
        ahead: for steps issued before the GPU begins; gives gpu_us. Also times the GEMMs of the roof.
        seconds: for this subject, roughly; at least `measure.MIN_ROUNDS` are sampled.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {flavor} {text}", flush=True)

    subject = subject_of(name, flavor, tokens, device)
    record: dict[str, Any] = {"subject": name, "flavor": flavor, "tokens": tokens}
    candidates: dict[tuple[str, Mode], dict[str, Any]] = {}
    steps: dict[tuple[str, Mode], Step] = {}
    exact: list[Tensor] | None = None
    # bf16 first, which the others are compared with.
    in_order = sorted(converters, key=lambda c: (c != BF16, CONVERTERS[c].tunes))
    for key in itertools.product(in_order, sorted(modes, key=MODES.index)):
        converter, mode = key
        if exact is None and converter != BF16:
            candidates[key] = {"failed": "not measured: bf16, which it is to be compared with, was not"}
            continue
        tunes = 0.0 if any(done == converter for done, _ in steps) else CONVERTERS[converter].tunes
        if tunes > seconds - (time.monotonic() - began):
            why = "its kernels tune themselves for minutes" if tunes else "time was up"
            candidates[key] = {"failed": f"not measured: {why}; give more --seconds"}
            continue
        try:
            # The weights are the subject's: gradients alone are a candidate's own.
            module = _twin(subject.module)
            CONVERTERS[converter].convert(module)
            step = Step(module, subject, mode)
            with as_torchtitan_compiles(converter):
                found = step.results()
            exact = exact or found
            error = largest_error(exact, found)
            del found
            wrong = not error <= subject.bound
            candidates[key] = {"error": error if math.isfinite(error) else None, "wrong": wrong}
            candidates[key] |= step.saved()
            if device.type == "cuda":
                candidates[key] |= memory_of(step)
            steps[key] = step
            say(f"{name}: {converter}, {mode} is ready, largest error {error:.1e}")
        except Exception as failure:  # one that cannot run here must not end the run
            candidates[key] = {"failed": reason(failure)}
            say(f"{name}: {converter}, {mode}: {reason(failure)}")
    exact = None
    _free(device)

    kinds = {converter: gemms_of(subject.sizes, tokens, CONVERTERS[converter].dw) for converter in converters}
    roof_names = {CONVERTERS[converter].roof for converter in converters}
    every = [gemm for gemms in kinds.values() for gemm in gemms]
    roofs = measure_roofs(every, sorted(roof_names), ahead, device, 0.2 * seconds)
    _free(device)

    left = max(seconds - (time.monotonic() - began), 0.0)
    for clock, field, share in ((ahead, "gpu_us", 0.3), (timer, "us", 0.7)):
        paces = {" | ".join(key): (step, clock.pace(step)) for key, step in steps.items()}
        samples = interleave(paces, clock, time.monotonic() + share * left)
        for key in steps:
            times = samples[" | ".join(key)]
            candidates[key][field] = statistics.median(times)
            if field == "us":
                base = samples.get(" | ".join((BF16, key[1])))
                ratio = statistics.median(b / t for t, b in zip(times, base, strict=True)) if base else None
                more = {"spread": spread(times), "rounds": len(times), "host_us": paces[" | ".join(key)][1].host_us}
                candidates[key] |= {"ratio": ratio, **more}
    for (converter, mode), candidate in candidates.items():
        if "us" in candidate:
            if device.type == "cuda":  # last, since a profiler that has run may leave its hooks behind
                try:
                    candidate |= kernels_of(steps[converter, mode])
                except ValueError as failure:  # the profiler saw nothing: what was timed must survive
                    say(f"{name}: {converter}, {mode}: kernels not counted, {failure}")
            candidate["gemm_us"] = roof_us(kinds[converter], CONVERTERS[converter].roof, roofs)
            candidate["roof_share"] = candidate["gemm_us"] / candidate["us"] if candidate["gemm_us"] else None
    record["gemms"] = [{"kind": kind, "M": m, "N": n, "K": k, "us": times} for (kind, m, n, k), times in roofs.items()]
    record["candidates"] = [
        {"converter": converter, "mode": mode, **candidate} for (converter, mode), candidate in candidates.items()
    ]
    return record


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the structure that shares parameters and buffers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What became of it


def _gib(candidate: dict[str, Any], field: str) -> str:
    return f"{candidate[field] / 2**30:.2f}" if field in candidate else "—"


def overview(record: dict[str, Any]) -> str:
    """One subject as Markdown."""
    header = (
        *("converter", "mode", "ms", "spread", "× bf16", "GPU ms", "host ms", "launches", "GEMMs alone, share"),
        *("saved, GiB", "× bf16", "of it weights", "held, GiB", "peak, GiB", "largest error"),
    )
    saved = {c["mode"]: c["saved_bytes"] for c in record["candidates"] if c["converter"] == BF16 and "saved_bytes" in c}
    rows = []
    for c in record["candidates"]:
        if "us" not in c:
            rows.append((c["converter"], c["mode"], *["—"] * (len(header) - 3), c["failed"].replace("|", "\\|")))
            continue
        error = "not finite" if c["error"] is None else f"{c['error']:.1e}"
        rows.append(
            (
                *(c["converter"], c["mode"], f"{c['us'] / 1e3:.3f}", f"{c['spread']:.1%}"),
                "—" if c["ratio"] is None else f"{c['ratio']:.3f}",
                *(f"{c['gpu_us'] / 1e3:.3f}", f"{c['host_us'] / 1e3:.3f}", str(c.get("launches", "—"))),
                "—" if c["roof_share"] is None else f"{c['roof_share']:.0%}",
                _gib(c, "saved_bytes"),
                f"{c['saved_bytes'] / saved[c['mode']]:.2f}" if saved.get(c["mode"]) else "—",
                *(
                    _gib(c, "saved_weight_bytes"),
                    _gib(c, "held_bytes"),
                    _gib(c, "peak_bytes"),
                    error + " WRONG" * c["wrong"],
                ),
            )
        )
    title = f"### {record['flavor']} {record['subject']}, {record['tokens']:,} tokens"
    return f"{title}\n\n{table(header, rows, left=2)}"


def groups_table(record: dict[str, Any]) -> str:
    """µs by kind of kernel, a column for each candidate, as Markdown."""
    found = [c for c in record["candidates"] if "group_us" in c]
    present = [group for group, _ in gpu_trace.GROUPS if any(group in c["group_us"] for c in found)]
    rows = [(g, *(f"{c['group_us'][g]:,.0f}" if g in c["group_us"] else "—" for c in found)) for g in present]
    return table(("µs", *(f"{c['converter']}, {c['mode']}" for c in found)), rows)


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    parts = [
        "# Linears and blocks, forward and backward",
        f"{result['gpu']}; {versions}; {result['date']}, commit {result['commit']}.",
        "ms: a step of forward and backward, back to back, issued while the GPU works; GPU ms: issued before it begins; host ms: to "
        "issue one. × bf16: the median over rounds of the ratio of speeds, eager to eager and compiled to compiled; spread is (90th - "
        "10th percentile) / median. GEMMs alone: what the Linears' three GEMMs take by themselves in this run (cuBLASLt's blockwise "
        "ones for blockwise, cuBLAS's or `_scaled_mm`'s for the others), as a share of the step. Saved: storages that autograd keeps "
        "for backward, without parameters; of it weights: those shaped like a parameter, quantised weights; held: what the allocator "
        "holds then, without outputs; peak: of a step, above what was there. Error: the largest relative one of y, dx and dw against "
        "bf16, eager where that was measured.",
    ]
    for record in result["subjects"]:
        parts.append(overview(record))
        if any("group_us" in candidate for candidate in record["candidates"]):
            parts.append(groups_table(record))
    if result["dropped"]:
        parts.append("Not measured:\n" + "\n".join(f"- {name}: {why}" for name, why in result["dropped"].items()))
    return "\n\n".join(parts) + "\n"


def bench(
    timer: Timer,
    ahead: Timer,
    device: torch.device,
    *,
    flavors: Sequence[str],
    subjects: Sequence[str],
    tokens: int,
    converters: Sequence[str],
    modes: Sequence[Mode],
    seconds: float,
    write: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure and return the result, ready for JSON; a subject not begun in time is named in "dropped".

    Args:
        write: called with what there is after each subject.
    """
    records: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    result = {
        **provenance(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "subjects": records,
        "dropped": dropped,
    }
    jobs = list(itertools.product(flavors, subjects))
    end = time.monotonic() + seconds
    for number, (flavor, name) in enumerate(jobs):
        left = end - time.monotonic()
        if left <= 0:
            dropped[f"{flavor} {name}"] = "time was up"
            continue
        try:
            record = bench_subject(
                *(name, flavor, tokens),
                converters=converters,
                modes=modes,
                timer=timer,
                ahead=ahead,
                device=device,
                seconds=left / (len(jobs) - number),
            )
        except Exception as failure:  # out of memory, say: what was measured must survive
            dropped[f"{flavor} {name}"] = reason(failure)
        else:
            records.append(record)
            print(f"\n{overview(record)}", flush=True)
        write(result)
        torch._dynamo.reset()
        _free(device)
    return result


def wrong_results(result: dict[str, Any]) -> list[str]:
    return [
        f"{record['flavor']} {record['subject']}: {candidate['converter']}, {candidate['mode']}"
        for record in result["subjects"]
        for candidate in record["candidates"]
        if candidate.get("wrong")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavors", nargs="+", choices=list(llama3_args), default=["8B"], metavar="FLAVOR")
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=SUBJECTS,
        default=["linears", "block", "wq", "wk", "w1", "w2"],
        metavar="SUBJECT",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument(
        "--converters", nargs="+", choices=list(CONVERTERS), default=list(CONVERTERS), metavar="CONVERTER"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--seconds", type=duration, default=480, help="subjects not begun by then are dropped (default: %(default)s)"
    )
    add_out(parser)
    parser.add_argument("--name", default="bench_linear", help="of the files written (default: %(default)s)")
    args = parser.parse_args(arguments)
    if BF16 not in args.converters:
        parser.error("--converters: bf16 must be among them, the others are compared with it")
    if args.tokens < 128 or args.tokens % min(args.tokens, SEQUENCE):
        parser.error(f"--tokens {args.tokens}: must be 128 or more, and above {SEQUENCE} a multiple of it")
    if (device := fp8_gpu("bench_linear.py")) is None:
        return 2

    args.out.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        write_json(args.out / f"{args.name}.json", result)
        write_text(args.out / f"{args.name}.md", report(result))

    torch.manual_seed(0)
    result = bench(
        CudaTimer(device, sample_us=SAMPLE_US, least=LEAST_STEPS, ahead=False),
        CudaTimer(device),
        device,
        flavors=args.flavors,
        subjects=args.subjects,
        tokens=args.tokens,
        converters=args.converters,
        modes=args.modes,
        seconds=args.seconds,
        write=write,
    )
    print(f"written to {args.out}: {args.name}.json, .md")
    for name, why in result["dropped"].items():
        print(f"not measured: {name}: {why}", file=sys.stderr)
    wrong = wrong_results(result)
    for name in wrong:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
