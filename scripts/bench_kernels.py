"""Time our kernels and their peers in one process, on the Linears of Llama 3 and DeepSeek-V3.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --only gemm --shapes "70B w1" "8B wq" --seconds 60
    python scripts/bench_kernels.py --suite llama --only gemm --candidates ours tensorwise
    python scripts/bench_kernels.py --suite full --seconds 580 --name bench_kernels_full

Candidates take turns on the same random data, in a new order each round: a chip at its power limit slows down as it warms and
after a hungry neighbour, so times of separate runs do not compare. A sample is the mean of back-to-back launches that last about
3 ms together, between two CUDA events, after a write of 256 MB that empties L2; reported are the median of the samples and their
spread. Every candidate's result is checked. A peer that cannot be imported is named as absent.

Writes NAME.json and NAME.md to --out after every shape, and NAME.png at the end, which Ctrl-C brings forward. Exits with 2 where there
is no suitable GPU, with 1 when a result is wrong, with 130 when it was interrupted.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from candidates import BASE, COPY, GEMMS, QUANTIZERS, Candidate, Contender, GemmOperands, check
from kernel_plots import plot
from kernel_tables import multiprocessor_limits, overview, report, resources, summarise
from measure import (
    FLUSH_BYTES,
    MAX_ROUNDS,
    MIN_ROUNDS,
    SAMPLE_US,
    CudaTimer,
    Pace,
    Timer,
    duration,
    find_peers,
    fp8_gpu,
    host_us_per_call,
    interleave,
    peak_tflops,
    reason,
    spread,
)
from provenance import provenance
from result_files import add_out, write_json, write_text
from shapes import FORWARD, SUITES, WGRAD, Shape, chosen, gemm_shapes, quantize_shapes, spread_out

from blockfp8_titan.ops import library

TUNING_SHARE = 0.4
SHARES = {"gemm": 0.65, "quantize": 0.3, "host": 0.05}  # of the time, when all sections run


class Budget:
    """The seconds of a section, and the part of them that candidates which tune themselves for each shape may tune."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.tuning = TUNING_SHARE * seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def measure(
    contenders: Sequence[Contender],
    operands: Any,
    timer: Timer,
    budget: Budget,
    seconds: float,
    *,
    work: int | None,
    base: str,
    copy_gbps: float | None,
) -> dict[str, dict[str, Any]]:
    """Check all on these operands, then sample them in turn.

    Args:
        seconds: for this shape; at least `MIN_ROUNDS` are sampled however long they take.
        work: FLOPs of a launch, or None where the work is the bytes moved.
        base: the contender with which the others are compared, round by round.
        copy_gbps: of the run; None to compare with the base instead, which is then the copy of this shape.
    Returns:
        For each name us, spread, rounds, launches, bytes, gbps, percent_of_copy, ratio, error, wrong, and tflops with work;
        or failed, the reason.
    """
    began = time.monotonic()
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Candidate, Pace]] = {}
    for contender in contenders:
        if contender.tunes and budget.tuning <= 0:
            records[contender.name] = {"failed": "not measured: tuning for other shapes has used up its time"}
            continue
        start = time.monotonic()
        try:
            candidate = contender.prepare(operands)
            error, moved = check(candidate)
            ready[contender.name] = candidate, timer.pace(candidate.run)
        except Exception as failure:  # one that cannot run here must not end the run
            records[contender.name] = {"failed": reason(failure)}
        else:
            wrong = not error <= candidate.bound
            # JSON has no NaN.
            records[contender.name] = {"bytes": moved, "error": error if math.isfinite(error) else None, "wrong": wrong}
        if contender.tunes:
            budget.tuning -= time.monotonic() - start
    if isinstance(operands, GemmOperands):
        operands.forget()

    runs = {name: (candidate.run, pace) for name, (candidate, pace) in ready.items()}
    samples = interleave(runs, timer, began + seconds)
    for name, times in samples.items():
        record = records[name]
        us = statistics.median(times)
        record |= {"us": us, "spread": spread(times), "rounds": len(times), "launches": ready[name][1].launches}
        record["gbps"] = record["bytes"] / us / 1e3
        if work:
            record["tflops"] = work / us / 1e6
        record["ratio"] = None
        if base in samples:
            more = 1 if work else record["bytes"] / records[base]["bytes"]
            record["ratio"] = statistics.median(more * b / t for t, b in zip(times, samples[base], strict=True))
        record["percent_of_copy"] = 100 * record["gbps"] / copy_gbps if copy_gbps else None
        if copy_gbps is None and record["ratio"] is not None:
            record["percent_of_copy"] = 100 * record["ratio"]
    return records


@dataclass
class Bench:
    """One run: who takes part, who is absent, what was measured and what left out.

    only: names of those that take part beside the bases; empty for all.
    after_shape: called whenever there is more in gemm, quantize or host_us.
    """

    device: torch.device
    timer: Timer
    absent: dict[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    after_shape: Callable[[], None] = lambda: None
    dropped: dict[str, str] = field(default_factory=dict)
    gemm: list[dict[str, Any]] = field(default_factory=list)
    quantize: list[dict[str, Any]] = field(default_factory=list)
    host_us: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def contenders(self, among: Sequence[Contender], kind: str | None = None) -> list[Contender]:
        """Those that are here, are to take part and, with kind, take part in it."""
        names = {*self.only, BASE, COPY} if self.only else {c.name for c in among}
        return [c for c in among if c.peer not in self.absent and c.name in names and (kind is None or kind in c.kinds)]

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def copy(self, rows: int = 16384, columns: int = 14336) -> dict[str, Any]:
        """The copy bandwidth of this run, that of a bf16 tensor far larger than L2."""
        x = torch.randn(rows, columns, device=self.device, dtype=torch.bfloat16)
        only = [c for c in QUANTIZERS if c.name == COPY]
        record = measure(only, x, self.timer, Budget(5), 5, work=None, base=COPY, copy_gbps=None)[COPY]
        if "failed" in record:
            raise RuntimeError(f"copying bf16 [{rows}, {columns}] failed: {record['failed']}")
        self.say(f"copy of bf16 [{rows}, {columns}]: {record['gbps']:,.0f} GB/s")
        return {"M": rows, "K": columns, **record}

    def section(
        self,
        records: list[dict[str, Any]],
        shapes: Sequence[Shape],
        seconds: float,
        one: Callable[[Shape, Budget, float], dict[str, Any]],
    ) -> None:
        """Measure shapes until the time is up, in an order that leaves out evenly; records are in the order of shapes."""
        budget = Budget(seconds)
        done: dict[Shape, dict[str, Any]] = {}
        for number, shape in enumerate(spread_out(shapes)):
            if budget.left <= 0:
                self.dropped[shape.name] = "time was up"
                continue
            try:
                candidates = one(shape, budget, budget.left / (len(shapes) - number))
            except Exception as failure:  # out of memory, say: what was measured must survive
                self.dropped[shape.name] = reason(failure)
                self.say(f"{shape.name}: {self.dropped[shape.name]}")
                continue
            done[shape] = candidates
            records[:] = [
                {
                    **{"shape": s.name, "kind": s.kind, "M": s.M, "K": s.K, "uses": s.uses},
                    **({"N": s.N, "flops": s.flops} if s.N else {}),
                    "candidates": done[s],
                }
                for s in shapes
                if s in done
            ]
            self.say(f"{shape.name} {shape.size}: {progress(candidates)}")
            self.after_shape()

    def measure_gemm(self, shapes: Sequence[Shape], seconds: float, copy_gbps: float) -> None:
        def one(shape: Shape, budget: Budget, seconds: float) -> dict[str, Any]:
            return measure(
                self.contenders(GEMMS, shape.kind),
                GemmOperands(shape, self.device),
                self.timer,
                budget,
                seconds,
                work=shape.flops,
                base=BASE,
                copy_gbps=copy_gbps,
            )

        self.section(self.gemm, shapes, seconds, one)

    def measure_quantize(self, shapes: Sequence[Shape], seconds: float) -> None:
        def one(shape: Shape, budget: Budget, seconds: float) -> dict[str, Any]:
            return measure(
                self.contenders(QUANTIZERS, shape.kind),
                torch.randn(shape.M, shape.K, device=self.device, dtype=torch.bfloat16),
                self.timer,
                budget,
                seconds,
                work=None,
                base=COPY,
                copy_gbps=None,
            )

        self.section(self.quantize, shapes, seconds, one)

    def measure_host(self, seconds: float, size: int, calls: int) -> None:
        """The host's µs for a call: the median of eager calls at a size where the GPU keeps up, not synchronised."""
        budget = Budget(seconds)
        found = self.host_us
        jobs = [(c, kind) for kind in (FORWARD, WGRAD) for c in self.contenders(GEMMS, kind)]
        jobs += [(c, "quantize") for c in self.contenders(QUANTIZERS)]
        # Those that tune come last: they alone may not get their turn.
        for contender, kind in sorted(jobs, key=lambda job: job[0].tunes):
            if contender.tunes and budget.left <= 0:
                self.dropped[f"host {contender.name} {kind}"] = "time was up"
                continue
            if kind == "quantize":
                operands: Any = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
            else:
                operands = GemmOperands(Shape(kind, size, size, size, ("host",)), self.device)
            try:
                run = contender.prepare(operands).run
                run()
                self.timer.synchronize()
                found.setdefault(kind, {})[contender.name] = host_us_per_call(run, calls)
                self.timer.synchronize()
            except Exception as failure:  # as in `measure`
                self.dropped[f"host {contender.name} {kind}"] = reason(failure)
        for kind, times in found.items():
            self.say(f"host µs, {kind}: " + ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
        self.after_shape()


def progress(candidates: dict[str, dict[str, Any]]) -> str:
    parts = []
    for name, record in candidates.items():
        if "failed" in record:
            parts.append(f"{name} —")
        elif "tflops" in record:
            parts.append(f"{name} {record['tflops']:.0f}" + " WRONG" * record["wrong"])
        else:
            parts.append(f"{name} {record['percent_of_copy'] or math.nan:.0f}%" + " WRONG" * record["wrong"])
    return ", ".join(parts)


def bench(
    timer: Timer,
    device: torch.device,
    *,
    suite: str,
    sections: Sequence[str],
    gemms: Sequence[Shape],
    quantized: Sequence[Shape],
    seconds: float,
    only: Sequence[str] = (),
    copied: tuple[int, int] = (16384, 14336),
    host_size: int = 256,
    host_calls: int = 300,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure and return the result, ready for JSON; kernels and peaks, which need a GPU, are empty.

    save: called with the result so far after every shape. An interrupt ends the run, not what was measured.
    """
    origin = provenance()
    present, absent = find_peers()
    run = Bench(device, timer, absent, only)
    for name, version in present.items():
        run.say(f"{name} {version}")
    for name, why in absent.items():
        run.say(f"absent: {name} ({why})")
    copy = run.copy(*copied)

    def share(section: str) -> float:
        """Of the time left, between this section and those after it."""
        left = seconds - (time.monotonic() - run.started)
        return max(left, 0.0) * SHARES[section] / sum(SHARES[name] for name in sections[sections.index(section) :])

    def result(interrupted: bool) -> dict[str, Any]:
        return {
            **origin,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "peak_tflops": None,
            "suite": suite,
            "only": list(only),
            "seconds": time.monotonic() - run.started,
            "interrupted": interrupted,
            "sampling": {"flush_bytes": FLUSH_BYTES, "sample_us": SAMPLE_US, "rounds": [MIN_ROUNDS, MAX_ROUNDS]},
            "notes": {c.name: c.note for c in (*GEMMS, *QUANTIZERS) if c.note and c.peer not in absent},
            "peers": present,
            "absent": absent,
            "dropped": run.dropped,
            "copy": copy,
            "summary": summarise([*run.gemm, *run.quantize]),
            "gemm": run.gemm,
            "quantize": run.quantize,
            "host_us": run.host_us,
            "kernels": [],
        }

    # Until its end a run counts as interrupted: it may be killed at any time.
    run.after_shape = lambda: save(result(interrupted=True))
    try:
        if "gemm" in sections:
            run.measure_gemm(gemms, share("gemm"), copy["gbps"])
        if "quantize" in sections:
            run.measure_quantize(quantized, share("quantize"))
        if "host" in sections:
            run.measure_host(share("host"), host_size, host_calls)
    except KeyboardInterrupt:
        run.say("interrupted")
        return result(interrupted=True)
    return result(interrupted=False)


def wrong_results(summary: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    return [f"{name}, {shape}" for kind in summary.values() for name, row in kind.items() for shape in row["wrong"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="quick", help="(default: %(default)s)")
    parser.add_argument("--only", choices=list(SHARES), help="one section of the three")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="TEXT", help='those whose use has it: "70B w1", ".dw"'
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=[],
        choices=sorted({c.name for c in (*GEMMS, *QUANTIZERS)}),
        help=f"who takes part, beside {BASE} and {COPY} (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=duration,
        default=150,
        help="shapes not begun by then are dropped, evenly (default: %(default)s)",
    )
    add_out(parser)
    parser.add_argument("--name", default="bench_kernels", help="of the files written (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.shapes and args.only == "host":
        parser.error("--shapes: host times are taken on one small shape; leave it away, or --only host")
    sections = [args.only] if args.only else list(SHARES)
    gemms = chosen(gemm_shapes(SUITES[args.suite]), args.shapes) if "gemm" in sections else []
    quantized = chosen(quantize_shapes(SUITES[args.suite]), args.shapes) if "quantize" in sections else []
    if args.shapes and not gemms and not quantized:
        parser.error(f"--shapes {' '.join(args.shapes)}: no shape of suite {args.suite} has any of these")
    if (device := fp8_gpu("bench_kernels.py")) is None:
        return 2

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # results are checked against true fp32
    from blockfp8_titan.kernels import gemm_hopper_launch  # needs Triton

    def save(result: dict[str, Any]) -> None:
        compiled = [(str(key[2]), kernel) for key, kernel in library._compiled.items()]
        compiled += [(str(key[1:]), kernel) for key, kernel in gemm_hopper_launch.compiled.items()]
        result["kernels"] = resources(compiled, multiprocessor_limits(device))
        result["peak_tflops"] = peak_tflops(result["gpu"])
        write_json(args.out / f"{args.name}.json", result)
        write_text(args.out / f"{args.name}.md", report(result))

    result = bench(
        CudaTimer(device),
        device,
        suite=args.suite,
        sections=sections,
        gemms=gemms,
        quantized=quantized,
        seconds=args.seconds,
        only=args.candidates,
        save=save,
    )
    save(result)
    plot(result, args.out / f"{args.name}.png")
    print(f"\n{overview(result)}\n\nwritten to {args.out}: {args.name}.json, .md, .png")
    wrong = wrong_results(result["summary"])
    for name in wrong:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if wrong else 130 if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
