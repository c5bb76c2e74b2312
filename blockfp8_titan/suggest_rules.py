"""python -m blockfp8_titan.suggest_rules RUN: a rules file that takes the layers in bad fp8 health out of fp8.

Reads health.jsonl in a run's dump folder. A layer is taken out if the median over the observed steps of one of its tensors is beyond a
limit, or if NaN or Inf was there at any. Rules of the run's own rules_file follow, so that the new file can stand in its place.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .health import Health
from .health_limits import Limits, skip_rule, to_toml
from .health_log import from_record, tensors_of
from .journal import read
from .metrics import HEALTH_FILE, RUNS_FILE
from .quantization_error import TensorHealth
from .rules import Rule, load_rules_file

OUT = "suggested_rules.toml"


def read_health(folder: Path) -> dict[int, Health]:
    """Step -> health, as a run recorded it; empty where it recorded none."""
    return {
        record["step"]: from_record(record["layers"]) for record in read(folder / HEALTH_FILE) if "layers" in record
    }


def typical(steps: Iterable[Health]) -> Health:
    """Medians over steps, without those where a number is not defined; of NaN and Inf the largest count."""
    found: dict[tuple[str, Any], list[TensorHealth]] = {}
    for health in steps:
        for fqn, role, tensor in tensors_of(health):
            found.setdefault((fqn, role), []).append(tensor)
    medians: Health = {}
    for (fqn, role), tensors in found.items():
        numbers: dict[str, Any] = {}
        for field in fields(TensorHealth):
            values = [value for tensor in tensors if not math.isnan(value := getattr(tensor, field.name))]
            middle = max if field.name == "nonfinite" else statistics.median
            numbers[field.name] = middle(values) if values else math.nan
        medians.setdefault(fqn, {})[role] = TensorHealth(**numbers)
    return medians


def suggest(steps: Iterable[Health], limits: Limits) -> list[dict[str, str]]:
    """A rule for each layer beyond a limit, which keeps it out of fp8 and says why."""
    reasons: dict[str, list[str]] = {}
    for crossing in limits.crossings(typical(steps)):
        reasons.setdefault(crossing.fqn, []).append(crossing.text)
    return [skip_rule(fqn, "fp8 health: " + "; ".join(texts)) for fqn, texts in reasons.items()]


def rules_file_of(folder: Path) -> str:
    """What the run's config had; empty where it had none."""
    starts = read(folder / RUNS_FILE)
    return starts[-1].get("config", {}).get("blockwise_fp8", {}).get("rules_file", "") if starts else ""


def own_rules(rules_file: str, folder: Path) -> list[dict[str, Any]]:
    """The rules of a run's file or preset, as tables.

    Raises:
        ValueError: it cannot be read any more; names the run.
    """
    default = Rule(match="*")
    tables = []
    try:
        placed_rules = load_rules_file(rules_file)
    except ValueError as error:
        raise ValueError(f"{folder}: the run's {error}; its rules belong behind the new ones") from error
    for placed in placed_rules:
        values = {field.name: getattr(placed.rule, field.name) for field in fields(Rule)}
        tables.append({k: v for k, v in values.items() if k in ("match", "action") or v != getattr(default, k)})
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    default = Limits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the job.dump_folder of a run")
    parser.add_argument(
        "--sqnr-below", type=float, default=default.sqnr_below, metavar="DB", help="(default: %(default)s)"
    )
    for name, what in (("flushed", "flushed to zero"), ("clamped", "at the largest payload")):
        limit = getattr(default, f"{name}_above")
        parser.add_argument(
            f"--{name}-above", type=float, default=limit, metavar="SHARE", help=f"of values {what} (default: {limit})"
        )
    parser.add_argument("--from-step", type=int, default=0, metavar="N", help="leave out the steps before")
    parser.add_argument("--out", type=Path, help=f"the file to write (default: RUN/{OUT})")
    args = parser.parse_args(arguments)
    out = args.out or args.run / OUT
    try:
        limits = Limits(args.sqnr_below, args.flushed_above, args.clamped_above)
        steps = {step: health for step, health in read_health(args.run).items() if step >= args.from_step}
        if not steps:
            observed = (
                f"{HEALTH_FILE} has no step from {args.from_step} on" if args.from_step else "no step was observed"
            )
            raise ValueError(
                f"{args.run}: {observed}; name the job.dump_folder of a run that came to a step that [blockwise_fp8] health_freq, 500 by "
                "default and not 0, divides"
            )
        rules = suggest(steps.values(), limits)
        before = rules_file_of(args.run)
        kept = own_rules(before, args.run) if rules and before else []
    except ValueError as error:
        parser.error(str(error))
    about = f"{args.run}, steps {min(steps)} to {max(steps)}, {len(steps)} observed"
    if not rules:
        print(f"No layer is beyond a limit: {about}; {limits}. Nothing is written.")
        return 0
    head = f"# Linears in bad fp8 health: {about}.\n# Limits: {limits}\n"
    then = [f'# From rules_file = "{before}", in whose place this file stands.'] if kept else []
    parts = [head, *(to_toml(rule) + "\n" for rule in rules), *then, *(to_toml(rule) + "\n" for rule in kept)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts), encoding="utf-8")
    print(f'{out}: {len(rules)} Linears to keep out of fp8. To use it: [blockwise_fp8] rules_file = "{out}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
