"""How far the losses of a run are from those of another, bf16's, on the same data. What comparisons and reports share."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Curve = Mapping[int, float]
"""Step -> value, in the order of steps."""

THRESHOLD = 0.0025
"""The largest gap to bf16 that is right: DeepSeek-V3's claim for this scheme, of the loss averaged over many steps."""


def last_tenth(values: Sequence[T]) -> Sequence[T]:
    """The last tenth, one at least; none of none."""
    return values[-max(1, len(values) // 10) :]


def gaps(losses: Curve, base: Curve) -> dict[int, float]:
    """Relative distance from the base at each step that both have; NaN where a loss is, or the base is 0."""
    return {step: _gap(losses[step], base[step]) for step in losses if step in base}


def _gap(loss: float, base: float) -> float:
    return loss / base - 1 if base else math.nan


def mean_gap(losses: Curve, base: Curve) -> float | None:
    """Relative distance of the means over the last tenth of the steps that both have; None where there are none."""
    common = last_tenth([step for step in losses if step in base])
    if not common:
        return None
    return _gap(*(statistics.fmean(curve[step] for step in common) for curve in (losses, base)))


def smoothed(values: Sequence[float], window: int = 10) -> list[float]:
    """The mean of each value and those before it, `window` at most."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def is_close(gap: float | None, threshold: float = THRESHOLD) -> bool:
    """The verdict; a loss that is NaN is not close."""
    return gap is not None and abs(gap) <= threshold
