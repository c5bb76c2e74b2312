"""What a run tells about fp8 health: which steps are observed, and what then goes to console, TensorBoard, wandb and health.jsonl."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch.nn as nn
from torch.distributed.pipelining import PipelineStage
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from .health import Health, Observation, ObservationFailed, rehearsal
from .health_limits import Crossing, Limits, skip_rule, to_inline_toml
from .quantization_error import TensorHealth

CURVES = "fp8_health"
_WORST = 3
_WARNINGS = 8
"""How many layers a step warns about one by one."""

Publish = Callable[[Mapping[str, Any], Mapping[str, float], int], None]
"""Takes the layers' health as health.jsonl has it, the curves for TensorBoard and wandb, and the step."""


class HealthLog:
    """Observes steps; all ranks do, with the same `freq`.

    Args:
        freq: multiples of this are observed; not the first step of a start, which has no number when it begins.
        model_parts: see `Observation`.
        publish: of the rank that logs, else None.
    """

    def __init__(self, freq: int, model_parts: Callable[[], list[nn.Module]], publish: Publish | None) -> None:
        self.freq = freq
        self.model_parts = model_parts
        self.publish = publish
        self.limits = Limits()
        self._warned: set[tuple[str, ...]] = set()
        self._failures: set[str] = set()
        self._untold: Health = {}
        self._observation: Observation | None = None

    def end_step(self, step: int) -> None:
        """Call after each step of training, on every rank: collects what was observed, and begins where the next step is due."""
        if self._observation is not None:
            self._observation.stop()
            self._finish(step, self._observation)
            self._observation = None
        if (step + 1) % self.freq == 0:
            self._observation = Observation(self.model_parts)
            self._observation.start()

    def tell(self, step: int, color: Any) -> None:
        """Write to the console what there is to say, once."""
        health, self._untold = self._untold, {}
        if health:
            logger.info(console_line(health, step, color))
            self._warn(health, step)

    def _finish(self, step: int, observation: Observation) -> None:
        try:
            health = observation.collect()
        except ObservationFailed as error:
            if self.publish is not None and str(error) not in self._failures:
                self._failures.add(str(error))
                logger.warning(
                    f"fp8 health of step {step}: {error}; [blockwise_fp8] health_freq = 0 turns it off. The same at later steps is not told"
                )
            return
        if self.publish is not None and health:
            self.publish(to_record(health), curves(health), step)
            self._untold = health

    def _warn(self, health: Health, step: int) -> None:
        by_layer: dict[str, list[Crossing]] = {}
        if diverged := _where_nonfinite_in_most(health):
            if ("diverged",) not in self._warned:
                self._warned.add(("diverged",))
                logger.warning(
                    f"fp8 health at step {step}: {len(diverged)} of {len(health)} layers have NaN or Inf, {diverged[0]} among them: "
                    "the run has diverged, which no rule mends; go back to a checkpoint from before"
                )
            return
        for crossing in self.limits.crossings(health):
            key = (crossing.fqn, crossing.role, crossing.what)
            if key not in self._warned:
                self._warned.add(key)
                by_layer.setdefault(crossing.fqn, []).append(crossing)
        for fqn, crossings in list(by_layer.items())[:_WARNINGS]:
            reasons = "; ".join(crossing.text for crossing in crossings)
            rule = to_inline_toml(skip_rule(fqn))
            logger.warning(
                f"fp8 health at step {step}: {fqn}: {reasons}. To take it out of fp8, under [blockwise_fp8]: rules = {rule}"
            )
        if more := list(by_layer)[_WARNINGS:]:
            logger.warning(
                f"fp8 health at step {step}: {len(more)} more layers are beyond a limit: {', '.join(more)}; "
                "python -m blockfp8_titan.suggest_rules writes rules"
            )


def _where_nonfinite_in_most(health: Health) -> list[str]:
    """The layers with NaN or Inf where they are more than half of at least four; else none."""
    found = [fqn for fqn, tensors in health.items() if any(tensor.nonfinite for tensor in tensors.values())]
    return found if len(health) >= 4 and len(found) > len(health) / 2 else []


def tensors_of(health: Health) -> Iterator[tuple[str, str, TensorHealth]]:
    """FQN, "x", "w" or "dy", and the health of each tensor."""
    return ((fqn, role, tensor) for fqn, tensors in health.items() for role, tensor in tensors.items())


def ranking(tensor: TensorHealth) -> tuple[int, float]:
    """Sorts tensors, the worst first: NaN and Inf, then low SQNR."""
    return -tensor.nonfinite, math.inf if math.isnan(tensor.sqnr_db) else tensor.sqnr_db


def console_line(health: Health, step: int, color: Any) -> str:
    """The worst layers by the SQNR of their worst tensors, NaN and Inf first, in the style of torchtitan's own line."""
    worst: dict[str, tuple[str, TensorHealth]] = {}
    for fqn, role, tensor in sorted(tensors_of(health), key=lambda found: ranking(found[2])):
        worst.setdefault(fqn, (role, tensor))
    parts = [
        f"{fqn} {role} {tensor.sqnr_db:.1f} dB" + (f", {tensor.nonfinite:,} NaN or Inf" if tensor.nonfinite else "")
        for fqn, (role, tensor) in list(worst.items())[:_WORST]
    ]
    flushed = max(tensor.flushed for *_, tensor in tensors_of(health))
    return (
        f"{color.red}step: {step:2}  {color.green}fp8 health, worst SQNR: {';  '.join(parts)}  "
        f"{color.orange}most flushed to zero: {flushed:.2%}{color.reset}"
    )


def curves(health: Health) -> dict[str, float]:
    """For TensorBoard and wandb: three numbers of each tensor, and the worst of all layers. What is not finite has no point."""
    points: dict[str, float] = {}
    worst: dict[str, float] = {}
    for fqn, role, tensor in tensors_of(health):
        for name, worse in (("sqnr_db", min), ("flushed", max), ("clamped", max), ("nonfinite", max)):
            value = getattr(tensor, name)
            if math.isfinite(value):
                if name != "nonfinite":
                    points[f"{CURVES}/{fqn}/{role}/{name}"] = value
                key = f"{CURVES}/worst/{role}/{name}"
                worst[key] = worse(worst.get(key, value), value)
    return points | worst


def to_record(health: Health) -> dict[str, Any]:
    """As health.jsonl has it: FQN -> tensor -> the fields of `TensorHealth`, to six digits."""
    record: dict[str, Any] = {}
    for fqn, role, tensor in tensors_of(health):
        numbers = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(tensor).items()}
        record.setdefault(fqn, {})[role] = numbers
    return record


def from_record(record: Mapping[str, Any]) -> Health:
    """What `to_record` was of. JSON's null, which stands for infinity too, becomes NaN: no limit is crossed by either."""
    health: Health = {}
    for fqn, tensors in record.items():
        for role, numbers in tensors.items():
            known = {field.name: numbers[field.name] for field in fields(TensorHealth)}
            values = {name: math.nan if value is None else value for name, value in known.items()}
            health.setdefault(fqn, {})[role] = TensorHealth(**values)
    return health


@functools.cache
def rehearse_stages() -> None:
    """Leave out of observations what pipeline stages run on uninitialised memory, forward and backward, to learn what they return: in
    the first step, and after each change between training and validation."""

    def in_rehearsal(prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def run(*args: Any, **kwargs: Any) -> Any:
            with rehearsal():
                return prepare(*args, **kwargs)

        return run

    for name in ("_prepare_forward_infra", "_prepare_backward_infra"):
        if hasattr(PipelineStage, name):  # in torch 2.11 to 2.13
            setattr(PipelineStage, name, in_rehearsal(getattr(PipelineStage, name)))


def watch_health(processor: MetricsProcessor, freq: int, publish: Publish | None) -> None:
    """Let a metrics processor, of whatever class, observe fp8 health at the end of each step."""
    rehearse_stages()
    log = HealthLog(freq, lambda: getattr(processor, "model_parts", None) or [], publish)
    should_log, log_step = processor.should_log, processor.log

    @functools.wraps(should_log)
    def observe_and_ask(step: int) -> bool:
        is_logged = should_log(step)
        log.end_step(step)
        if not is_logged:
            log.tell(step, processor.color)
        return is_logged

    @functools.wraps(log_step)
    def log_and_tell(step: int, *args: Any, **kwargs: Any) -> None:
        log_step(step, *args, **kwargs)
        log.tell(step, processor.color)

    processor.should_log, processor.log = observe_and_ask, log_and_tell
