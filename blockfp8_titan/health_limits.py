"""Which numbers of fp8 health are bad enough to take a layer out of fp8, and the rule that does."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .health import Health, Role
from .quantization_error import TensorHealth


@dataclass(frozen=True)
class Crossing:
    """A limit that one tensor of one layer crosses."""

    fqn: str
    role: Role
    what: str
    """"sqnr", "flushed", "clamped" or "nonfinite"."""
    text: str
    """In words, such as "SQNR of dy 21.3 dB, below 26"."""


@dataclass(frozen=True)
class Limits:
    """From where on a tensor is in bad health. NaN and Inf are, always.

    Raises:
        ValueError: names the limit, its value and the requirement.
    """

    sqnr_below: float = 26.0
    """dB. Rounding to e4m3 leaves 31.5 of a block without underflow, whatever its distribution; less means that values are lost."""

    flushed_above: float = 0.1
    """Share of the values other than zero."""

    clamped_above: float = 1.0
    """Share of the values. No limit by default: in blocks of equal magnitudes all are at the clamp, and exact."""

    def __post_init__(self) -> None:
        if math.isnan(self.sqnr_below):
            raise ValueError(f"sqnr_below = {self.sqnr_below}: must be a number of dB")
        for name in ("flushed_above", "clamped_above"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} = {value}: must be a share, from 0 to 1")

    def __str__(self) -> str:
        shares = ((self.flushed_above, "flushed to zero"), (self.clamped_above, "at the largest payload"))
        named = [f"over {share:.1%} {where}" for share, where in shares if share < 1]
        return ", ".join([f"SQNR below {self.sqnr_below:g} dB", *named, "NaN or Inf"])

    def crossings(self, health: Health) -> Iterator[Crossing]:
        """What of this is beyond the limits, layer by layer."""
        for fqn, tensors in health.items():
            for role, tensor in tensors.items():
                for what, text in self._crossed(tensor).items():
                    yield Crossing(fqn, role, what, text.format(role))

    def _crossed(self, tensor: TensorHealth) -> dict[str, str]:
        crossed = {}
        if tensor.nonfinite:
            crossed["nonfinite"] = f"{{}} has {tensor.nonfinite:,} NaN or Inf"
        if tensor.sqnr_db < self.sqnr_below:
            crossed["sqnr"] = f"SQNR of {{}} {tensor.sqnr_db:.1f} dB, below {self.sqnr_below:g}"
        for what, limit in (("flushed", self.flushed_above), ("clamped", self.clamped_above)):
            if (share := getattr(tensor, what)) > limit:
                where = "flushed to zero" if what == "flushed" else "at the largest payload"
                crossed[what] = f"{share:.1%} of {{}} {where}, above {limit:.1%}"
        return crossed


def skip_rule(fqn: str, reason: str = "") -> dict[str, str]:
    """The rule that keeps exactly this linear out of fp8."""
    # Brackets alone can be in a name and mean something else in a glob.
    rule = {"match": fqn.replace("[", "[[]"), "action": "skip"}
    return rule | ({"reason": reason} if reason else {})


def to_inline_toml(rule: Mapping[str, str | int]) -> str:
    """As an array of one inline table, on one line."""
    pairs = ", ".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in rule.items())
    return f"[{{ {pairs} }}]"


def to_toml(rule: Mapping[str, str | int], table: str = "rules") -> str:
    """As an entry of an array of tables."""
    # JSON's strings are TOML's, but for DEL, which no name has.
    return "\n".join([f"[[{table}]]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in rule.items())])
