"""Train with fp8 all-gathers on and off, in turns, and compare: a step's time, and in a profile of it the all-gathers.

    python scripts/make_corpus.py outputs/data
    python scripts/bench_gather.py llama3_8b --data outputs/data --layers 16 --set training.seq_len=8192

Runs plain `torchrun -m torchtitan.train` for each turn, with one profiled step in ten. Writes NAME.json to --out and prints a table.
Needs two GPUs or more.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from launch import ROOT, Step, TrainingFailed, train
from provenance import provenance
from variants import LAYERS

Interval = tuple[float, float]

# Kernels of a profile, by a part of their names: NCCL's, and those that fp8 gathers add.
KERNELS = {
    "all_gather": "AllGather",
    "reduce_scatter": "ReduceScatter",
    "amax": "_amax_128x128_kernel",
    "amax_all_reduce": "AllReduce_Max",
    "cast": "_quantize_rows_kernel",
    "quantize_gathered": "_quantize_128x128_kernel",
}
PROFILE_EVERY = 10
TIMEOUT = 3600


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint ones in order."""
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in merged(intervals))


def exposed(intervals: Sequence[Interval], others: Sequence[Interval]) -> float:
    """How long some of `intervals` run while none of `others` does."""
    return length([*intervals, *others]) - length(others)


def read_profile(path: Path) -> dict[str, float]:
    """Milliseconds on the GPU in one profiled step of one rank: of each of KERNELS, and of all-gathers beside which nothing computes."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        (event["name"], (event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000))
        for event in events
        if event.get("cat") == "kernel"
    ]
    times = {label: length(when for name, when in kernels if part in name) for label, part in KERNELS.items()}
    gathers = [when for name, when in kernels if KERNELS["all_gather"] in name]
    computing = [when for name, when in kernels if "nccl" not in name]
    return times | {"all_gather_exposed": exposed(gathers, computing)}


def step_ms(steps: Sequence[Step], tokens: int) -> float:
    """The median time of the steps that are neither first nor near a profile."""
    quiet = [step.tps for step in steps if 2 < step.step % PROFILE_EVERY < PROFILE_EVERY - 4]
    return 1000 * tokens / statistics.median(quiet)


def table(results: dict[str, dict[str, float]]) -> str:
    """Milliseconds, as Markdown."""
    rows = list(next(iter(results.values())))
    lines = ["| ms per step | " + " | ".join(results) + " |", "| --- " + "| ---: " * len(results) + "|"]
    return "\n".join(
        lines + [f"| {row} | " + " | ".join(f"{r[row]:.2f}" for r in results.values()) + " |" for row in rows]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=["debug", "llama3_8b"], help="configs/CONFIG_blockwise_fp8.toml is run")
    parser.add_argument("--steps", type=int, default=20, help="a multiple of 10 (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, choices=range(1, LAYERS), metavar=f"1..{LAYERS - 1}", help="cut llama3_8b"
    )
    parser.add_argument("--nproc", type=int, default=torch.cuda.device_count(), help="GPUs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of a process in a step (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT / "outputs" / "demo", help="folder made by make_corpus.py")
    parser.add_argument("--name", default="bench_gather", help="of the file written (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "bench_gather")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more torchtitan overrides")
    args = parser.parse_args(arguments)
    if args.nproc < 2:
        parser.error(f"--nproc = {args.nproc}: nothing is gathered with fewer than two GPUs")
    if args.steps <= 0 or args.steps % PROFILE_EVERY:
        parser.error(f"--steps = {args.steps}: must be a positive multiple of {PROFILE_EVERY}")

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    common = [
        "--experimental.custom_import=variants",
        f"--training.steps={args.steps}",
        f"--training.seq_len={args.tokens}",
        "--training.local_batch_size=1",
        f"--lr_scheduler.warmup_steps={args.steps}",
        "--metrics.log_freq=1",
        "--debug.seed=1",
        "--training.dataset=c4_test",
        f"--training.dataset_path={args.data / 'corpus'}",
        f"--model.hf_assets_path={args.data / 'tokenizer'}",
        "--profiling.enable_profiling",
        f"--profiling.profile_freq={PROFILE_EVERY}",
        *([f"--model.flavor=8B-{args.layers}L"] if args.layers else []),
        *(f"--{setting}" for setting in args.set),
    ]
    found: dict[str, list[dict[str, float]]] = {"bf16": [], "fp8": []}
    for turn in range(args.turns):
        for kind in found:
            folder = args.runs / args.name / f"{kind}_{turn}"
            print(f"{kind} gathers, turn {turn + 1} of {args.turns}", flush=True)
            try:
                steps = train(
                    Path(f"configs/{args.config}_blockwise_fp8.toml"),
                    [
                        *common,
                        f"--job.dump_folder={folder}",
                        f"--blockwise_fp8.fp8_all_gather={str(kind == 'fp8').lower()}",
                    ],
                    nproc=args.nproc,
                    log=folder / "log.txt",
                    timeout=TIMEOUT,
                    cache=args.runs / "cache",
                )
            except TrainingFailed as failure:
                print(failure, file=sys.stderr)
                return 1
            profile = folder / "profile_traces" / f"iteration_{args.steps}" / "rank0_trace.json"
            found[kind].append({"step": step_ms(steps, args.tokens), **read_profile(profile)})

    medians = {
        kind: {label: statistics.median(turn[label] for turn in turns) for label in turns[0]}
        for kind, turns in found.items()
    }
    result = {**provenance(), "arguments": vars(args) | {"overrides": common}, "turns": found, "medians": medians}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"\n{table(medians)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
