"""What runs under compare_throughput.py showed: speed and memory of each, ratios to bf16 over rounds, how speed scales; tables, plot."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import Step
from measure import spread, table
from runs import BF16, COLORS, PLOT_STYLE, Arm

from blockfp8_titan import journal
from blockfp8_titan.metrics import METRICS_FILE


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
        if speed and speed["loss"] is None:  # NaN, which JSON cannot say
            speed = speed | {"loss": math.nan}
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
