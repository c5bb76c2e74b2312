"""What a report is about: runs, read from their dump folders or from the JSON results of compare_loss.py and compare_throughput.py."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import ADDED, BF16, CONVERTERS, TENSORWISE

from blockfp8_titan.conversion import ConversionReport
from blockfp8_titan.converter import REPORT_FILE
from blockfp8_titan.health import Health
from blockfp8_titan.journal import read
from blockfp8_titan.metrics import METRICS_FILE, RUNS_FILE
from blockfp8_titan.suggest_rules import read_health


@dataclass(frozen=True)
class Speed:
    """Tokens per second and process: the median, and the 10th and 90th percentiles where they are known."""

    tps: float
    low: float | None = None
    high: float | None = None


@dataclass
class Subject:
    """One run, as far as it is known."""

    name: str
    converter: str
    """Of runs.CONVERTERS where it is one of them."""
    is_base: bool
    """Whether others of its group are compared with it."""
    loss: dict[int, float] = field(default_factory=dict)
    grad_norm: dict[int, float] = field(default_factory=dict)
    speed: Speed | None = None
    memory: float | None = None
    """GiB, peak of a process."""
    speed_ratio: float | None = None
    """To the base, where the comparison says it: round by round. Else it is that of the medians."""
    memory_ratio: float | None = None
    config: dict[str, str] = field(default_factory=dict)
    """Settings by dotted name: all of a run folder's, the command line's of a comparison."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    conversion: ConversionReport | None = None
    health: Mapping[int, Health] = field(default_factory=dict)
    """By step."""
    tokens_per_step: float | None = None
    measured: Mapping[str, str | None] = field(default_factory=dict)
    """Date and commit of a comparison."""
    remark: str = ""


@dataclass
class Group:
    """Runs that are compared with each other."""

    title: str
    subjects: list[Subject]

    @property
    def base(self) -> Subject | None:
        return next((subject for subject in self.subjects if subject.is_base), None)


def groups_of(paths: Sequence[Path]) -> list[Group]:
    """Run folders, all in one group, and results, each with its own.

    Raises:
        ValueError: a path is neither; names it and what is missing.
    """
    folders = [path for path in paths if path.is_dir()]
    groups = [Group("Runs", [of_folder(folder, name) for folder, name in _named(folders)])] if folders else []
    for path in paths:
        if path not in folders:
            groups += of_result(path)
    return groups


def of_folder(folder: Path, name: str) -> Subject:
    """A run that `blockfp8_titan.metrics` recorded.

    Raises:
        ValueError: it recorded no step, or its conversion cannot be read.
    """
    records = [record for record in read(folder / METRICS_FILE) if "step" in record]
    if not records:
        raise ValueError(f"{folder}: there is no step in {METRICS_FILE}; name the job.dump_folder of a recorded run")
    starts = read(folder / RUNS_FILE)
    latest = starts[-1] if starts else {}
    config = flatten(latest.get("config", {}))
    converter = _converter_of(latest.get("config", {}))
    first_steps = ", ".join(str(start.get("first_step")) for start in starts)
    return Subject(
        name=name,
        converter=converter,
        is_base=converter == BF16,
        loss=_curve(records, "loss"),
        grad_norm=_curve(records, "grad_norm"),
        speed=_speed_of(records),
        memory=max((record["memory_gib"] for record in records if record.get("memory_gib")), default=None),
        config=config,
        versions=latest.get("versions", {}),
        hardware={**latest.get("hardware", {}), "processes": latest.get("world_size")},
        conversion=_conversion_of(folder / REPORT_FILE),
        health=read_health(folder),
        tokens_per_step=_tokens_per_step(records[-1]),
        remark=f"started {len(starts)} times, at steps {first_steps}" if len(starts) > 1 else "",
    )


def _tokens_per_step(record: Mapping[str, Any]) -> float | None:
    return record["tokens_seen"] / record["step"] if record.get("tokens_seen") else None


def _conversion_of(path: Path) -> ConversionReport | None:
    if not path.is_file():
        return None
    try:
        return ConversionReport.from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no conversion report of this version ({type(error).__name__}: {error}); remove it to report without"
        ) from error


def of_result(path: Path) -> list[Group]:
    """The runs of a comparison.

    Raises:
        ValueError: the file is no result of compare_loss.py or compare_throughput.py.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: neither a run's folder nor a readable JSON file ({error})") from error
    summary = result.get("summary") if isinstance(result, dict) else None
    if isinstance(summary, dict) and "loss" in result:
        return [_of_losses(path, result)]
    if isinstance(summary, list) and "overrides" in result:
        return _of_throughput(path, result)
    raise ValueError(f"{path}: must be the JSON that compare_loss.py or compare_throughput.py wrote")


def _of_losses(path: Path, result: Mapping[str, Any]) -> Group:
    subjects = [
        Subject(
            name=name,
            converter=name.split()[0],
            is_base=name == BF16,
            loss=_points(result["loss"][name]),
            grad_norm=_points(result.get("grad_norm", {}).get(name, [])),
            speed=Speed(summary["tps"]),
            memory=summary["memory"],
            config=from_overrides(result["overrides"][name]),
            versions=result["versions"],
            hardware={**result["hardware"], "processes": result["nproc"], "runs at once": result.get("at_once")},
            measured=_measured(result),
        )
        for name, summary in result["summary"].items()
    ]
    return Group(f"{result['model']}, {result['mode']} ({path.stem})", subjects)


def _of_throughput(path: Path, result: Mapping[str, Any]) -> list[Group]:
    groups = []
    for title in dict.fromkeys(row["group"] for row in result["summary"]):
        subjects = []
        for row in (row for row in result["summary"] if row["group"] == title):
            subject = Subject(
                name=row["arm"],
                converter=row["converter"],
                is_base=row["arm"] == BF16,
                config=from_overrides(result["overrides"][f"{title}/{row['arm']}"]),
                versions=result["versions"],
                hardware={**result["hardware"], "processes": row["nproc"]},
                measured=_measured(result),
                remark=f"failed: {row['failure']}" if row["failure"] else "",
            )
            if row["rounds"]:
                subject.speed = Speed(row["tps"], *_deciles(_tps_of_rounds(result, title, row["arm"])))
                subject.memory = row["memory"]
                subject.speed_ratio, subject.memory_ratio = row.get("tps_ratio"), row.get("memory_ratio")
            subjects.append(subject)
        groups.append(Group(f"{title} ({path.stem})", subjects))
    return groups


def _points(pairs: Sequence[tuple[int, float | None]]) -> dict[int, float]:
    """Step -> value; null stands for what JSON cannot say."""
    return {step: math.nan if value is None else value for step, value in pairs}


def _measured(result: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: result.get(name) for name in ("date", "commit")}


def _tps_of_rounds(result: Mapping[str, Any], group: str, arm: str) -> list[float]:
    """Of the logged intervals after the first steps, of all rounds; empty in results from before they were recorded."""
    tps = []
    for run in result.get("runs", []):
        if (run["group"], run["arm"]) == (group, arm) and run["speed"]:
            steps = run["speed"].get("steps", [])
            tps += [value for (before, _), (_, value) in itertools.pairwise(steps) if before >= result["skip"]]
    return tps


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables -> dotted name: value as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def from_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """torchtitan's command line -> dotted name: value; "--a.b" is true, "--a.no-b" false."""
    flat = {}
    for override in overrides:
        name, has_value, value = override.removeprefix("--").partition("=")
        flat[re.sub(r"\.no[-_]", ".", name)] = value if has_value else str(not re.search(r"\.no[-_]", name)).lower()
    return flat


def _curve(records: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Step -> value; NaN where a record has null, which stands for what JSON cannot say."""
    return {r["step"]: math.nan if r[key] is None else r[key] for r in records if key in r}


def _speed_of(records: Sequence[Mapping[str, Any]]) -> Speed | None:
    """Without the first record of each start, which holds the compilation."""
    tps = [
        record["tps"]
        for before, record in itertools.pairwise(records)
        if record.get("tps") and record.get("run") == before.get("run")
    ]
    return Speed(statistics.median(tps), *_deciles(tps)) if tps else None


def _deciles(values: Sequence[float]) -> tuple[float, float] | tuple[()]:
    """The 10th and 90th percentiles; none of less than two."""
    if len(values) < 2:
        return ()
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def _converter_of(config: Mapping[str, Any]) -> str:
    """The name in runs.CONVERTERS of what a job's converters do, else theirs."""
    converters = config.get("model", {}).get("converters", [])
    own = [name for name in converters if name not in ADDED]
    name = ",".join(own) or BF16
    if TENSORWISE in own:
        recipe = flatten(config).get(f"{TENSORWISE}.recipe_name", "")
        name = f"float8_{recipe if recipe in ('rowwise', 'tensorwise') else 'tensorwise'}"
    name += "".join(suffix for added, suffix in ADDED.items() if added in converters)
    return name if name in CONVERTERS else ",".join(converters)


def _named(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Folders with the shortest ends of their paths that tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for parts in range(1, max((len(path.parts) for path in resolved), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return list(zip(folders, names, strict=True))
    raise ValueError(f"{folders[0]}: the same run twice")
