"""blockfp8_titan.metrics through torchtitan's own train specs and metrics processor, without a trainer.

Whole runs, killed and resumed ones among them, are in test_training.py.
"""

import dataclasses
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import launch
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.components import metrics as titan
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec
from torchtitan.tools.utils import Color, NoColor

from blockfp8_titan import metrics
from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.journal import read

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Loud(titan.BaseLogger):
    """A stand-in for TensorBoard or wandb; fails at the steps it is told to."""

    def __init__(self, *fails_at: int) -> None:
        self.fails_at = fails_at
        self.logged: dict[int, dict[str, Any]] = {}
        self.closed = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step in self.fails_at:
            raise ConnectionError("no route to host")
        self.logged[step] = metrics

    def close(self) -> None:
        self.closed = True
        if self.fails_at:
            raise ConnectionError("no route to host")


@pytest.fixture(autouse=True)
def one_rank_and_a_gpu_of_64_gib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stats = titan.DeviceMemStats(40.0, 62.5, 48.0, 75.0, 0, 0)
    monitor = SimpleNamespace(device_name="NVIDIA H100", get_peak_stats=lambda: stats, reset_peak_stats=lambda: None)
    monkeypatch.setattr(titan, "build_device_memory_monitor", lambda: monitor)
    monkeypatch.setattr(titan.utils, "get_peak_flops", lambda name: 989e12)
    monkeypatch.setattr(metrics, "_records_every_job", False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    config = JobConfig()
    config.model.converters = ["blockwise_fp8"]
    config.job.dump_folder = str(tmp_path)
    config.metrics.log_freq = 1
    return config


def dims(world_size: int = 1, **degrees: int) -> ParallelDims:
    ones = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
    return ParallelDims(**(ones | degrees), world_size=world_size)


def build(job: JobConfig, parallel_dims: ParallelDims | None = None, family: str = "llama3") -> titan.MetricsProcessor:
    processor = train_spec.get_train_spec(family).build_metrics_processor_fn(job, parallel_dims or dims(), None)
    processor.num_flops_per_token = 10**9
    return processor


def step(processor: titan.MetricsProcessor, number: int, loss: float = 5.0, seconds: float = 2.0) -> None:
    """What the trainer does of it, in a step that took so long."""
    processor.ntokens_since_last_log += 1000
    processor.data_loading_times.append(seconds / 4)
    if processor.should_log(number):
        processor.time_last_log = titan.time.perf_counter() - seconds
        extra = {"n_tokens_seen": 1000.0 * number, "lr": 0.1}
        processor.log(number, loss, loss + 1, 0.5, extra_metrics=extra)


def test_a_step_is_recorded(job: JobConfig, tmp_path: Path) -> None:
    processor = build(job)
    step(processor, 1)
    (record,) = read(tmp_path / "metrics.jsonl")
    assert (record["step"], record["loss"], record["max_loss"], record["grad_norm"], record["lr"]) == (
        1,
        5,
        6,
        0.5,
        0.1,
    )
    assert record["tps"] == pytest.approx(500, rel=0.01) and record["step_seconds"] == pytest.approx(2, rel=0.01)
    assert record["data_loading_share"] == pytest.approx(0.25, rel=0.01) and record["tokens_seen"] == 1000
    assert (record["memory_gib"], record["active_gib"], record["memory_share"]) == (48, 40, 0.75)
    assert not any("mfu" in key for key in record)
    (start,) = read(tmp_path / "runs.jsonl")
    assert (start["run"], start["first_step"], start["world_size"]) == (record["run"], 1, 1)
    assert start["config"]["model"]["converters"] == ["blockwise_fp8"] and start["versions"]["torch"]


def test_a_diverged_step_is_recorded_as_json(job: JobConfig, tmp_path: Path) -> None:
    step(build(job), 1, loss=math.nan)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and json.loads(text)["loss"] is None


def test_step_times_are_those_of_the_steps_made(job: JobConfig, tmp_path: Path) -> None:
    job.metrics.log_freq = 5
    processor = build(job)
    for number in range(4, 9):
        step(processor, number, seconds=6)
    processor.time_last_log = titan.time.perf_counter() - 6
    processor.log_validation(4.0, 8)
    for number in range(9, 11):
        step(processor, number, seconds=6)
    records = read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [5, 10]
    # Two steps since the resume, two since the validation.
    assert [record["step_seconds"] for record in records] == pytest.approx([3, 3], rel=0.01)
    (validation,) = read(tmp_path / "validation.jsonl")
    assert (validation["step"], validation["loss"], validation["memory_gib"]) == (8, 4.0, 48)


def test_a_resumed_run_has_no_step_twice(job: JobConfig, tmp_path: Path) -> None:
    first = build(job)
    for number in range(1, 8):
        step(first, number)
    first.log_validation(4.0, 6)
    # From the checkpoint of step 4, and with another log_freq: 5 is not logged again and gone all the same.
    job.metrics.log_freq = 3
    second = build(job)
    for number in range(5, 10):
        step(second, number, loss=3.0)
    records = read(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 5), (2, 5), (3, 5), (4, 5), (6, 3), (9, 3)]
    assert [record["step"] for record in read(tmp_path / "metrics.superseded.jsonl")] == [5, 6, 7]
    assert read(tmp_path / "validation.jsonl") == []
    starts = read(tmp_path / "runs.jsonl")
    assert [start["first_step"] for start in starts] == [1, 5] and starts[0]["run"] != starts[1]["run"]
    assert records[-1]["run"] == starts[1]["run"]


def test_a_run_that_cannot_begin_tries_again_and_repeats_no_step(job: JobConfig, tmp_path: Path) -> None:
    first = build(job)
    for number in range(1, 6):
        step(first, number)
    in_the_way = tmp_path / "metrics.superseded.jsonl"
    in_the_way.mkdir()
    second = build(job)
    step(second, 4)
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    in_the_way.rmdir()
    step(second, 5, loss=3.0)
    records = read(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 5), (2, 5), (3, 5), (5, 3)]
    assert [start["first_step"] for start in read(tmp_path / "runs.jsonl")] == [1, 4]


@pytest.mark.parametrize(
    ("converters", "custom_import", "recorded"),
    [
        (["blockwise_fp8"], "", True),
        (["blockwise_fp8"], "my_trainer", True),
        ([], "blockfp8_titan.cpu", True),
        ([], "blockfp8_titan", True),
        ([], "", False),
        (["quantize.linear.float8"], "my_trainer", False),
        ([], "blockfp8_titan_of_mine", False),
    ],
)
def test_other_jobs_are_left_as_they_are(
    job: JobConfig, tmp_path: Path, converters: list[str], custom_import: str, recorded: bool
) -> None:
    job.model.converters, job.experimental.custom_import = converters, custom_import
    processor = build(job)
    step(processor, 1)
    assert (tmp_path / "metrics.jsonl").exists() == recorded
    if not recorded:
        assert type(processor.logger) is titan.BaseLogger and list(tmp_path.iterdir()) == []
    # No MFU is the fp8 job's alone; colours are off where nobody sees them.
    assert math.isnan(processor.gpu_peak_flops) == (converters == ["blockwise_fp8"])
    assert type(processor.color) is (NoColor if recorded else Color)


def test_scripts_record_every_job(job: JobConfig, tmp_path: Path) -> None:
    job.model.converters = []
    metrics.record_every_job()
    step(build(job), 1)
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_colours_stay_on_a_terminal(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert type(build(job).color) is Color
    job.metrics.disable_color_printing = True
    assert type(build(job).color) is NoColor


@dataclasses.dataclass
class OwnSpec(train_spec.TrainSpec):
    own: int = 0


class OwnProcessor(titan.MetricsProcessor):
    def should_log(self, step: int) -> bool:
        return step == 7


def test_families_registered_later_are_recorded_with_a_processor_of_their_own(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_spec, "_extra_train_specs", {})
    llama = train_spec.get_train_spec("llama3")
    fields = {field.name: getattr(llama, field.name) for field in dataclasses.fields(llama)}
    fields["build_metrics_processor_fn"] = lambda job, dims, model_args=None, tag=None: OwnProcessor(job, dims, tag)
    train_spec.register_train_spec("own", OwnSpec(**fields, own=3))
    assert train_spec.get_train_spec("own").own == 3
    processor = build(job, family="own")
    assert type(processor) is OwnProcessor
    for number in range(1, 9):
        step(processor, number)
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [7]


def test_a_second_import_wraps_nothing_twice() -> None:
    before = train_spec.get_train_spec
    metrics._record_all_families()
    assert train_spec.get_train_spec is before


def test_only_the_rank_that_logs_writes(job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of four ranks in two pipeline stages, rank 2 is the last stage's first.
    for rank in (0, 1, 3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        step(build(job, dims(4, pp=2, dp_shard=2)), 1)
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    step(build(job, dims(4, pp=2, dp_shard=2)), 1)
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def with_loggers(processor: titan.MetricsProcessor, *loggers: titan.BaseLogger) -> None:
    processor.logger.loggers = [metrics.Guarded(logger) for logger in loggers] + processor.logger.loggers


def test_other_loggers_get_everything_but_the_mfu(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    container, loud = titan.LoggerContainer(), Loud()
    container.add_logger(loud)
    monkeypatch.setattr(titan, "_build_metric_logger", lambda *args: container)
    step(build(job), 1)
    assert loud.logged[1]["loss_metrics/global_avg_loss"] == 5 and loud.logged[1]["lr"] == 0.1
    assert "mfu(%)" not in loud.logged[1] and "tflops" in loud.logged[1]
    job.model.converters, job.experimental.custom_import = [], "blockfp8_titan"
    step(build(job), 2)
    assert loud.logged[2]["mfu(%)"] > 0


def test_a_failing_logger_is_told_once_and_stops_nothing(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    container, failing, sound = titan.LoggerContainer(), Loud(2, 3), Loud()
    container.add_logger(failing)
    container.add_logger(sound)
    monkeypatch.setattr(titan, "_build_metric_logger", lambda *args: container)
    processor = build(job)
    for number in range(1, 5):
        step(processor, number)
    processor.close()
    assert list(sound.logged) == [1, 2, 3, 4] and list(failing.logged) == [1, 4]
    assert failing.closed and sound.closed
    assert len(read(tmp_path / "metrics.jsonl")) == 4
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "Loud failed at step 2 and training goes on" in warning.message and "no route to host" in warning.message


@pytest.mark.parametrize("fault", ["missing", "init"])
def test_wandb_that_cannot_start_stops_nothing(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("api.wandb.ai: no network")

    wandb = ModuleType("wandb")
    wandb.init = fail
    monkeypatch.setitem(sys.modules, "wandb", None if fault == "missing" else wandb)
    job.metrics.enable_wandb = True
    processor = build(job)
    step(processor, 1)
    step(processor, 2)
    processor.close()
    assert len(read(tmp_path / "metrics.jsonl")) == 2
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "WandB" in told[0]


def test_wandb_that_fails_later_stops_nothing(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("network is gone")

    wandb = ModuleType("wandb")
    wandb.init, wandb.log, wandb.finish, wandb.run = (lambda **kwargs: None), fail, fail, object()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    job.metrics.enable_wandb = True
    processor = build(job)
    step(processor, 1)
    step(processor, 2)
    processor.close()
    assert len(read(tmp_path / "metrics.jsonl")) == 2
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "WandBLogger failed at step 1" in told[0]


def test_a_dump_folder_that_cannot_be_written_stops_nothing(
    job: JobConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    job.job.dump_folder = str(tmp_path / "file" / "run")
    processor = build(job)
    step(processor, 1)
    step(processor, 2)
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "RunRecorder failed at the start" in told[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_console_lines_parse(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    processor = build(job)
    with caplog.at_level(logging.INFO):
        for number in range(9, 13):
            step(processor, number, loss=7.0 - number / 10, seconds=0.01)
    lines = [record.message for record in caplog.records if "tps:" in record.message]
    assert len(lines) == 4 and all(("\x1b" in line) == terminal for line in lines)
    assert all("mfu: nan%" in line for line in lines)
    # torchtitan's scripts/loss_compare.py strips colours and looks for a step and its loss.
    found = [re.search(r"step:\s*(\d+)\s*loss:\s*(\d+\.\d+)", ANSI.sub("", line)) for line in lines]
    assert [(int(match[1]), float(match[2])) for match in found] == [(9, 6.1), (10, 6.0), (11, 5.9), (12, 5.8)]
    # torchao's benchmarks/float8/training/parse_torchtitan_logs.py leaves colours in and wants a single blank after each name, which
    # torchtitan writes from step 10 and 10 GiB on.
    matches = re.findall(r"step: (\d+).*?memory: ([\d.]+)GiB.*?tps: ([\d,]+)", "\n".join(lines))
    assert [(number, memory) for number, memory, _ in matches] == [("10", "48.00"), ("11", "48.00"), ("12", "48.00")]
    assert all(50_000 < float(tps.replace(",", "")) < 100_500 for *_, tps in matches)
    # The project's own.
    assert [launch.parse_step(f"[rank0]:{ANSI.sub('', line)}").step for line in lines] == [9, 10, 11, 12]


def test_a_section_without_the_converter_is_warned_of(job: JobConfig, caplog: pytest.LogCaptureFixture) -> None:
    job.blockwise_fp8 = BlockwiseFP8(wgrad="bf16")
    with caplog.at_level(logging.WARNING):
        build(job)
        assert not caplog.messages
        job.model.converters = []
        build(job)
        (warning,) = caplog.messages
        assert "[blockwise_fp8] is set and model.converters = [] has no 'blockwise_fp8'" in warning
        caplog.clear()
        job.blockwise_fp8 = BlockwiseFP8()
        build(job)
    assert not caplog.messages
