"""Swap a model's Linears for blockwise-fp8 ones, and report what was swapped and why. For any nn.Module."""

import json
import textwrap
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch.nn as nn
from torch.distributed.tensor import DTensor

from .fqns import collapse
from .fusion import Fusion, apply_fusions, describe_fusions, plan_fusions
from .linear import BlockwiseFP8Linear
from .ops.library import FLOATS
from .recipe import Fuse, Recipe, SwiGLUInputs, check_recipe
from .rules import PlacedRule, Rule, check_rules_apply, decide, rules_from
from .weight import gather_in_fp8

TABLE_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One nn.Linear of the model."""

    fqn: str
    aliases: tuple[str, ...]
    """Further names under which the model holds the same module."""
    shape: tuple[int, int]
    """(out_features, in_features), the weight's shape."""
    action: Literal["convert", "skip", "already fp8"]
    rule: str
    """The deciding rule's place ("rule 2", "skip_kv.toml rule 1"), or "default"."""
    reason: str
    recipe: Recipe | None
    """How it computes; None where it is not converted."""
    parameters: int
    """Elements of weight and bias."""
    parameter_share: float
    """`parameters` as a fraction of the model's."""
    flop_share: float
    """out_features * in_features as a fraction of the sum over all Linears (twice for a module held under two names)."""

    @property
    def in_fp8(self) -> bool:
        return self.action != "skip"


@dataclass(frozen=True)
class ConversionReport:
    """What happens to every nn.Linear of a model, and why."""

    rows: tuple[Row, ...]
    """One for each Linear, in the model's order."""
    recipe: Recipe
    """How a converted Linear computes where its rule says nothing."""
    model_parameters: int
    """Elements of all parameters of the model, tied ones counted once."""
    fp8_parameters: int
    """Those that belong to Linears in fp8."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    """Norms and feed-forwards that quantise what they compute, and those that do not and why."""

    def with_notes(self, *notes: str) -> "ConversionReport":
        """This report with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def totals(self) -> dict[str, int | float]:
        """Counts, and the shares (0 to 1) of linear FLOPs and of parameters in fp8."""
        in_fp8 = [row for row in self.rows if row.in_fp8]
        return {
            "linears": len(self.rows),
            "linears_in_fp8": len(in_fp8),
            "flop_share_in_fp8": sum(row.flop_share for row in in_fp8),
            "model_parameters": self.model_parameters,
            "parameter_share_in_fp8": self.fp8_parameters / self.model_parameters if self.model_parameters else 0.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, every row in full, in types that JSON has."""
        return {"totals": self.totals(), **asdict(self)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_dict(report: Mapping[str, Any]) -> "ConversionReport":
        """The report that `to_dict` was of."""
        rows = [
            Row(
                **{
                    **row,
                    "aliases": tuple(row["aliases"]),
                    "shape": tuple(row["shape"]),
                    "recipe": Recipe(**row["recipe"]) if row["recipe"] else None,
                }
            )
            for row in report["rows"]
        ]
        known = {field.name: report[field.name] for field in fields(ConversionReport)}
        tuples = {
            "rows": tuple(rows),
            "fusions": tuple(Fusion(**{**fusion, "linears": tuple(fusion["linears"])}) for fusion in report["fusions"]),
            "warnings": tuple(report["warnings"]),
            "notes": tuple(report["notes"]),
        }
        return ConversionReport(**{**known, **tuples, "recipe": Recipe(**report["recipe"])})

    def columns(self) -> list[tuple[str, ...]]:
        """Columns of text, their heads first; rows that differ in layer numbers only share a line."""
        header = ("linear", "out x in", "action", "recipe", "by", "params", "FLOPs", "reason")
        lines = [self._cells(fqn, rows) for fqn, rows in collapse(self.rows, _alike)]
        return [column for column in zip(header, *lines, strict=True) if column[0] != "recipe" or any(column[1:])]

    def to_table(self) -> str:
        """`columns` and what is to be said below them, as aligned text about 120 columns wide."""
        columns = self.columns()
        # The reason comes last and wraps; the other columns are as wide as their widest cell.
        widths = [max(map(len, column)) for column in columns[:-1]]
        room = max(TABLE_WIDTH - sum(widths) - 2 * len(widths), 24)
        text = []
        for *cells, reason in zip(*columns, strict=True):
            left = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            first, *more = textwrap.wrap(reason, room) or [""]
            text.append(f"{left}  {first}".rstrip())
            text += [" " * (len(left) + 2) + line for line in more]
        for remark in self.remarks():
            text += textwrap.wrap(remark, TABLE_WIDTH, subsequent_indent="  ")
        return "\n".join(text)

    def remarks(self) -> list[str]:
        """Totals, default recipe, warnings, fusions and notes, in words."""
        totals = self.totals()
        return [
            f"{totals['linears_in_fp8']} of {totals['linears']} Linears in fp8: {totals['flop_share_in_fp8']:.1%} of linear "
            f"FLOPs, {totals['parameter_share_in_fp8']:.1%} of {self.model_parameters:,} parameters",
            f"recipe where none is shown: {_describe(self.recipe)}",
            *(f"warning: {remark}" for remark in self.warnings),
            *describe_fusions(self.fusions),
            *(f"note: {remark}" for remark in self.notes),
        ]

    def _cells(self, fqn: str, rows: list[Row]) -> tuple[str, ...]:
        row = rows[0]
        return (
            fqn if len(rows) == 1 else f"{fqn} ×{len(rows)}",
            f"{row.shape[0]} x {row.shape[1]}",
            row.action,
            _describe(row.recipe, unlike=self.recipe) if row.recipe else "",
            row.rule,
            f"{sum(row.parameter_share for row in rows):.1%}",
            f"{sum(row.flop_share for row in rows):.1%}",
            row.reason,
        )


def plan_conversion(
    model: nn.Module,
    rules: Iterable[Rule | PlacedRule | Mapping[str, Any]] = (),
    *,
    recipe: Recipe = Recipe(),
    fuse: Fuse = "auto",
    swiglu_inputs: SwiGLUInputs = "bf16",
) -> ConversionReport:
    """Decide about every nn.Linear of a model, without a change to it.

    Args:
        model: on any device, meta included.
        rules: in order, the first match decides; as `Rule` or as dicts with its keys.
        recipe: how a converted Linear computes where its rule says nothing.
        fuse: "auto" lets norms and feed-forwards that `fusion` knows quantise what they compute; "off" none.
        swiglu_inputs: what fused feed-forwards keep of w1(x) and w3(x) for backward: "bf16" the values; "fp8" quantised, in half of the
            bytes, which pays where checkpointing would compute them again.
    Raises:
        ValueError: names the rule or the FQN and the way out. The model is a Linear itself, is sharded, or is converted already;
            a rule is malformed or matches no Linear; one module has two names for which the decisions differ.
    """
    for name, value, choices in (("fuse", fuse, Fuse), ("swiglu_inputs", swiglu_inputs, SwiGLUInputs)):
        if value not in get_args(choices):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, get_args(choices)))}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: must be an nn.Module")
    check_recipe(recipe)
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"model is itself a {type(model).__name__} and cannot be swapped in place: "
            "use BlockwiseFP8Linear.from_linear(model, recipe), or pass the module that holds it"
        )
    placed_rules = rules_from(rules)
    linears: dict[nn.Linear, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            linears.setdefault(module, []).append(fqn)
    named_sizes = [(fqn, linear.in_features, linear.out_features) for linear, fqns in linears.items() for fqn in fqns]
    warnings = check_rules_apply(placed_rules, named_sizes)

    model_parameters = sum(parameter.numel() for parameter in model.parameters())
    all_flops = sum(in_features * out_features for _, in_features, out_features in named_sizes)
    rows = []
    fp8_parameters: dict[int, int] = {}  # by id: a tied weight counts once
    for linear, fqns in linears.items():
        decision = _decide_for_all_names(linear, fqns, placed_rules, recipe)
        size = linear.in_features * linear.out_features
        parameters = {id(parameter): parameter.numel() for parameter in linear.parameters(recurse=False)}
        row = Row(
            fqn=fqns[0],
            aliases=tuple(fqns[1:]),
            shape=(linear.out_features, linear.in_features),
            **decision,
            parameters=sum(parameters.values()),
            parameter_share=sum(parameters.values()) / model_parameters if model_parameters else 0.0,
            flop_share=size * len(fqns) / all_flops if all_flops else 0.0,
        )
        rows.append(row)
        if row.in_fp8:
            fp8_parameters |= parameters
    if not any(row.in_fp8 for row in rows):
        warnings.append("no Linear is in fp8: the model computes as before")
    recipes = {fqn: row.recipe for row in rows if row.in_fp8 for fqn in (row.fqn, *row.aliases)}
    return ConversionReport(
        tuple(rows),
        recipe,
        model_parameters,
        sum(fp8_parameters.values()),
        tuple(warnings),
        fusions=plan_fusions(model, recipes, fuse, swiglu_inputs),
    )


def convert_model(
    model: nn.Module,
    rules: Iterable[Rule | PlacedRule | Mapping[str, Any]] = (),
    *,
    recipe: Recipe = Recipe(),
    fuse: Fuse = "auto",
    swiglu_inputs: SwiGLUInputs = "bf16",
) -> ConversionReport:
    """Swap the Linears that the rules choose for `BlockwiseFP8Linear`, in place.

    Parameters are shared with the Linears replaced, so tied weights stay tied and an optimizer made before stays valid; a module
    held under two names is converted once and stays shared. Nothing is swapped if anything is wrong. Modules that are fused
    (`ConversionReport.fusions`) stay the same objects, of a subclass of their class. Convert before FSDP, tensor
    parallelism or torch.compile.

    Args, Raises: as `plan_conversion`.
    Returns:
        One row for each nn.Linear: what happened to it and why.
    """
    report = plan_conversion(model, rules, recipe=recipe, fuse=fuse, swiglu_inputs=swiglu_inputs)
    swaps: dict[nn.Module, BlockwiseFP8Linear] = {}
    for row in report.rows:
        if row.action == "convert":
            linear = model.get_submodule(row.fqn)
            assert isinstance(linear, nn.Linear) and row.recipe is not None
            swaps[linear] = BlockwiseFP8Linear.from_linear(linear, row.recipe, row.fqn)
    for parent in list(model.modules()):
        # Not named_children(), which shows a child held under two names once.
        for name, child in list(parent._modules.items()):
            if child in swaps:
                setattr(parent, name, swaps[child])
    apply_fusions(model, report.fusions)
    return report


def gather_obstacles(model: nn.Module, report: ConversionReport) -> dict[str, str]:
    """Which of the Linears in fp8 FSDP2 cannot gather in fp8, by name, and why not.

    Args:
        model: before or after the conversion that the report is of.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    obstacles = {}
    for row in report.rows:
        own = {f"{fqn}.weight" for fqn in (row.fqn, *row.aliases)}
        held_as = names.get(id(model.get_submodule(row.fqn).weight), [])
        others = [name for name in held_as if name not in own]
        if row.in_fp8 and not held_as:
            obstacles[row.fqn] = "its weight is computed from other parameters"
        elif row.in_fp8 and others:
            obstacles[row.fqn] = f"its weight is tied to {', '.join(others)}"
    return obstacles


def gather_weights_in_fp8(model: nn.Module, report: ConversionReport) -> ConversionReport:
    """Let FSDP2 gather the weights of all Linears in fp8 as one byte per element, in place; call before fully_shard.

    After each optimizer step, on all ranks, `blockfp8_titan.refresh_scales(model)` saves an all-reduce for each weight.

    Args:
        model: converted on every rank alike; unsharded, any device.
        report: `convert_model`'s.
    Returns:
        The report with a note for each weight that stays as it was: see `gather_obstacles`.
    Raises:
        ValueError: the report is not of this model's conversion; a weight is sharded already.
    """
    obstacles = gather_obstacles(model, report)
    for row in report.rows:
        if row.in_fp8 and row.fqn not in obstacles:
            linear = model.get_submodule(row.fqn)
            if not isinstance(linear, BlockwiseFP8Linear):
                raise ValueError(
                    f"{row.fqn} is a {type(linear).__name__}, and a Linear in fp8 by the report: pass the report that convert_model "
                    "returned for this model"
                )
            if isinstance(linear.weight, DTensor):
                raise ValueError(
                    f"{row.fqn} has a sharded weight (DTensor): call gather_weights_in_fp8 before fully_shard; tensor-parallel weights are "
                    "gathered unquantised"
                )
            gather_in_fp8(linear, linear.recipe.scale_format)
    return report.with_notes(*gather_notes(report, obstacles))


def gather_notes(report: ConversionReport, obstacles: Mapping[str, str]) -> list[str]:
    """What a report says where gathering in fp8 was asked for: how many weights are, and which others are not and why."""
    in_fp8 = sum(row.in_fp8 for row in report.rows)
    return [
        f"FSDP2 over several ranks gathers {in_fp8 - len(obstacles)} of the {in_fp8} weights in fp8, one byte per element",
        *(f"{fqn} is gathered unquantised: {reason}" for fqn, reason in obstacles.items()),
    ]


def _decide_for_all_names(
    linear: nn.Linear, fqns: list[str], rules: list[PlacedRule], recipe: Recipe
) -> dict[str, Any]:
    """action, rule, reason and recipe of one Linear's row."""
    fqn = fqns[0]
    decisions = [decide(name, linear.in_features, linear.out_features, rules, recipe) for name in fqns]
    decision = decisions[0]
    for name, other in zip(fqns, decisions, strict=True):
        if (other.action, other.recipe) != (decision.action, decision.recipe):
            raise ValueError(
                f"{fqn} and {name} are one module, but the decisions differ: {decision.action} by {decision.rule} "
                f"({decision.reason}), {other.action} by {other.rule} ({other.reason}); write a rule that matches both"
            )
    if isinstance(linear, BlockwiseFP8Linear):
        if decision.action == "convert":
            raise ValueError(
                f"{fqn} is a BlockwiseFP8Linear already: convert a model once; to leave layers as they are, "
                f"add a rule with match = {fqn!r} and action = 'skip' before the others"
            )
        return {
            "action": "already fp8",
            "rule": decision.rule,
            "reason": decision.reason,
            "recipe": linear.recipe,
        }
    if type(linear) is not nn.Linear:
        reason = f"a {type(linear).__name__}: only nn.Linear itself is converted"
        return {"action": "skip", "rule": "default", "reason": reason, "recipe": None}
    if linear.weight.dtype not in FLOATS:
        reason = f"weight.dtype = {linear.weight.dtype} is neither {' nor '.join(map(str, FLOATS))}"
        return {"action": "skip", "rule": "default", "reason": reason, "recipe": None}
    if decision.action == "convert" and isinstance(linear.weight, DTensor):
        raise ValueError(f"{fqn} has a sharded weight (DTensor): convert the model before FSDP or tensor parallelism")
    return {name: getattr(decision, name) for name in ("action", "rule", "reason", "recipe")}


def _alike(row: Row) -> Hashable:
    """What rows that share a line of the table have in common."""
    return row.shape, row.action, row.rule, row.reason, row.recipe


def _describe(recipe: Recipe, unlike: Recipe | None = None) -> str:
    """ "wgrad=bf16 …": the fields of a recipe, or those in which it differs from another."""
    values = [(field.name, getattr(recipe, field.name)) for field in fields(Recipe)]
    return " ".join(f"{name}={value}" for name, value in values if unlike is None or getattr(unlike, name) != value)
