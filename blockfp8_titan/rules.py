"""Rules decide which Linear computes in fp8, how, and why: name and size in, decision and reason out."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import tomli

from .formats import ALIGNMENT
from .recipe import GemmBackend, Recipe, ScaleFormat, WeightGradient

Action = Literal["convert", "skip"]

ROUTER_GATE = "*.router.gate"

_A_GLOB = "a glob on FQNs such as 'layers.*.attention.w[kv]', or '*' for every Linear"

_RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))


@dataclass
class Rule:
    """One entry of `rules`: the Linears it is about, what happens to them and how those converted compute.

    Raises:
        ValueError: names the key, its value and the requirement.
    """

    match: str = ""
    """Glob on a Linear's whole FQN, required; `*` crosses dots: "layers.*.attention.w[kv]"."""

    action: Action = "convert"
    """What happens to the Linears that match."""

    reason: str = ""
    """Why; repeated in the conversion report."""

    gemm_backend: GemmBackend | None = None
    """Who multiplies; None takes the section's."""

    wgrad: WeightGradient | None = None
    """How the weight gradient is computed; None takes the section's."""

    scale_format: ScaleFormat | None = None
    """Format of the dequantisation multipliers; None takes the section's."""

    min_in_features: int = 0
    """The rule matches only Linears with at least so many in_features."""

    min_out_features: int = 0
    """The rule matches only Linears with at least so many out_features."""

    def __post_init__(self) -> None:
        if not isinstance(self.match, str):
            raise ValueError(f"match = {self.match!r}: must be a string, {_A_GLOB}")
        if not self.match:
            raise ValueError(f"match is missing or empty: each rule needs one, {_A_GLOB}")
        if self.action not in get_args(Action):
            raise ValueError(f"action = {self.action!r}: must be one of {', '.join(map(repr, get_args(Action)))}")
        if not isinstance(self.reason, str):
            raise ValueError(f"reason = {self.reason!r}: must be a string")
        for name in ("min_in_features", "min_out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} = {value!r}: must be an integer, 0 or more")
        self.recipe_from(Recipe())
        if self.action == "skip" and (without_effect := [k for k in _RECIPE_FIELDS if getattr(self, k) is not None]):
            name = without_effect[0]
            raise ValueError(
                f"{name} = {getattr(self, name)!r} with action = 'skip': Linears that are skipped stay as they are; leave it out, or set "
                "action = 'convert'"
            )

    def recipe_from(self, recipe: Recipe) -> Recipe:
        """`recipe` with the fields that this rule sets."""
        return replace(recipe, **{k: getattr(self, k) for k in _RECIPE_FIELDS if getattr(self, k) is not None})

    def matches_name(self, fqn: str) -> bool:
        return fnmatchcase(fqn, self.match)

    def matches(self, fqn: str, in_features: int, out_features: int) -> bool:
        large_enough = in_features >= self.min_in_features and out_features >= self.min_out_features
        return large_enough and self.matches_name(fqn)


@dataclass(frozen=True)
class PlacedRule:
    """A rule and where it stands, as errors and reports call it: "rule 2", "skip_kv.toml rule 1"."""

    rule: Rule
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} (match = {self.rule.match!r})"


@dataclass(frozen=True)
class Decision:
    """What happens to one Linear. `rule` is the deciding rule's origin or "default"; `recipe` is None for "skip"."""

    action: Action
    rule: str
    reason: str
    recipe: Recipe | None


def rules_from(entries: Iterable[Rule | PlacedRule | Mapping[str, Any]], source: str = "") -> list[PlacedRule]:
    """Check rules written as tables (dicts) and give each its position, counted from 1.

    Args:
        entries: tables with the keys of `Rule`, or rules made already; a placed rule keeps its place.
        source: where the entries are from, put before the position; "" where that is plain from the context.
    Raises:
        ValueError: names source and position, the key, its value and the requirement.
    """
    if isinstance(entries, (str, Mapping, Rule, PlacedRule)) or not isinstance(entries, Iterable):
        raise ValueError(f"rules = {entries!r}: must be a list of rules")
    placed = []
    for position, entry in enumerate(entries, start=1):
        if isinstance(entry, PlacedRule):
            placed.append(entry)
            continue
        origin = f"{source} rule {position}".lstrip()
        try:
            placed.append(PlacedRule(entry if isinstance(entry, Rule) else _rule_from_table(entry), origin))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
    return placed


def _rule_from_table(table: Mapping[str, Any]) -> Rule:
    if not isinstance(table, Mapping):
        raise ValueError(f"{table!r}: must be a table, for example {{match = 'layers.*', action = 'skip'}}")
    known = [field.name for field in fields(Rule)]
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{_did_you_mean(key, known)}; the keys are {', '.join(known)}")
    return Rule(**table)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def preset_folder() -> Path:
    """The folder of presets: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs" / "rules"
    return installed if installed.is_dir() else package.parent / "configs" / "rules"


def presets() -> list[str]:
    """Names that `rules_file` accepts in place of a path."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load_rules_file(path_or_preset: str) -> list[PlacedRule]:
    """Read the [[rules]] of a TOML file.

    Args:
        path_or_preset: a path, relative to the working directory; or a preset's bare name ("skip_kv").
    Raises:
        ValueError: names the file and what is wrong: no such file or preset, no TOML (with the line), no rules,
            an unknown key, a bad value.
    """
    name = f"rules_file = {path_or_preset!r}"
    try:
        path = Path(path_or_preset).expanduser()
        is_bare = path.name == path_or_preset and not path.suffix
        if is_bare and not path.is_file():
            path = preset_folder() / f"{path_or_preset}.toml"
        if not path.is_file():
            found = "a folder" if path.is_dir() else f"no such file{_did_you_mean(path.stem.lower(), presets())}"
            raise ValueError(f"{name}: {found}; give a file's path or one of the presets {', '.join(presets())}")
    except (OSError, RuntimeError) as error:  # a name too long, a home that is not known
        raise ValueError(f"{name}: cannot be read: {error}; give a file's path") from error
    try:
        content = tomli.loads(path.read_text(encoding="utf-8"))
    except tomli.TOMLDecodeError as error:
        raise ValueError(f"{name}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read: {error}; it must be a TOML file in UTF-8") from error
    for key in content:
        if key != "rules":
            hint = _did_you_mean(key, ["rules"])
            raise ValueError(f"{name}: unknown top-level key {key!r}{hint}; the file holds [[rules]] only")
    entries = content.get("rules")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name}: has no rules; write each as a table under [[rules]], or leave rules_file empty")
    try:
        return rules_from(entries, path.name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def decide(
    fqn: str, in_features: int, out_features: int, rules: Sequence[PlacedRule], recipe: Recipe = Recipe()
) -> Decision:
    """What happens to one Linear: its size, then the first rule that matches, then the defaults.

    By default the Linears of the repeated blocks are converted (a component of the FQN is a number, as in
    "layers.3.attention.wq"), MoE router gates and all other Linears are not.

    Args:
        rules: in order; the first match decides.
        recipe: how a converted Linear computes where its rule says nothing.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size <= 0 or size % ALIGNMENT:
            return Decision("skip", "default", f"{name} = {size} is no positive multiple of {ALIGNMENT}", None)
    for placed in rules:
        rule = placed.rule
        if rule.matches(fqn, in_features, out_features):
            rule_recipe = rule.recipe_from(recipe) if rule.action == "convert" else None
            return Decision(rule.action, placed.origin, rule.reason or f"match = {rule.match!r}", rule_recipe)
    if fnmatchcase(fqn, ROUTER_GATE):
        return Decision("skip", "default", "router gate: small, and its errors send tokens astray", None)
    if any(part.isdecimal() for part in fqn.split(".")):
        return Decision("convert", "default", "in a repeated block", recipe)
    return Decision("skip", "default", "outside the repeated blocks", None)


def check_rules_apply(rules: Sequence[PlacedRule], linears: Sequence[tuple[str, int, int]]) -> list[str]:
    """Find rules without effect.

    Args:
        linears: (fqn, in_features, out_features) of every Linear.
    Returns:
        A warning for each rule that never decides because earlier rules take all that it matches.
    Raises:
        ValueError: a rule matches no Linear; names it, its position, Linears that exist and the way out.
    """
    warnings = []
    taken: dict[str, str] = {}  # FQN -> origin of the rule that decides
    for placed in rules:
        matched = [fqn for fqn, *sizes in linears if placed.rule.matches(fqn, *sizes)]
        if not matched:
            raise ValueError(f"{placed} matches no Linear: {_why_unmatched(placed.rule, linears)}")
        if all(fqn in taken for fqn in matched):
            earlier = ", ".join(dict.fromkeys(taken[fqn] for fqn in matched))
            warnings.append(
                f"{placed} never decides: {earlier} comes first and takes all {len(matched)} of its Linears"
            )
        for fqn in matched:
            taken.setdefault(fqn, placed.origin)
    return warnings


def _why_unmatched(rule: Rule, linears: Sequence[tuple[str, int, int]]) -> str:
    if not linears:
        return "the model has none; remove the rule"
    by_name = [linear for linear in linears if rule.matches_name(linear[0])]
    if by_name:
        fqn, in_features, out_features = max(by_name, key=lambda linear: min(linear[1:]))
        return (
            f"{len(by_name)} have such a name, but none has in_features >= {rule.min_in_features} and out_features >= "
            f"{rule.min_out_features} ({fqn} has {in_features} and {out_features}); lower the minimum or remove the rule"
        )
    # Layers repeat: one example for each kind of name tells more than eight layers of the same.
    examples: dict[str, str] = {}
    for fqn, *_ in linears:
        examples.setdefault(_without_numbers(fqn), fqn)
    kinds = list(examples)
    close = difflib.get_close_matches(_without_numbers(rule.match), kinds, n=3, cutoff=0.5)
    names = ", ".join(examples[kind] for kind in (close or kinds[:8]))
    found = f"did you mean one of {names}?" if close else f"the model has {names}."
    return f"{found} Correct the pattern (a glob on the whole FQN) or remove the rule"


def _without_numbers(fqn: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in fqn.split("."))
