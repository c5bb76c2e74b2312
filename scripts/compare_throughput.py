"""Compare the throughput of whole torchtitan runs: configs and converters in turn, A B C A B C ..., each compared with bf16.

    python scripts/make_corpus.py outputs/data
    python scripts/compare_throughput.py llama3_8b --data outputs/data --set training.local_batch_size=2 --rounds 3 \\
        --converters bf16 blockwise_fp8 blockwise_fp8,blockwise_fp8.wgrad=fp8_block float8_tensorwise torchao_blockwise+saved
    python scripts/compare_throughput.py llama3_8b --layers 8 --checkpointing op full --seconds 540
    python scripts/compare_throughput.py llama3_8b --data outputs/data --nprocs 2 4 8 --name scaling_8b \
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
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch import ROOT, Step, TrainingFailed, step_times
from measure import spread, table
from provenance import hardware, machine, provenance, versions
from runs import (
    BF16,
    CHECKPOINTING,
    COLORS,
    PLOT_STYLE,
    Arm,
    add_arguments,
    config_path,
    overrides_of,
    train_arm,
)
from tqdm import tqdm

from blockfp8_titan import journal
from blockfp8_titan.metrics import METRICS_FILE

TIMEOUT = 900
CODE = ("blockfp8_titan/**/*.py", "configs/rules/*.toml", "scripts/launch.py", "scripts/variants.py")


@dataclass(frozen=True)
class Speed:
    """What one run showed.

    tps: median tokens per second and process over the logged intervals after the first steps; tps_spread: their (90th - 10th
    percentile) / median. memory: peak of a process in GiB, first steps included; active: that of its tensors, without what the
    allocator holds besides (None in results from before it was recorded). loss: of the last step. first_step: seconds from
    the start of training to the end of step 1, compilation included; startup: from the launch of the processes to there.
    steps: (step, tokens per second and process) of each logged interval, first ones included.
    """

    tps: float
    tps_spread: float
    memory: float
    loss: float
    first_step: float | None
    startup: float
    active: float | None = None
    steps: list[tuple[int, float]] = field(default_factory=list)


def measured(steps: Sequence[Step], skip: int) -> list[Step]:
    """The logged steps whose interval, from the line before on, begins after the first `skip` steps."""
    return [step for before, step in itertools.pairwise(steps) if before.step >= skip]


def speed_of(
    steps: Sequence[Step], skip: int, first_step: float | None, startup: float, active: float | None = None
) -> Speed:
    tps = [step.tps for step in measured(steps, skip)]
    return Speed(
        tps=statistics.median(tps),
        tps_spread=spread(tps) if len(tps) > 1 else 0.0,
        steps=[(step.step, step.tps) for step in steps],
        memory=max(step.memory for step in steps),
        loss=steps[-1].loss,
        first_step=first_step,
        startup=startup,
        active=active,
    )


def peak_of_tensors(folder: Path) -> float | None:
    """The most GiB of tensors that a run's rank 0 recorded; None where it recorded nothing."""
    records = journal.read(folder / METRICS_FILE)
    return max((record["active_gib"] for record in records if record.get("active_gib") is not None), default=None)


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


@dataclass(frozen=True)
class Run:
    """A finished run: arm, round, machine, and a speed or the reason why there is none."""

    arm: str
    group: str
    key: str
    round: int
    machine: str
    seconds: float
    speed: Speed | None
    failure: str | None = None

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Run":
        speed = record["speed"]
        return cls(**record | {"speed": Speed(**speed) if speed else None})


def reusable(runs: Sequence[Run], keys: Sequence[str], here: str) -> list[Run]:
    """The runs, in their order, that need not be done again.

    Those of these keys that did not fail, the last of each round; from other machines only whole rounds, since speeds are compared
    within a round.
    """
    latest = {(run.round, run.key): run for run in runs if run.key in keys and run.speed is not None}
    kept = []
    for run in latest.values():
        others = [latest.get((run.round, key)) for key in keys]
        whole = all(other is not None and other.machine == run.machine for other in others)
        if whole or run.machine == here:
            kept.append(run)
    return kept


# What became of it


def ratios(runs: Sequence[Run], base: Sequence[Run], value: str) -> list[float]:
    """Round by round, a run's value relative to that of the base, where both have it."""
    of_base = {run.round: getattr(run.speed, value) for run in base if run.speed}
    pairs = [(getattr(run.speed, value), of_base.get(run.round)) for run in runs if run.speed]
    return [a / b for a, b in pairs if a is not None and b]


def summarise(runs: Sequence[Run], arms: Sequence[Arm], nproc: int) -> list[dict[str, Any]]:
    """One row for each arm: medians over rounds, and the median, least and greatest of the ratios to the group's bf16.

    nproc: processes of arms that name no number of their own.
    """
    rows = []
    for arm in arms:
        of_arm = [run for run in runs if (run.group, run.arm) == (arm.group, arm.name)]
        done = [run.speed for run in of_arm if run.speed]
        row: dict[str, Any] = {"group": arm.group, "arm": arm.name, "converter": arm.converter}
        row |= {"nproc": arm.nproc or nproc, "rounds": len(done)}
        row["failure"] = next((run.failure for run in of_arm if run.failure), None)
        if done:
            for field in ("tps", "tps_spread", "memory", "loss", "startup"):
                row[field] = statistics.median(getattr(speed, field) for speed in done)
            active = [speed.active for speed in done if speed.active is not None]
            row["active"] = statistics.median(active) if active else None
            first_steps = [speed.first_step for speed in done if speed.first_step is not None]
            row["first_step"] = statistics.median(first_steps) if first_steps else None
            base = [run for run in runs if (run.group, run.arm) == (arm.group, BF16)]
            for field in ("tps", "memory", "active", "loss", "first_step"):
                if found := ratios(of_arm, base, field):
                    row[f"{field}_ratio"] = statistics.median(found)
                    row[f"{field}_ratios"] = [min(found), max(found)]
        rows.append(row)
    return rows


def scaling(runs: Sequence[Run], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Where arms ran on several numbers of processes: a row for each number, with tokens/s per process relative to the least number,
    the median over rounds that have both."""
    alike: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        alike.setdefault((arm.work, arm.name), []).append(arm)
    rows = []
    for (work, name), of_work in alike.items():
        least, *more = sorted(of_work, key=lambda arm: arm.nproc)
        of_least = [run for run in runs if (run.group, run.arm) == (least.group, name)]
        for arm in (least, *more) if more else ():
            of_arm = [run for run in runs if (run.group, run.arm) == (arm.group, name)]
            if done := [run.speed.tps for run in of_arm if run.speed]:
                found = ratios(of_arm, of_least, "tps")
                efficiency = statistics.median(found) if found else None
                row = {"work": work, "arm": name, "nproc": arm.nproc, "tps": statistics.median(done)}
                rows.append(row | {"efficiency": efficiency})
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["rounds"]:
        return (row["arm"], "0", *["—"] * 10)

    def ratio(field: str) -> str:
        return f"{row[f'{field}_ratio']:.3f}" if f"{field}_ratio" in row else "—"

    tps = ratio("tps")
    if row["rounds"] > 1 and "tps_ratios" in row:
        low, high = row["tps_ratios"]
        tps += f" ({low:.3f}–{high:.3f})"
    first = "—" if row["first_step"] is None else f"{row['first_step']:.1f} s"
    gap = f"{row['loss_ratio'] - 1:+.2%}" if "loss_ratio" in row else "—"
    speed = (f"{row['tps']:,.0f}", f"{row['tps_spread']:.1%}", tps)
    return (
        row["arm"],
        str(row["rounds"]),
        *speed,
        f"{row['memory']:.1f} GiB",
        ratio("memory"),
        "—" if row["active"] is None else f"{row['active']:.1f} GiB",
        ratio("active"),
        f"{row['loss']:.4f} ({gap})",
        first,
        ratio("first_step"),
    )


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown, a table for each group."""
    header = (
        *("run", "rounds", "tokens/s/process", "spread in a run", "× bf16 (least–greatest of the rounds)"),
        *("peak memory", "× bf16", "of tensors", "× bf16", "last loss (gap)", "first step", "× bf16"),
    )
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        parts += [f"### {group}", table(header, [_cells(row) for row in of_group])]
        parts += [f"{row['arm']} failed: {row['failure']}" for row in of_group if row["failure"]]
    return "\n\n".join(parts)


def scaling_table(rows: Sequence[dict[str, Any]]) -> str:
    """Of `scaling`, as Markdown."""
    cells = [
        (
            *(row["work"], row["arm"], f"{row['nproc']}", f"{row['tps']:,.0f}", f"{row['nproc'] * row['tps']:,.0f}"),
            "—" if row["efficiency"] is None else f"{row['efficiency']:.3f}",
        )
        for row in rows
    ]
    header = ("runs", "run", "processes", "tokens/s/process", "tokens/s", "per process, × the least number's")
    return "\n\n".join(["### Scaling", table(header, cells, left=2)])


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    gpus = result["hardware"].get("gpus") or ["no GPU"]
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    settings = " ".join(result["settings"]) or "none"
    compiled = {None: "as configured", True: "on", False: "off"}[result["compile"]]
    return "\n\n".join(
        [
            "# Throughput of whole training runs",
            f"{' or '.join(map(str, result['nprocs']))} processes, {len(gpus)} × {gpus[0]}; {found}; "
            f"{result['date']}, commit {result['commit']}.",
            f"{result['steps']} steps a run, the first {result['skip']} left out of tokens/s; torch.compile {compiled}; "
            f"settings of all runs: {settings}.",
            "Medians over rounds, in which the runs take turns; × bf16 is the median of each round's ratio. Spread in a run is "
            "(90th - 10th percentile) / median of the steps' tokens/s. First step: from the start of training to the end of step 1, "
            f"compilation included, {'with empty caches' if result['cold'] else 'with caches that earlier runs may have filled'}.",
            overview(result["summary"]),
            *([scaling_table(result["scaling"])] if result["scaling"] else []),
        ]
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """For each group, speed and peak memory relative to bf16: a bar at the median, a dot for each round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["summary"] if "tps_ratio" in row]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if not groups:
        return
    heights = [0.4 * sum(row["group"] == group for row in rows) + 0.9 for group in groups]
    with plt.rc_context(PLOT_STYLE):
        figure, grid = plt.subplots(
            *(len(groups), 2),
            figsize=(10, sum(heights) + 0.4),
            height_ratios=heights,
            layout="constrained",
            squeeze=False,
        )
        for group, axes in zip(groups, grid, strict=True):
            of_group = [row for row in rows if row["group"] == group]
            for axis, field, title in zip(axes, ("tps", "memory"), ("tokens/s", "peak memory"), strict=True):
                for y, row in enumerate(of_group):
                    color = COLORS[row["converter"]]
                    axis.barh(y, row[f"{field}_ratio"], height=0.6, color=color, alpha=0.85)
                    axis.plot(row[f"{field}_ratios"], [y, y], color="#111827", marker="|", linewidth=1)
                    axis.text(0.02, y, f"{row[f'{field}_ratio']:.3f}", va="center", color="white", fontsize=8)
                axis.axvline(1, color="#111827", linewidth=0.8)
                axis.set_yticks(range(len(of_group)), [row["arm"] for row in of_group], fontsize=8)
                axis.set_ylim(len(of_group) - 0.5, -0.5)
                axis.set_xlabel(f"{title} relative to bf16")
                axis.grid(visible=False, axis="y")
            axes[1].set_yticklabels([])
            axes[0].set_title(group, loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        plt.close(figure)


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
    """The last line of the log's tail that names an exception, else the failure's last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line and "ChildFailed" not in line), lines[-1])[:300]


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
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "compare_throughput", help="folder for the runs' own files"
    )
    args = parser.parse_args(arguments)
    if args.steps <= args.skip:
        parser.error(f"--steps {args.steps}: must be more than --skip {args.skip}, or nothing is left to measure")
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
    except ValueError as error:
        parser.error(str(error))

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.json"
    here = machine()
    before = [Run.from_json(record) for record in json.loads(path.read_text())["runs"]] if path.exists() else []
    runs = [run for run in reusable(before, list(keys.values()), here) if run.round <= args.rounds]
    if before:
        print(f"{path}: {len(runs)} runs are done, {len(before) - len(runs)} fit this command no more and are dropped")
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
        text = json.dumps(result, indent=1) + "\n"
        written = path.with_suffix(".part")
        written.write_text(text)
        written.replace(path)

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

    (args.out / f"{args.name}.md").write_text(report(result) + "\n")
    plot(result, args.out / f"{args.name}.png")
    print(f"\n{overview(result['summary'])}\n")
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
