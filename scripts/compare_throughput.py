"""Compare the throughput of whole torchtitan runs: configs and converters in turn, A B C A B C ..., each compared with bf16.

    python scripts/make_corpus.py outputs/data
    python scripts/compare_throughput.py llama3_8b --data outputs/data --set training.local_batch_size=2 --rounds 3 \\
        --converters bf16 blockwise_fp8 blockwise_fp8,blockwise_fp8.wgrad=fp8_block float8_tensorwise torchao_blockwise+saved
    python scripts/compare_throughput.py llama3_8b --layers 8 --checkpointing op full --seconds 540
    python scripts/compare_throughput.py llama3_8b --data outputs/data --nprocs 4 8 --name scaling_8b \\
        --each training.local_batch_size=2 training.local_batch_size=2,parallelism.tensor_parallel_degree=2

Runs plain `torchrun -m torchtitan.train`. Chips and machines differ and drift: speeds are compared within a round, on one machine,
and only then summed up over rounds. NAME.json is written after every run; the same command goes on where it ended: finished runs of
the same settings, code and hardware are read back, an interrupted one is done again, and so is a round begun on another machine.

Writes NAME.json, NAME.md and NAME.png to --out, which Ctrl-C brings forward. Exits with 1 when a run failed, with 130 when it was
interrupted.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import ROOT, Step, TrainingFailed, step_times
from provenance import hardware, machine, provenance, versions
from result_files import add_out, write_json, write_text
from runs import (
    CHECKPOINTING,
    Arm,
    add_arguments,
    check_data,
    config_path,
    overrides_of,
    train_arm,
)
from throughput import (
    Run,
    measured,
    overview,
    peak_of_tensors,
    plot,
    report,
    reusable,
    scaling,
    scaling_table,
    speed_of,
    summarise,
)
from tqdm import tqdm

from blockfp8_titan.journal import plain

TIMEOUT = 900
CODE = ("blockfp8_titan/**/*.py", "configs/rules/*.toml", "scripts/launch.py", "scripts/variants.py")

# Which runs are the same


def digest_of_code() -> str:
    """Of the sources that runs execute."""
    found = hashlib.sha256()
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def key_of(arm: Arm, args: argparse.Namespace, code: str) -> str:
    """Equal for runs that do the same work on the same kind of machine."""
    work = {
        "config": config_path(arm.config).read_text(),
        "overrides": overrides_of(arm, args, Path("RUN")),
        "nproc": arm.nproc or args.nproc,
        "skip": args.skip,
        "cold": args.cold,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "code": code,
        "versions": versions(),
        "gpus": hardware().get("gpus"),
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


# The runs


class Clock:
    """Says whether another run may begin, from what runs took."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.took: dict[str, float] = {}

    def note(self, arm: str, seconds: float) -> None:
        self.took[arm] = max(seconds, self.took.get(arm, 0.0))

    def allows(self, arm: str) -> bool:
        """Whether the arm would end in time: its longest run is its forecast, that of any arm where it has none."""
        forecast = self.took.get(arm, max(self.took.values(), default=0.0))
        return time.monotonic() + forecast < self.end


def empty_caches(folder: str) -> dict[str, str]:
    """The variables that give torch.compile and Triton caches of their own in this folder."""
    return {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}


def run_once(arm: Arm, number: int, key: str, here: str, args: argparse.Namespace, bar: tqdm) -> Run:
    """Train once; a failure is recorded, not raised."""
    folder = args.runs / args.name / arm.folder / f"round{number}"
    began = time.monotonic()
    startup: list[float] = []
    seen = 0

    def advance(step: Step) -> None:
        nonlocal seen
        if not startup:
            startup.append(time.monotonic() - began)
        bar.update(step.step - seen)
        seen = step.step

    bar.set_description(f"round {number}, {arm.group}, {arm.name}")
    try:
        with tempfile.TemporaryDirectory() as caches:
            steps = train_arm(
                *(arm, args),
                folder=folder,
                cache=args.runs / "cache",
                timeout=args.timeout,
                environment=empty_caches(caches) if args.cold else {},
                on_step=advance,
            )
        if not measured(steps, args.skip):
            raise TrainingFailed(f"logged only {len(steps)} steps, none of them after the first {args.skip}")
        first = step_times(folder / "log.txt").get(1)
        speed = speed_of(steps, args.skip, first, startup[0], peak_of_tensors(folder))
        failure = None
    except TrainingFailed as error:
        bar.write(str(error), file=sys.stderr)
        speed, failure = None, reason_of(error)
    bar.update(args.steps - seen)
    return Run(arm.name, arm.group, key, number, here, time.monotonic() - began, speed, failure)


def reason_of(error: TrainingFailed) -> str:
    """That it took too long; else the last line of the log's tail that names an exception, else the failure's last line."""
    if late := re.search(r"^ran past \d+ s", str(error), re.MULTILINE):
        return late[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line and "ChildFailed" not in line), lines[-1])[:300]


def read_runs(path: Path) -> list[Run]:
    """The runs of an earlier result; none where there is no file. Raises ValueError where it is something else."""
    if not path.exists():
        return []
    try:
        return [Run.from_json(record) for record in json.loads(path.read_text())["runs"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of this script ({error!r}): name another by --name, or remove it"
        ) from error


def describe(run: Run) -> str:
    if run.speed is None:
        return f"round {run.round}  {run.group}  {run.arm}: failed after {run.seconds:.0f} s"
    speed = run.speed
    return (
        f"round {run.round}  {run.group}  {run.arm}: {speed.tps:,.0f} tokens/s ± {speed.tps_spread / 2:.1%}  {speed.memory:.1f} GiB  "
        f"loss {speed.loss:.4f}  {run.seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="bf16 TOMLs, or NAMEs of configs/NAME_bf16.toml")
    parser.add_argument(
        *("--checkpointing", "--ac"),
        nargs="+",
        choices=list(CHECKPOINTING),
        default=[""],
        help="activation checkpointing: everything runs under each of these (default: as the config has it)",
    )
    add_arguments(parser, steps=20)
    parser.add_argument(
        "--nprocs",
        nargs="+",
        type=int,
        metavar="NPROC",
        help="everything runs on each of these numbers of processes (default: --nproc)",
    )
    parser.add_argument(
        "--each",
        nargs="+",
        type=lambda text: tuple(re.split(r",(?=[\w.]+=)", text)),
        default=[()],
        metavar="KEY=VALUE[,KEY=VALUE...]",
        help="everything, bf16 too, runs under each of these torchtitan overrides",
    )
    parser.add_argument("--skip", type=int, default=5, help="first steps left out of tokens/s (default: %(default)s)")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="empty compile caches for every run, to compare first steps (default: shared)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no run that would not end by then (default: no limit)"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a run may take (default: %(default)s)")
    parser.add_argument("--name", default="throughput", help="of the files written (default: %(default)s)")
    add_out(parser)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "compare_throughput", help="folder for the runs' own files"
    )
    args = parser.parse_args(arguments)
    for name, value, least in (("rounds", args.rounds, 1), ("skip", args.skip, 0)):
        if value < least:
            parser.error(f"--{name} {value}: must be {least} or more")
    arms = [
        Arm(config, converter, settings, checkpointing, variant, nproc)
        for config in args.configs
        for checkpointing in args.checkpointing
        for variant in args.each
        for nproc in args.nprocs or [0]
        for converter, settings in args.converters
    ]
    if args.nprocs and min(args.nprocs) < 1:
        parser.error(f"--nprocs {min(args.nprocs)}: must be 1 or more")
    if not any(arm.is_base for arm in arms):
        parser.error("--converters: bf16 must be among them, the others are compared with it")
    if len({(arm.group, arm.name) for arm in arms}) < len(arms):
        parser.error("configs, --converters, --checkpointing, --each, --nprocs: the same run twice")
    code = digest_of_code()
    try:
        keys = {arm: key_of(arm, args, code) for arm in arms}
        check_data(args.data)
        path = args.out / f"{args.name}.json"
        before = read_runs(path)
    except ValueError as error:
        parser.error(str(error))

    logged = sorted({1, *range(args.log_freq, args.steps + 1, args.log_freq)})
    if len(logged) < 2 or logged[-2] < args.skip:
        parser.error(
            f"--steps {args.steps}: with --log-freq {args.log_freq} the logged ones are {', '.join(map(str, logged))}; of their "
            f"intervals none begins after the first --skip {args.skip}, so that nothing is left to measure"
        )

    here = machine()
    runs = reusable(before, list(keys.values()), here)
    if before:
        print(f"{path}: {len(runs)} runs are done")
    if dropped := sum(run.speed is not None and run not in runs for run in before):
        names = (path.with_suffix(f".previous{number}.json") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.replace(aside)
        print(f"{dropped} others there fit this command no more; all are kept in {aside}")
    result: dict[str, Any] = {}

    def write() -> None:
        nonlocal result
        result = {
            **provenance(),
            **{"configs": args.configs, "layers": args.layers, "compile": args.compile, "settings": args.set},
            **{
                "nprocs": args.nprocs or [args.nproc],
                "steps": args.steps,
                "skip": args.skip,
                "log_freq": args.log_freq,
            },
            **{"cold": args.cold},
            "overrides": {f"{arm.group}/{arm.name}": overrides_of(arm, args, Path(arm.folder))[1:] for arm in arms},
            "summary": summarise(runs, arms, args.nproc),
            "scaling": scaling(runs, arms),
            "runs": [asdict(run) for run in runs],
        }
        write_json(path, plain(result))

    clock = Clock(args.seconds)
    for done in runs:
        clock.note(done.arm, done.seconds)
    failed: set[Arm] = set()
    left = 0
    finished = {(run.round, run.key) for run in runs}
    todo = [
        (number, arm) for number in range(1, args.rounds + 1) for arm in arms if (number, keys[arm]) not in finished
    ]
    write()
    interrupted = False
    try:
        with tqdm(total=len(todo) * args.steps, unit="step", disable=None) as bar:
            for number, arm in todo:
                if arm in failed or not clock.allows(arm.name):
                    left += arm not in failed
                    bar.update(args.steps)
                    continue
                done = run_once(arm, number, keys[arm], here, args, bar)
                clock.note(arm.name, done.seconds)
                runs.append(done)
                write()
                bar.write(describe(done))
                if done.speed is None:
                    failed.add(arm)  # it would fail again
    except KeyboardInterrupt:
        interrupted = True

    write_text(args.out / f"{args.name}.md", report(result) + "\n")
    plot(result, args.out / f"{args.name}.png")
    print(f"\n{overview(result['summary'])}\n\nwritten to {args.out}: {args.name}.json, .md, .png\n")
    if result["scaling"]:
        print(f"{scaling_table(result['scaling'])}\n")
    if left:
        print(f"time was up: {left} runs were not begun; the same command goes on with them")
    if interrupted:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
