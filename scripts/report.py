"""One page about training runs: losses and their gap to bf16, throughput, memory, fp8 health, settings, versions, what was converted.

    python scripts/report.py outputs/demo/bf16 outputs/demo/blockwise_fp8 --out outputs/demo/report
    python scripts/report.py scripts/results/loss_8b_8l_1000.json scripts/results/e2e_8b.json

Takes dump folders of runs that wrote metrics.jsonl, which are compared with each other, and the JSON files of compare_loss.py and
compare_throughput.py. Writes OUT.html, which needs no network and no other file, and OUT.md, which has all but the charts.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launch import ROOT
from losses import THRESHOLD, gaps, is_close, last_tenth, mean_gap, smoothed
from page import Bar, Bars, Block, Chart, Heading, HeatMap, Line, Table, Text, to_html, to_markdown
from runs import COLORS
from subjects import Group, Subject, flatten, groups_of
from torchtitan.config import JobConfig

from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.health_log import ranking, tensors_of
from blockfp8_titan.quantization_error import TensorHealth

OTHER_COLORS = ("#0e7490", "#be185d", "#a16207", "#4d7c0f")
DASHES = ("", "7 4", "2 3", "10 3 2 3")
NEVER_ALIKE = {"job.dump_folder", "job.description", "job.config_file"}
"""Settings that differ between any two runs."""
DECIDE_ON_LOSSES = (
    *("model.name", "model.flavor", "optimizer.", "lr_scheduler.", "debug.seed"),
    *("training.dataset", "training.seq_len", "training.steps", "training.max_norm"),
)
"""Settings, by how their names begin, that have losses differ whatever a run computes in."""
NONE = "—"
ROLES = {"x": "inputs", "w": "weights", "dy": "gradients of outputs"}
SQNR_LIMITS = (20, 24, 26, 28, 30, 31)
"""Where the map of fp8 health changes its colour."""


def report(groups: Sequence[Group], title: str, threshold: float) -> list[Block]:
    """The whole report; a section that has nothing to say is left out."""
    date = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    count = sum(len(group.subjects) for group in groups)
    blocks: list[Block] = [Heading(1, title), Text(f"{count} {'run' if count == 1 else 'runs'}; written {date}.")]
    for group in groups:
        sections = (overview(group, threshold), losses(group, threshold), throughput(group), settings(group))
        blocks += [Heading(2, group.title), *(block for section in sections for block in section)]
    subjects = [subject for group in groups for subject in group.subjects]
    return blocks + health(subjects) + environment(groups) + conversions(subjects)


def overview(group: Group, threshold: float) -> list[Block]:
    header = (
        *("run", "steps", "loss, last tenth", "gap to bf16", f"within {threshold:.2%}", "grad norm"),
        *("tokens/s/process", "× bf16", "peak memory", "× bf16"),
    )
    base = group.base
    rows = []
    notes: list[Block] = []
    for subject in group.subjects:
        gap = mean_gap(subject.loss, base.loss) if base else None
        verdict = NONE
        if base and gap is not None and max(subject.loss) != max(base.loss):
            # The last steps that both have are not where this run ended.
            gap = None
            notes.append(
                Text(
                    f"{subject.name} is logged to step {max(subject.loss):,} and {base.name} to {max(base.loss):,}: their ends are not "
                    "compared."
                )
            )
        elif base and gap is not None and (unlike := learning_differs(subject, base)):
            gap = None
            notes.append(
                Text(f"{subject.name} does not learn what {base.name} does: {unlike}. Their losses are not compared.")
            )
        if gap is not None and subject is not base:
            verdict = "✓ yes" if is_close(gap, threshold) else "✗ no"
        last = last_tenth(list(subject.loss.values()))
        norms = last_tenth(list(subject.grad_norm.values()))
        tps = subject.speed.tps if subject.speed else None
        speed_ratio, memory_ratio = subject.speed_ratio, subject.memory_ratio
        if speed_ratio is None and tps and base and base.speed:
            speed_ratio = tps / base.speed.tps
        if memory_ratio is None and subject.memory and base and base.memory:
            memory_ratio = subject.memory / base.memory
        rows.append(
            (
                subject.name,
                f"{max(subject.loss):,}" if subject.loss else NONE,
                shown(statistics.fmean(last) if last else None, ".4f"),
                shown(gap, "+.3%"),
                verdict,
                shown(statistics.fmean(norms) if norms else None, ".4f"),
                shown(tps, ",.0f"),
                shown(speed_ratio, ".3f"),
                gibibytes(subject.memory),
                shown(memory_ratio, ".3f"),
            )
        )
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] != NONE for row in rows)]
    table = Table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
    notes += [Text(f"{subject.name}: {subject.remark}") for subject in group.subjects if subject.remark]
    if base is None and len(group.subjects) > 1:
        notes.append(Text("There is no bf16 run among them: no gap, no ratios."))
    return [table, *notes]


def learning_differs(subject: Subject, base: Subject) -> str:
    """What decides on losses besides numerics and is not the same; empty where nothing is known to differ."""
    if subject is base:
        return ""
    both = sorted(subject.config.keys() & base.config.keys())
    pairs = [(key, subject.config[key], base.config[key]) for key in both if key.startswith(DECIDE_ON_LOSSES)]
    differing = [f"{key} is {ours} and {theirs}" for key, ours, theirs in pairs if ours != theirs]
    tokens = subject.tokens_per_step, base.tokens_per_step
    if None not in tokens and tokens[0] != tokens[1]:
        differing.append(f"tokens a step are {tokens[0]:,.0f} and {tokens[1]:,.0f}")
    if subject.config.get("debug.seed") == base.config.get("debug.seed") == "null":
        differing.append("debug.seed is not set, so that they begin with other weights")
    return "; ".join(differing)


def losses(group: Group, threshold: float) -> list[Block]:
    """Loss, the gap to the base, gradient norms; the base's lines are broad and below the others."""
    colors = styles(group)

    def line(subject: Subject, points: Sequence[tuple[float, float]]) -> Line:
        color, dash = colors[subject.name]
        return Line(subject.name, points, color, 4.0 if subject is group.base else 1.6, dash)

    blocks: list[Block] = []
    with_loss = [subject for subject in group.subjects if len(subject.loss) > 1]
    if with_loss:
        blocks.append(Chart("Training loss", [line(s, list(s.loss.items())) for s in with_loss]))
    if group.base is not None:
        lines = []
        for subject in with_loss:
            found = gaps(subject.loss, group.base.loss)
            if subject is not group.base and found:
                percent = smoothed([100 * gap for gap in found.values()])
                lines.append(line(subject, list(zip(found, percent, strict=True))))
        if lines:
            band = (-100 * threshold, 100 * threshold)
            title = f"Gap to {group.base.name}, mean of 10 logged steps; shaded: within {threshold:.2%}"
            reach = (2 * band[0], 2 * band[1])
            blocks.append(Chart(title, lines, height=200, band=band, reach=reach, unit="%"))
    with_norm = [subject for subject in group.subjects if len(subject.grad_norm) > 1]
    if with_norm:
        lines = [line(s, list(s.grad_norm.items())) for s in with_norm]
        blocks.append(Chart("Gradient norm", lines, height=200, log=True))
    return blocks


def throughput(group: Group) -> list[Block]:
    colors = styles(group)
    speeds = [
        Bar(s.name, s.speed.tps, f"{s.speed.tps:,.0f}", colors[s.name][0], s.speed.low, s.speed.high)
        for s in group.subjects
        if s.speed
    ]
    memory = [
        Bar(s.name, s.memory, gibibytes(s.memory), colors[s.name][0]) for s in group.subjects if s.memory is not None
    ]
    has_spread = any(bar.low is not None for bar in speeds)
    title = "Tokens per second and process" + (
        "; black: 10th to 90th percentile of a run's steps" if has_spread else ""
    )
    return [Bars(title, speeds), Bars("Peak memory of a process", memory)]


def settings(group: Group) -> list[Block]:
    """What differs between the runs; of one run alone, what differs from torchtitan's defaults. Defaults of our section, which a run
    without it lacks, do not differ."""
    configs = {subject.name: subject.config for subject in group.subjects if subject.config}
    if not configs:
        return []
    title = "Settings that differ"
    if len(configs) == 1:
        configs["default"] = flatten(JobConfig().to_dict())
        title = "Settings other than torchtitan's defaults"
    keys = sorted({key for config in configs.values() for key in config} - NEVER_ALIKE)
    ours = flatten({"blockwise_fp8": asdict(BlockwiseFP8())})
    rows = []
    for key in keys:
        values = [config.get(key, NONE) for config in configs.values()]
        if len(set(values)) > 1 and not set(values) <= {NONE, ours.get(key)}:
            rows.append((key, *(value or '""' for value in values)))
    if not rows:
        return [Heading(3, title), Text("None.")]
    return [Heading(3, title), Table(("setting", *configs), rows, left=1 + len(configs))]


def environment(groups: Sequence[Group]) -> list[Block]:
    """Versions and hardware: a column for all runs, or one for each that has its own."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for group in groups:
        own = {subject.name: tuple(described_environment(subject).items()) for subject in group.subjects}
        for name, described in own.items():
            label = (
                group.title if len(set(own.values())) == 1 else name if len(groups) == 1 else f"{group.title}: {name}"
            )
            found.setdefault(described, [])
            if label not in found[described]:
                found[described].append(label)
    columns = {
        "; ".join(names) if len(found) > 1 else "all runs": dict(pairs) for pairs, names in found.items() if pairs
    }
    if not columns:
        return []
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    rows = [(key, *(values.get(key, NONE) for values in columns.values())) for key in keys]
    return [Heading(2, "Versions and hardware"), Table(("", *columns), rows, left=1 + len(columns))]


def described_environment(subject: Subject) -> dict[str, str]:
    hardware: Mapping[str, Any] = subject.hardware
    described = {"processes": hardware.get("processes")}
    if gpus := hardware.get("gpus"):
        names = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
        described |= {"GPUs": names, "driver": hardware.get("driver"), "power limit": hardware.get("power_limit")}
    else:
        described |= {"processor": hardware.get("processor"), "CPUs": hardware.get("cpus")}
    if (at_once := hardware.get("runs at once")) and at_once > 1:
        described["runs at once, which slow each other"] = at_once
    described |= {"platform": hardware.get("platform"), **subject.versions, **subject.measured}
    return {key: str(value) for key, value in described.items() if value is not None}


def conversions(subjects: Sequence[Subject]) -> list[Block]:
    blocks: list[Block] = []
    seen: dict[str, list[str]] = {}
    for subject in subjects:
        if subject.conversion is not None:
            seen.setdefault(subject.conversion.to_json(), []).append(subject.name)
    for subject in subjects:
        if subject.conversion is None or (names := seen.pop(subject.conversion.to_json(), None)) is None:
            continue
        header, *rows = zip(*subject.conversion.columns(), strict=True)
        blocks += [Heading(3, ", ".join(names)), Table(header, rows, left=len(header))]
        blocks += [Text(remark) for remark in subject.conversion.remarks()]
    return [Heading(2, "What is in fp8"), *blocks] if blocks else []


def health(subjects: Sequence[Subject]) -> list[Block]:
    """Of each run that recorded fp8 health: a map of layers and steps for each tensor, and the worst layers in numbers."""
    blocks: list[Block] = []
    for subject in subjects:
        if not subject.health:
            continue
        blocks.append(Heading(3, subject.name))
        found: dict[str, dict[str, dict[int, TensorHealth]]] = {role: {} for role in ROLES}
        for step, layers in sorted(subject.health.items()):
            for fqn, role, tensor in tensors_of(layers):
                found[role].setdefault(fqn, {})[step] = tensor
        for role, layers in found.items():
            rows = [
                (fqn, {step: -math.inf if tensor.nonfinite else tensor.sqnr_db for step, tensor in by_step.items()})
                for fqn, by_step in layers.items()
            ]
            if rows:
                blocks.append(
                    HeatMap(f"SQNR of {ROLES[role]}, by layer and step", rows, SQNR_LIMITS, " dB", "NaN or Inf")
                )
        blocks += worst_health(found)
    return [Heading(2, "fp8 health"), *blocks] if blocks else []


def worst_health(found: Mapping[str, Mapping[str, Mapping[int, TensorHealth]]]) -> list[Block]:
    """The ten layers whose tensors came off worst at any step; NaN and Inf first."""
    rows = []
    for role, layers in found.items():
        for fqn, by_step in layers.items():
            step = min(by_step, key=lambda step: ranking(by_step[step]))
            tensors = by_step.values()
            cells = (fqn, role, f"{step:,}", shown(by_step[step].sqnr_db, ".1f", " dB"))
            shares = (f"{max(getattr(tensor, name) for tensor in tensors):.2%}" for name in ("flushed", "clamped"))
            rows.append((ranking(by_step[step]), (*cells, *shares, f"{sum(tensor.nonfinite for tensor in tensors):,}")))
    rows.sort(key=lambda row: row[0])
    header = (
        "worst layers",
        "tensor",
        "at step",
        "SQNR there",
        "most flushed to zero",
        "most at the clamp",
        "NaN or Inf",
    )
    return [Table(header, [cells for _, cells in rows[:10]], left=2)]


def styles(group: Group) -> dict[str, tuple[str, str]]:
    """Name -> colour, and dashes that tell runs of one colour apart."""
    found: dict[str, tuple[str, str]] = {}
    used: dict[str, int] = {}
    others: dict[str, str] = {}
    for subject in group.subjects:
        color = COLORS.get(subject.converter)
        if color is None:
            color = others.setdefault(subject.converter, OTHER_COLORS[len(others) % len(OTHER_COLORS)])
        found[subject.name] = (color, DASHES[used.get(color, 0) % len(DASHES)])
        used[color] = used.get(color, 0) + 1
    return found


def shown(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return NONE
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not finite"


def gibibytes(value: float | None) -> str:
    return shown(value, ".1f" if value is None or value >= 10 else ".2f", " GiB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's dump folder, or a comparison's JSON")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "outputs" / "report",
        help="of the files written, without the ending (default: outputs/report)",
    )
    parser.add_argument("--title", default="Training report", help="(default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="largest gap to bf16 that is right (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        blocks = report(groups_of(args.runs), args.title, args.threshold)
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".html", to_html(args.title, blocks)), (".md", to_markdown(blocks))):
        path = args.out.with_name(args.out.name + ending)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
