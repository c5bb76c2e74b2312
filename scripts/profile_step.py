"""Profile one step of whole torchtitan runs: which kernels take how long, what communication is exposed, how long the GPU idles.

    python scripts/profile_step.py llama3_8b --data outputs/data --set training.local_batch_size=2 \\
        --converters bf16 blockwise_fp8 float8_tensorwise

Runs plain `torchrun -m torchtitan.train` with its profiler on; the last of --steps is the one profiled, on rank 0. The profiler
itself slows the host: compare "idle" with the unprofiled step's time beside it. Kernels of inductor that quantise for torchao's
converters, fused with their neighbours, count as inductor's.

Writes NAME.json and NAME.md to --out; the traces stay in --runs. Exits with 2 where there is no GPU, with 1 when a run failed.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_trace
import torch
from launch import ROOT, TrainingFailed, step_times
from measure import table
from provenance import provenance
from result_files import add_out, write_json, write_text
from runs import CHECKPOINTING, Arm, add_arguments, check_data, config_path, overrides_of, train_arm

WARM_UP = 3  # steps in which torch.profiler runs and records nothing
LONGEST = 25
WAITS = 10
TIMEOUT = 900


def profiling(steps: int) -> list[str]:
    """The overrides that make torchtitan profile the last of these steps."""
    return [
        "--profiling.enable_profiling",
        f"--profiling.profile_freq={steps}",
        f"--profiling.profiler_warmup={WARM_UP}",
        "--profiling.profiler_active=1",
    ]


def trace_file(folder: Path, steps: int) -> Path:
    return folder / "profile_traces" / f"iteration_{steps}" / "rank0_trace.json"


def unprofiled_ms(log: Path, steps: int) -> float | None:
    """Median of the steps after the second and before the profiler; None where every one of them is not logged."""
    times = step_times(log)
    last = steps - WARM_UP - 1
    found = [times[n] - times[n - 1] for n in range(3, last + 1) if n in times and n - 1 in times]
    return 1e3 * statistics.median(found) if found else None


def overview(profiles: dict[str, dict[str, Any]]) -> str:
    """Where the steps' time goes, a column for each run, as Markdown."""
    names = list(profiles)
    rows = [("step, unprofiled", *(_ms(profile["unprofiled_ms"]) for profile in profiles.values()))]
    rows += [("step, profiled", *(_ms(profile["window_ms"]) for profile in profiles.values()))]
    rows += [
        (f"– {part}", *(_ms(profile["timeline_ms"][part]) for profile in profiles.values()))
        for part in next(iter(profiles.values()))["timeline_ms"]
    ]
    present = [
        group for group, _ in gpu_trace.GROUPS if any(group in profile["groups"] for profile in profiles.values())
    ]
    for group in present:
        cells = [profile["groups"].get(group) for profile in profiles.values()]
        rows.append((group, *("—" if cell is None else f"{cell['ms']:,.1f} ({cell['calls']})" for cell in cells)))
    rows.append(("kernels and copies launched", *(f"{profile['launches']:,}" for profile in profiles.values())))
    return table(("ms (calls)", *names), rows)


def _ms(ms: float | None) -> str:
    return "—" if ms is None else f"{ms:,.1f}"


def longest(profile: dict[str, Any]) -> str:
    """The kernels that take most of a step's time, as Markdown."""
    rows = [
        (f"`{k['kernel']}`", k["op"], k["group"], f"{k['calls']:,}", f"{k['ms']:,.2f}", f"{k['share']:.1%}")
        for k in profile["kernels"][:LONGEST]
    ]
    return table(("kernel", "launched by", "group", "calls", "ms", "share"), rows, left=3)


def waits(profile: dict[str, Any]) -> str:
    """What the GPU was idle before, as Markdown."""
    rows = [
        (f"`{wait['before']}`", f"{wait['gaps']:,}", f"{wait['ms']:,.2f}", f"{wait['longest_ms']:,.2f}")
        for wait in profile["idle"][:WAITS]
    ]
    return table(("idle before", "gaps", "ms", "longest, ms"), rows)


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    gpus = result["hardware"].get("gpus") or ["no GPU"]
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    parts = [
        f"# One step of {result['config']}",
        f"{result['nproc']} processes, {len(gpus)} × {gpus[0]}; {found}; {result['date']}, commit {result['commit']}; "
        f"settings of all runs: {' '.join(result['settings']) or 'none'}.",
        "Rank 0. Each moment of the profiled step is compute (a kernel that neither communicates nor copies runs), else exposed "
        "communication (NCCL runs), else exposed copies, else idle. Groups overlap on different streams; the profiler slows the "
        "host.",
        overview(result["profiles"]),
    ]
    for name, profile in result["profiles"].items():
        parts += [f"## {name}: the {LONGEST} longest", longest(profile), waits(profile)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a bf16 TOML, or the NAME of configs/NAME_bf16.toml")
    parser.add_argument(
        "--checkpointing", choices=list(CHECKPOINTING), default="", help="(default: as the config has it)"
    )
    add_arguments(parser, steps=12)
    parser.add_argument("--name", default="profile", help="of the files written (default: %(default)s)")
    add_out(parser)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "profile_step", help="folder for the runs' own files"
    )
    args = parser.parse_args(arguments)
    if args.steps <= WARM_UP + 2:
        parser.error(
            f"--steps {args.steps}: must be more than {WARM_UP + 2}: a first step, {WARM_UP} of warm-up, one profiled"
        )
    args.runs = args.runs.resolve()  # the trainer, which writes the trace, runs in the repository's root
    arms = [Arm(args.config, converter, settings, args.checkpointing) for converter, settings in args.converters]
    try:
        config_path(args.config)
        check_data(args.data)
        overrides = {arm.name: overrides_of(arm, args, Path(arm.folder)) for arm in arms}
    except ValueError as error:
        parser.error(str(error))

    if not torch.cuda.device_count():
        print("profile_step.py profiles GPU kernels, and there is no CUDA GPU here", file=sys.stderr)
        return 2

    profiles: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for arm in arms:
        folder = args.runs / args.name / arm.folder
        print(f"{arm.name}: {args.steps} steps on {args.nproc} process(es), the last of them profiled", flush=True)
        try:
            train_arm(
                *(arm, args),
                folder=folder,
                cache=args.runs / "cache",
                timeout=TIMEOUT,
                extra=profiling(args.steps),
                on_step=lambda step: print(f"  step {step.step}  {step.tps:,.0f} tokens/s", flush=True),
            )
            profile = gpu_trace.summarise(gpu_trace.read_trace(trace_file(folder, args.steps)))
        except (TrainingFailed, ValueError) as failure:
            print(failure, file=sys.stderr)
            failures[arm.name] = str(failure).splitlines()[-1]
            continue
        profiles[arm.name] = {"unprofiled_ms": unprofiled_ms(folder / "log.txt", args.steps), **profile}
    result = {
        **provenance(),
        **{
            "config": args.config,
            "layers": args.layers,
            "settings": args.set,
            "nproc": args.nproc,
            "steps": args.steps,
        },
        **{"overrides": overrides, "failures": failures, "profiles": profiles},
    }
    if profiles:
        write_json(args.out / f"{args.name}.json", result)
        write_text(args.out / f"{args.name}.md", report(result))
        print(f"\n{overview(profiles)}\n\nwritten to {args.out}: {args.name}.json, .md")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
