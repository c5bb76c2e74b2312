"""What a run reports: to torchtitan's console, TensorBoard and wandb as always, and to JSON Lines in the dump folder.

Importing this module lets every model family's train spec, registered before or after, build a metrics processor that also writes

- metrics.jsonl: one object for each logged step, see `step_record`;
- validation.jsonl: one for each validation;
- health.jsonl: one for each step whose fp8 health was observed, see `health_log`;
- runs.jsonl: one for each start: run id, first step, versions, hardware, configuration.

A run that goes on from a checkpoint first moves what an earlier one logged beyond it to metrics.superseded.jsonl, so that every step is
there once. Jobs are recorded that convert to blockwise fp8, and those whose `experimental.custom_import` names this package, which are
their bf16 twins; in all others nothing changes. Under fp8 there is no MFU: its peak is that of bf16, and the console says "nan".
"""

import dataclasses
import functools
import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    _get_metrics_rank,
    build_metrics_processor,
)
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import NoColor

from .converter import NAME, section_of, unused_section
from .environment import hardware, versions
from .health_log import watch_health
from .journal import Journal

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
HEALTH_FILE = "health.jsonl"
RUNS_FILE = "runs.jsonl"

MFU = "mfu(%)"
STEP_SECONDS = "time_metrics/end_to_end(s)"
VALIDATION = "validation_metrics/"
# torchtitan's names: ours, and the factor to ours. Those that are not here keep their name.
FIELDS = {
    "loss_metrics/global_avg_loss": ("loss", 1),
    "loss_metrics/global_max_loss": ("max_loss", 1),
    "throughput(tps)": ("tps", 1),
    STEP_SECONDS: ("step_seconds", 1),
    "time_metrics/data_loading(s)": ("data_loading_seconds", 1),
    "time_metrics/data_loading(%)": ("data_loading_share", 0.01),
    "memory/max_active(GiB)": ("active_gib", 1),
    "memory/max_active(%)": ("active_share", 0.01),
    "memory/max_reserved(GiB)": ("memory_gib", 1),
    "memory/max_reserved(%)": ("memory_share", 0.01),
    "memory/num_alloc_retries": ("alloc_retries", 1),
    "memory/num_ooms": ("ooms", 1),
    "n_tokens_seen": ("tokens_seen", 1),
}

_records_every_job = False


def record_every_job() -> None:
    """Record all of this process's jobs, for scripts that compare converters."""
    global _records_every_job
    _records_every_job = True


def is_recorded(job_config: JobConfig) -> bool:
    package = __name__.partition(".")[0]
    named = (job_config.experimental.custom_import or "").partition(".")[0] == package
    return _records_every_job or named or NAME in job_config.model.converters


def step_record(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """torchtitan's metrics under short names.

    loss is the mean over all tokens, max_loss the largest of a rank, tps tokens per second and GPU since the line before (compilation
    included in a run's first), step_seconds a step's share of that time and data_loading_share the share of it spent waiting for data;
    memory_gib is the peak that the process reserved and active_gib that of its tensors; lr is as torchtitan gives it.
    """
    record = {}
    for key, value in metrics.items():
        name, factor = FIELDS.get(key.removeprefix(VALIDATION), (key.removeprefix(VALIDATION), 1))
        if key != MFU:
            record[name] = value * factor if factor != 1 else value
    return record


class Guarded(BaseLogger):
    """Another logger, whose failures are told once and never reach the trainer."""

    def __init__(self, behind: BaseLogger) -> None:
        self.behind = behind
        self.has_failed = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.attempt(f"at step {step}", self.behind.log, metrics, step)

    def close(self) -> None:
        self.attempt("at the end", self.behind.close)

    def attempt(self, when: str, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:
            if not self.has_failed:
                name = type(self.behind).__name__
                logger.warning(
                    f"{name} failed {when} and training goes on; further failures of it are not reported: "
                    f"{type(error).__name__}: {error}"
                )
            self.has_failed = True


class RunRecorder(BaseLogger):
    """Writes the JSON Lines files of one run.

    Args:
        folder: receives them.
        about: what runs.jsonl says beside run id, time and first step.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        now = datetime.now(timezone.utc)
        self.run = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        self.steps = Journal(folder / METRICS_FILE)
        self.validations = Journal(folder / VALIDATION_FILE)
        self.health = Journal(folder / HEALTH_FILE)
        self.runs = Journal(folder / RUNS_FILE)
        self.about = about
        self.first_step: int | None = None
        self.has_begun = False

    def begin(self, first_step: int) -> None:
        """Call before the first record: what earlier runs logged from this step on is superseded."""
        self.first_step = first_step
        self._begin()

    def _begin(self) -> None:
        """Again before each record until it succeeds: without it, steps would be there twice."""
        if self.has_begun:
            return
        assert self.first_step is not None
        for journal in (self.steps, self.validations, self.health):
            journal.supersede_from(self.first_step)
        self.runs.append({"run": self.run, "time": _now(), "first_step": self.first_step, **self.about})
        self.has_begun = True

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._begin()
        is_validation = any(key.startswith(VALIDATION) for key in metrics)
        record = {"step": step, **step_record(metrics), "time": _now(), "run": self.run}
        (self.validations if is_validation else self.steps).append(record)

    def log_health(self, layers: Mapping[str, Any], step: int) -> None:
        self._begin()
        self.health.append({"step": step, "layers": layers, "time": _now(), "run": self.run})


class RunLog(BaseLogger):
    """Stands for a metrics processor's own logger, on every rank; whatever is added to a step's metrics here reaches all loggers.

    Args:
        loggers: torchtitan's.
        recorder: of the rank that logs, else None.
        log_freq: of the job.
        reports_mfu: whether loggers get the MFU.
    """

    def __init__(
        self, loggers: Sequence[BaseLogger], recorder: RunRecorder | None, log_freq: int, reports_mfu: bool
    ) -> None:
        self.loggers = [Guarded(behind) for behind in loggers]
        self.begin: Callable[[int], None] | None = None
        if recorder is not None:
            guarded = Guarded(recorder)
            self.loggers.append(guarded)
            self.begin = functools.partial(guarded.attempt, "at the start", recorder.begin)
        self.log_freq = log_freq
        self.reports_mfu = reports_mfu
        self.time_counts_from: int | None = None

    def note_step(self, step: int) -> None:
        """Call at each step of training, logged or not, before it is."""
        if self.time_counts_from is None:
            self.time_counts_from = step - 1
            if self.begin is not None:
                self.begin(step)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        metrics = dict(metrics)
        if not self.reports_mfu:
            metrics.pop(MFU, None)
        if STEP_SECONDS in metrics and self.time_counts_from is not None and step > self.time_counts_from:
            # torchtitan divides by log_freq, also where fewer steps were made: the first, after a resume or a validation.
            metrics[STEP_SECONDS] *= self.log_freq / (step - self.time_counts_from)
        self.time_counts_from = step
        for member in self.loggers:
            member.log(metrics, step)

    def log_health(self, layers: Mapping[str, Any], curves: Mapping[str, float], step: int) -> None:
        """All of it to the recorder, the curves to torchtitan's loggers; also at steps that are not logged."""
        for member in self.loggers:
            if isinstance(member.behind, RunRecorder):
                member.attempt(f"at step {step}", member.behind.log_health, layers, step)
            else:
                member.log(dict(curves), step)

    def close(self) -> None:
        for member in self.loggers:
            member.close()


def attach(processor: MetricsProcessor, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Let a metrics processor, of whatever class, record its run."""
    is_fp8 = NAME in job_config.model.converters
    behind = processor.logger
    loggers = behind._loggers if isinstance(behind, LoggerContainer) else [behind]
    recorder = None
    if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
        recorder = RunRecorder(_folder(job_config), _about(job_config))
    run_log = RunLog(loggers, recorder, job_config.metrics.log_freq, reports_mfu=not is_fp8)
    should_log = processor.should_log

    @functools.wraps(should_log)
    def note_and_ask(step: int) -> bool:
        run_log.note_step(step)
        return should_log(step)

    processor.logger = run_log
    processor.should_log = note_and_ask
    if is_fp8 and (freq := section_of(job_config).health_freq):
        publish = run_log.log_health if recorder is not None else None
        watch_health(processor, freq, publish)
    if is_fp8:
        processor.gpu_peak_flops = math.nan
    if not sys.stdout.isatty():
        processor.color = NoColor()


def recording(build: Callable[..., MetricsProcessor] | None) -> Callable[..., MetricsProcessor]:
    """Wrap a train spec's builder of metrics processors; None stands for torchtitan's."""
    build = build or build_metrics_processor

    @functools.wraps(build)
    def build_and_attach(job_config: JobConfig, parallel_dims: ParallelDims, *args: Any, **kwargs: Any):
        # Here because it is called for every job, one without the converter too.
        if (warning := unused_section(job_config)) and torch.distributed.get_rank() == 0:
            logger.warning(warning)
        processor = build(job_config, parallel_dims, *args, **kwargs)
        if is_recorded(job_config):
            attach(processor, job_config, parallel_dims)
        return processor

    return build_and_attach


def _folder(job_config: JobConfig) -> Path:
    folder = Path(job_config.job.dump_folder)
    if job_config.fault_tolerance.enable:  # each replica group is a world of its own
        folder /= f"replica_{job_config.fault_tolerance.replica_id}"
    return folder


def _about(job_config: JobConfig) -> dict[str, Any]:
    return {
        "world_size": torch.distributed.get_world_size(),
        "versions": versions(),
        "hardware": hardware(),
        "config": job_config.to_dict(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _record_all_families() -> None:
    """Registering specs of our own would take importing every family, and miss those that a user registers later."""
    get_train_spec = train_spec.get_train_spec
    if hasattr(get_train_spec, "records_runs"):  # this module was imported before, under another name or reloaded
        return

    @functools.wraps(get_train_spec)
    def get_recording_train_spec(name: str) -> train_spec.TrainSpec:
        spec = get_train_spec(name)
        return dataclasses.replace(spec, build_metrics_processor_fn=recording(spec.build_metrics_processor_fn))

    get_recording_train_spec.records_runs = True
    train_spec.get_train_spec = get_recording_train_spec


_record_all_families()
