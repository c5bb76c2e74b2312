"""The comparisons of whole runs: command lines, summaries, resuming; the trainer itself is replaced."""

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import compare_loss
import compare_throughput as compare
import launch
import profile_step
import pytest
import runs
import subjects
import throughput
import torch
import torchtitan.models.llama3.infra.parallelize as parallelize
import torchtitan.models.llama3.model.model as llama3
from launch import Step, TrainingFailed
from runs import Arm
from throughput import Run, Speed
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama3.model.model import apply_rotary_emb
from torchtitan.protocols.model_converter import _registry_model_converter_cls

from blockfp8_titan import metrics

LOG = """[rank0]:[titan] 2026-01-01 00:00:10,000 - root - INFO - Training starts at step 1
[rank1]:[titan] 2026-01-01 00:00:11,000 - root - INFO - step:  1  loss:  8.00000  grad_norm:  1.0000  memory:  1.00GiB(1%)  tps: 10
[rank0]:[titan] 2026-01-01 00:00:12,500 - root - INFO - step:  1  loss:  8.00000  grad_norm:  1.0000  memory:  1.00GiB(1%)  tps: 10
[rank0]:[titan] 2026-01-01 00:00:13,000 - root - INFO - step:  2  loss:  7.00000  grad_norm:  1.0000  memory:  1.00GiB(1%)  tps: 90
"""


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a corpus, for all that the trainer's stand-ins need."""
    for script in (compare, compare_loss, profile_step):
        monkeypatch.setattr(script, "check_data", lambda data: None)


def steps(tps: list[float], loss: float = 5.0, memory: float = 10.0, every: int = 1) -> list[Step]:
    """Step 1, then each `every`-th."""
    numbers = [1, *range(every, every * len(tps), every)] if every > 1 else range(1, len(tps) + 1)
    return [Step(n, loss + 1 / n, 1.0, memory, speed) for n, speed in zip(numbers, tps, strict=True)]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    runs.add_arguments(parser, steps=20, data=Path("data"))
    return parser.parse_args(arguments)


# Command lines


def test_an_arm_is_a_converter_and_settings() -> None:
    assert runs.parse_arm("bf16") == ("bf16", ())
    assert runs.parse_arm("blockwise_fp8,blockwise_fp8.wgrad=fp8_block,training.seq_len=64") == (
        "blockwise_fp8",
        ("blockwise_fp8.wgrad=fp8_block", "training.seq_len=64"),
    )
    # A comma within a value is the value's.
    assert runs.parse_arm("bf16,compile.components=model,loss")[1] == ("compile.components=model,loss",)
    with pytest.raises(argparse.ArgumentTypeError, match="'fp4,a=b': must begin with one of bf16"):
        runs.parse_arm("fp4,a=b")


def test_every_converter_has_a_colour() -> None:
    assert set(runs.COLORS) == set(runs.CONVERTERS)


def test_settings_of_ours_reach_ours_alone() -> None:
    args = parse("--set", "training.seq_len=64", "blockwise_fp8.gemm_backend=cublas", "--no-compile")
    plain = runs.overrides_of(Arm("debug", "bf16", checkpointing="full"), args, Path("run"))
    ours = runs.overrides_of(Arm("debug", "blockwise_fp8", ("training.seq_len=32",)), args, Path("run"))
    assert "--blockwise_fp8.gemm_backend=cublas" in ours and "--blockwise_fp8.gemm_backend=cublas" not in plain
    assert "--activation_checkpoint.mode=full" in plain and not any("activation" in word for word in ours)
    assert "--compile.no-enable" in plain
    # An arm's own settings come last and win.
    assert ours.index("--training.seq_len=32") > ours.index("--training.seq_len=64")
    assert not any(
        word.startswith("--compile.") for word in runs.overrides_of(Arm("debug", "bf16"), parse(), Path("run"))
    )


@pytest.mark.parametrize("converter", runs.CONVERTERS)
def test_torchtitan_reads_every_converters_command_line(converter: str) -> None:
    words = runs.overrides_of(Arm("debug", converter, checkpointing="2"), parse("--compile"), Path("run"))
    config = ConfigManager().parse_args([f"--job.config_file={runs.config_path('debug')}", *words])
    name, _, added = converter.partition("+")
    assert len(config.model.converters) == (name != "bf16") + bool(added)
    assert config.compile.enable and config.activation_checkpoint.selective_ac_option == "2"
    assert config.quantize.linear.float8.enable_fsdp_float8_all_gather == (name == "float8_tensorwise")


def test_variants_register_peers_and_cut_models(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing of it stays for the tests after this one, the CPU's stand-ins least of all.
    monkeypatch.setitem(sys.modules, "blockfp8_titan.cpu", ModuleType("cpu"))
    with (
        patch.dict(sys.modules),
        patch.dict(llama3_args),
        patch.dict(_registry_model_converter_cls),
        patch.object(parallelize, "_op_sac_save_list", set()) as saved,
        patch.object(llama3, "apply_rotary_emb", apply_rotary_emb),
    ):
        variants = importlib.import_module("variants")
        assert (llama3_args["8B-3L"].n_layers, llama3_args["8B-3L"].dim) == (3, 4096)
        assert llama3_args["debugmodel-5L"].n_layers == 5 and "debugmodel-6L" not in llama3_args
        assert "torchao_blockwise" in _registry_model_converter_cls
        config = SimpleNamespace(model=SimpleNamespace(name="llama3"))
        variants.SaveScaledMM(config, None).convert(torch.nn.Linear(1, 1))
        compiled = JobConfig()
        with pytest.raises(ValueError, match="real_rope: blocks must be compiled by inductor"):
            variants.RealRoPE(compiled, None)
        compiled.compile.enable = True
        with torch.device("meta"):
            variants.RealRoPE(compiled, None).convert(llama3.Transformer(llama3_args["debugmodel"]))
        assert llama3.apply_rotary_emb is not apply_rotary_emb
        with pytest.raises(ValueError, match="real_rope: the model computes no RoPE in complex numbers"):
            variants.RealRoPE(compiled, None).convert(torch.nn.Linear(1, 1))
    assert saved == {torch.ops.aten._scaled_mm.default}


def test_unrecorded_jobs_have_nothing_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "variants", ModuleType("variants"))
    monkeypatch.setattr(metrics, "is_recorded", metrics.is_recorded)
    monkeypatch.delitem(sys.modules, "unrecorded", raising=False)
    processor = object()
    build = metrics.recording(lambda job_config, parallel_dims: processor)
    importlib.import_module("unrecorded")
    sys.modules.pop("unrecorded")
    job = SimpleNamespace(model=SimpleNamespace(converters=["blockwise_fp8"]))
    assert build(job, None) is processor


def test_command_lines_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    inside = parse("--data", str(launch.ROOT / "outputs" / "demo"))
    words = runs.overrides_of(Arm("debug", "bf16"), inside, Path("run"))
    assert "--training.dataset_path=outputs/demo/corpus" in words and not any(
        str(launch.ROOT) in word for word in words
    )
    words = runs.overrides_of(Arm("debug", "bf16"), parse("--data", str(tmp_path)), Path("run"))
    assert f"--model.hf_assets_path={tmp_path / 'tokenizer'}" in words


TP = "parallelism.tensor_parallel_degree=2"
SHARDS = "parallelism.data_parallel_shard_degree=2"
REPLICAS = "parallelism.data_parallel_replicate_degree=2"


@pytest.mark.parametrize(
    "nproc, settings, refused",
    [
        (1, [], ""),
        (4, [TP], ""),
        (4, [SHARDS, REPLICAS], ""),
        (4, [TP, "parallelism.context_parallel_degree=2"], ""),
        (2, [TP, "training.dtype=bfloat16"], ""),
        (1, [TP], "on 1 processes: its degrees of parallelism multiply to 2; change one of them, or give"),
        (3, [TP], "on 3 processes: its degrees of parallelism multiply to 2"),
        (2, [SHARDS, REPLICAS], "on 2 processes: its degrees of parallelism multiply to 4"),
        (2, [TP], "on 2 processes: .* none are left to FSDP, .* computes in float32 there, bf16's runs too"),
        (2, ["parallelism.pipeline_parallel_degree=2"], "on 2 processes: .* torchtitan computes in float32"),
    ],
)
def test_parallelism_must_fit_the_processes_and_leave_some_to_fsdp(
    nproc: int, settings: list[str], refused: str
) -> None:
    arm = Arm("debug", "blockwise_fp8", variant=tuple(settings), nproc=nproc)
    if not refused:
        runs.overrides_of(arm, parse(), Path("run"))
        return
    with pytest.raises(ValueError, match=f"^{', '.join(['debug', *settings])} {refused}"):
        runs.overrides_of(arm, parse(), Path("run"))


def test_processes_are_counted_and_degrees_are_numbers() -> None:
    assert runs.overrides_of(Arm("debug", "bf16", (TP,)), parse("--nproc", "4"), Path("run"))
    with pytest.raises(ValueError, match="^debug on 3 processes: its degrees of parallelism multiply to 2"):
        runs.overrides_of(Arm("debug", "bf16", (TP,)), parse("--nproc", "3"), Path("run"))
    with pytest.raises(ValueError, match="^llama3_70b on 2 processes: its degrees of parallelism multiply to 8"):
        runs.overrides_of(Arm("llama3_70b", "bf16"), parse("--nproc", "2"), Path("run"))
    for value, message in (
        ("0", "0: must be 1 or more"),
        ("-1", "-1: must be 1 or more"),
        ("two", "'two': must be a number"),
    ):
        with pytest.raises(ValueError, match=f"^parallelism.tensor_parallel_degree = {message}"):
            runs.overrides_of(Arm("debug", "bf16", (f"{TP[:-1]}{value}",)), parse(), Path("run"))
    with pytest.raises(ValueError, match="^parallelism.data_parallel_shard_degree = -2: must be 1 or more"):
        runs.overrides_of(Arm("debug", "bf16", (f"{SHARDS[:-1]}-2",)), parse(), Path("run"))


def test_models_are_cut_by_flavor(tmp_path: Path) -> None:
    assert "--model.flavor=8B-8L" in runs.overrides_of(Arm("llama3_8b", "bf16"), parse("--layers", "8"), Path("run"))
    assert runs.cut_flavor("llama3_70b", 4) == "70B-4L"
    with pytest.raises(ValueError, match=r"--layers 32: must be 1 to 31 for llama3_8b"):
        runs.cut_flavor("llama3_8b", 32)
    other = tmp_path / "other.toml"
    other.write_text('[model]\nname = "qwen3"\nflavor = "none"\n')
    with pytest.raises(ValueError, match="'none'"):
        runs.cut_flavor(str(other), 2)


def test_an_unknown_config_is_named_with_the_known(capsys: pytest.CaptureFixture) -> None:
    for main in (compare.main, compare_loss.main, profile_step.main):
        arguments = ["llama4"] if main is not compare.main else ["llama4", "--converters", "bf16"]
        with pytest.raises(SystemExit):
            main(arguments)
        error = capsys.readouterr().err
        assert "'llama4'" in error and "debug, llama3_70b, llama3_8b" in error


def test_groups_and_names_tell_arms_apart() -> None:
    ours = Arm("llama3_8b", "blockwise_fp8", ("blockwise_fp8.wgrad=bf16",), "op")
    assert (ours.group, ours.name) == ("llama3_8b, activation checkpointing op", "blockwise_fp8 wgrad=bf16")
    assert ours.folder == "llama3_8b_activation_checkpointing_op_blockwise_fp8_wgrad=bf16"
    wide = Arm("debug", "bf16", variant=("parallelism.tensor_parallel_degree=2",), nproc=4)
    assert (wide.group, wide.name, wide.is_base) == (
        "debug, parallelism.tensor_parallel_degree=2, 4 processes",
        "bf16",
        True,
    )
    assert Arm("x.toml", "bf16").is_base and not Arm("x", "bf16", ("a=b",)).is_base and not ours.is_base


def test_times_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(LOG)
    assert launch.step_times(log) == {0: 0.0, 1: 2.5, 2: 3.0}
    log.write_text(LOG.partition("\n")[2])
    assert launch.step_times(log) == {}


# Speeds and their ratios


def test_first_steps_are_left_out_with_the_interval_they_are_in() -> None:
    assert [step.step for step in throughput.measured(steps([1.0] * 6), 3)] == [4, 5, 6]
    # Lines at 1, 5, 10, 15: the one of step 5 holds steps 2 to 5, that of step 10 is the first without them.
    sparse = steps([1.0, 2.0, 3.0, 4.0], every=5)
    assert [step.step for step in throughput.measured(sparse, 5)] == [10, 15]
    assert [step.step for step in throughput.measured(sparse, 4)] == [10, 15]
    assert throughput.measured(sparse[:1], 0) == []


def test_the_speed_of_a_run() -> None:
    speed = throughput.speed_of(steps([1.0, 50.0, 90.0, 100.0, 110.0]), 2, 7.5, 9.0)
    assert speed.tps == 100 and speed.tps_spread == pytest.approx(16 / 100)
    assert speed.steps == [(1, 1.0), (2, 50.0), (3, 90.0), (4, 100.0), (5, 110.0)]
    assert speed.loss == pytest.approx(5.2) and (speed.memory, speed.first_step, speed.startup) == (10, 7.5, 9)
    assert throughput.speed_of(steps([1.0, 50.0]), 1, None, 9.0).tps_spread == 0


def test_the_memory_of_tensors_is_what_the_run_recorded(tmp_path: Path) -> None:
    assert throughput.peak_of_tensors(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "active_gib": 3.5}\n{"step": 2, "active_gib": 4.5}\n{"step": 3}\n'
    )
    assert throughput.peak_of_tensors(tmp_path) == 4.5


def done(
    arm: str, number: int, tps: float, *, key: str = "", machine: str = "here", memory: float = 10.0, **more: Any
) -> Run:
    speed = Speed(tps, 0.01, memory, 5.0, more.get("first_step", 30.0), 60.0, more.get("active"))
    return Run(arm, "debug", key or arm, number, machine, 60.0, speed)


ARMS = [Arm("debug", "bf16"), Arm("debug", "blockwise_fp8")]


def test_ratios_are_those_of_rounds() -> None:
    # The machine slows to a half in the second round.
    found = [
        done("bf16", 1, 100, active=8.0),
        done("blockwise_fp8", 1, 130, active=6.0),
        done("bf16", 2, 50),
        done("blockwise_fp8", 2, 70, memory=9),
    ]
    base, ours = throughput.summarise(found, ARMS, 2)
    assert base["tps_ratio"] == 1 and ours["tps_ratio"] == pytest.approx(1.35) and ours["tps"] == 100
    assert ours["tps_ratios"] == pytest.approx([1.3, 1.4])
    assert ours["memory_ratio"] == pytest.approx(0.95) and ours["rounds"] == 2
    assert (ours["active"], ours["active_ratio"]) == (6, 0.75)
    assert "| blockwise_fp8 | 2 | 100 | 1.0% | 1.350 (1.300–1.400) |" in throughput.overview([base, ours])


def test_a_round_without_its_base_gives_no_ratio() -> None:
    found = [done("blockwise_fp8", 1, 130), done("bf16", 2, 100), done("blockwise_fp8", 2, 110, first_step=None)]
    _, ours = throughput.summarise(found, ARMS, 2)
    assert ours["tps_ratios"] == pytest.approx([1.1, 1.1]) and ours["rounds"] == 2
    assert "first_step_ratio" not in ours and ours["first_step"] == 30


def test_scaling_compares_with_the_least_number_of_processes() -> None:
    arms = [Arm("debug", name, nproc=n) for n in (4, 2, 8) for name in ("bf16", "blockwise_fp8")]
    runs = [
        dataclasses.replace(done(name, number, tps), group=f"debug, {n} processes")
        for name, number, n, tps in (
            *(("bf16", 1, 2, 100), ("bf16", 1, 4, 90), ("bf16", 2, 2, 50), ("bf16", 2, 4, 40)),
            *(("blockwise_fp8", 1, 4, 110), ("blockwise_fp8", 2, 2, 60)),
        )
    ]
    rows = throughput.scaling(runs, arms)
    assert [(row["arm"], row["nproc"], row["tps"]) for row in rows] == [
        *(("bf16", 2, 75), ("bf16", 4, 65)),
        *(("blockwise_fp8", 2, 60), ("blockwise_fp8", 4, 110)),
    ]
    assert [row["efficiency"] for row in rows] == [1, pytest.approx(0.85), 1, None]
    assert "| debug | bf16 | 4 | 65 | 260 | 0.850 |" in throughput.scaling_table(rows)
    assert throughput.scaling(runs, ARMS) == []


def test_everything_runs_on_each_number_of_processes_and_under_each_setting(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [
        "debug",
        "--steps",
        "8",
        "--rounds",
        "1",
        "--name",
        "s",
        "--out",
        str(tmp_path),
        "--runs",
        str(tmp_path / "r"),
    ]
    assert (
        compare.main(
            [*command, "--nprocs", "4", "8", "--each", "training.local_batch_size=2", f"training.seq_len=64,{TP}"]
        )
        == 0
    )
    assert trained == ["bf16", "blockwise_fp8"] * 4
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["nprocs"] == [4, 8] and len(result["scaling"]) == 8
    groups = {group.subjects[0].hardware["processes"] for group in subjects.groups_of([tmp_path / "s.json"])}
    assert groups == {4, 8}
    overrides = result["overrides"][f"debug, training.seq_len=64, {TP}, 8 processes/bf16"]
    assert f"--{TP}" in overrides and "--training.seq_len=64" in overrides
    text = (tmp_path / "s.md").read_text()
    assert (
        "4 or 8 processes" in text
        and "### debug, training.local_batch_size=2, 4 processes" in text
        and "### Scaling" in text
    )
    for arguments, message in (
        (["--nprocs", "0"], "--nprocs 0: must be 1 or more"),
        (["--nprocs", "2", "2"], "the same run twice"),
        (
            ["--nprocs", "2", "4", "--each", TP],
            "on 2 processes: beside tensor and pipeline parallelism none are left to FSDP",
        ),
    ):
        with pytest.raises(SystemExit):
            compare.main([*command, *arguments])
        assert message in capsys.readouterr().err


def test_a_failed_run_is_reported() -> None:
    failed = Run("blockwise_fp8", "debug", "k", 1, "here", 3.0, None, "OutOfMemoryError: too much")
    rows = throughput.summarise([done("bf16", 1, 100), failed], ARMS, 2)
    assert rows[1]["rounds"] == 0 and "blockwise_fp8 failed: OutOfMemoryError: too much" in throughput.overview(rows)


# Resuming


def test_whole_rounds_of_another_machine_and_single_runs_of_this_one_are_kept() -> None:
    kept = [done("bf16", 1, 1, machine="there"), done("blockwise_fp8", 1, 2, machine="there"), done("bf16", 3, 4)]
    half = done("bf16", 2, 3, machine="there")
    other_settings = done("bf16", 1, 5, key="changed")
    failed = Run("blockwise_fp8", "debug", "blockwise_fp8", 3, "here", 3.0, None, "no")
    found = throughput.reusable([*kept[:2], half, other_settings, kept[2], failed], ["bf16", "blockwise_fp8"], "here")
    assert found == kept
    # A round of two machines compares nothing.
    mixed = [done("bf16", 1, 1, machine="there"), done("blockwise_fp8", 1, 2)]
    assert throughput.reusable(mixed, ["bf16", "blockwise_fp8"], "here") == mixed[1:]


def test_a_key_tells_what_changes_the_work() -> None:
    def key(arm: Arm = ARMS[1], code: str = "a", *arguments: str) -> str:
        args = parse(*arguments)
        args.skip, args.cold = 5, False
        return compare.key_of(arm, args, code)

    assert key() == key()
    others = [key(ARMS[0]), key(code="b"), key(ARMS[1], "a", "--steps", "21"), key(ARMS[1], "a", "--nproc", "7")]
    others += [key(Arm("llama3_8b", "blockwise_fp8")), key(ARMS[1], "a", "--set", "training.seq_len=64")]
    assert len({key(), *others}) == 7


def test_runs_begin_only_if_they_would_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(compare.time, "monotonic", lambda: now)
    clock = compare.Clock(100)
    assert clock.allows("a")
    clock.note("a", 60)
    clock.note("a", 50)
    now = 45.0
    assert not clock.allows("a") and not clock.allows("unknown")
    clock.note("b", 20)
    assert clock.allows("b")
    assert not compare.Clock(0).allows("a") and compare.Clock(math.inf).allows("a")


def test_the_reason_of_a_failure_is_the_exception() -> None:
    text = "torchrun\nended; the end of log:\n  File x\n[rank0]: torch.OutOfMemoryError: CUDA out of memory.\nChildFailedError\nend\n"
    assert compare.reason_of(TrainingFailed(text)) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory."
    late = "torchrun\nran past 9 s; the end of log:\nSignalException: Process 7 got signal: 15\n"
    assert compare.reason_of(TrainingFailed(late)) == "ran past 9 s"
    assert compare.reason_of(TrainingFailed("a\nb\n")) == "b"


# The scripts, with a trainer that only writes


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the trainer; the names of the arms trained. blockwise_fp8 is 1.3 times as fast; full checkpointing fails."""
    names: list[str] = []
    drift = itertools.count(1)

    def train_arm(arm: Arm, args: Any, *, folder: Path, on_step: Callable[[Step], None], **options: Any) -> list[Step]:
        names.append(arm.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text(LOG)
        if arm.checkpointing == "full":
            raise TrainingFailed("RuntimeError: full")
        tps = (130 if arm.converter == "blockwise_fp8" else 100) / (1 + next(drift) / 1000)
        logged = steps([1.0] + [tps] * (args.steps - 1))
        for step in logged:
            on_step(step)
        return logged

    for module in (compare, compare_loss, profile_step):
        monkeypatch.setattr(module, "train_arm", train_arm)
    monkeypatch.setattr(compare, "machine", lambda: "here")
    return names


def test_runs_take_turns_and_a_second_call_goes_on(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [
        "debug",
        "--steps",
        "8",
        "--out",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--name",
        "t",
        "--nproc",
        "2",
    ]
    assert compare.main([*command, "--rounds", "2"]) == 0
    assert trained == ["bf16", "blockwise_fp8"] * 2
    result = json.loads((tmp_path / "t.json").read_text())
    ours = result["summary"][1]
    assert ours["tps_ratio"] == pytest.approx(1.3, rel=2e-3) and ours["rounds"] == 2 and ours["first_step"] == 2.5
    assert "| blockwise_fp8 | 2 |" in (tmp_path / "t.md").read_text()
    assert (tmp_path / "t.png").stat().st_size > 5_000

    # One run is lost, a round is asked for in addition, and the time is up before anything begins.
    result["runs"] = result["runs"][:3]
    (tmp_path / "t.json").write_text(json.dumps(result))
    assert compare.main([*command, "--rounds", "3", "--seconds", "0"]) == 0
    assert "3 runs were not begun" in capsys.readouterr().out and len(trained) == 4
    assert compare.main([*command, "--rounds", "3"]) == 0
    assert trained[4:] == ["blockwise_fp8", "bf16", "blockwise_fp8"]
    # Other settings are other runs.
    assert compare.main([*command, "--rounds", "1", "--set", "training.seq_len=64"]) == 0
    assert len(trained) == 9
    assert "0 runs are done\n6 others there fit this command no more; all are kept in" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "t.previous1.json").read_text())["runs"]) == 6
    # And what was kept before stays.
    assert compare.main([*command, "--rounds", "1", "--set", "training.seq_len=32"]) == 0
    kept = [json.loads((tmp_path / f"t.previous{number}.json").read_text())["runs"] for number in (1, 2)]
    assert [len(runs) for runs in kept] == [6, 2]


def test_what_was_measured_before_an_interruption_is_reported(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_arm = compare.train_arm

    def stopped_in_round_two(arm: Arm, *args: Any, **options: Any) -> list[Step]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_arm(arm, *args, **options)

    monkeypatch.setattr(compare, "train_arm", stopped_in_round_two)
    command = ["debug", "--steps", "8", "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--rounds", "2"]
    assert compare.main(command) == 130
    assert (
        "| blockwise_fp8 | 1 |" in (tmp_path / "throughput.md").read_text() and (tmp_path / "throughput.png").exists()
    )


def test_an_arm_that_fails_fails_once_and_the_others_go_on(trained: list[str], tmp_path: Path) -> None:
    command = ["debug", "--steps", "8", "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--rounds", "2"]
    assert compare.main([*command, "--checkpointing", "op", "full"]) == 1
    assert trained == ["bf16", "blockwise_fp8"] * 2 + ["bf16", "blockwise_fp8"]
    rows = json.loads((tmp_path / "throughput.json").read_text())["summary"]
    assert [row["rounds"] for row in rows] == [2, 2, 0, 0] and rows[2]["failure"] == "RuntimeError: full"
    # A failed run is done again when asked for again.
    trained.clear()
    assert compare.main([*command, "--checkpointing", "op", "full"]) == 1
    assert trained == ["bf16", "blockwise_fp8"]


def test_cold_runs_share_no_cache(monkeypatch: pytest.MonkeyPatch, trained: list[str], tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    def train_arm(arm: Arm, args: Any, *, environment: dict[str, str], **options: Any) -> list[Step]:
        seen.append(environment)
        return fake(arm, args, **options)

    fake = compare.train_arm
    monkeypatch.setattr(compare, "train_arm", train_arm)
    command = ["debug", "--steps", "8", "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--rounds", "1"]
    assert compare.main(command) == 0 and seen == [{}, {}]
    assert compare.main([*command, "--cold"]) == 0
    assert len({folder for environment in seen[2:] for folder in environment.values()}) == 4
    assert "with empty caches" in (tmp_path / "throughput.md").read_text()


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments, words in [
        (["debug", "--converters", "blockwise_fp8"], "bf16 must be among them"),
        (["debug", "--steps", "5"], "the logged ones are 1, 2, 3, 4, 5; of their intervals none begins after"),
        (["debug", "--steps", "14", "--log-freq", "10"], "the logged ones are 1, 10; of their"),
        (["debug", "--log-freq", "0"], "--log-freq 0: must be 1 or more"),
        (["debug", "--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["debug", "--skip", "-1"], "--skip -1: must be 0 or more"),
        (["debug", "debug"], "the same run twice"),
        (["debug", "--layers", "6"], "must be 1 to 5"),
    ]:
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [{}]}', '{"runs": 1}'])
def test_a_file_that_is_no_result_is_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "throughput.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        compare.main(["debug", "--out", str(tmp_path)])
    assert f"{file} is no result of this script" in capsys.readouterr().err and file.read_text() == text


def test_losses_are_compared(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arms = ["--converters", "bf16", "blockwise_fp8", "blockwise_fp8,blockwise_fp8.wgrad=bf16"]
    assert (
        compare_loss.main(["debug", "--steps", "20", *arms, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")])
        == 0
    )
    result = json.loads((tmp_path / "loss.json").read_text())
    assert list(result["summary"]) == ["bf16", "blockwise_fp8", "blockwise_fp8 wgrad=bf16"]
    assert result["summary"]["blockwise_fp8"]["gap"] == 0 and result["mode"] == "eager"
    assert "--blockwise_fp8.wgrad=bf16" in result["overrides"]["blockwise_fp8 wgrad=bf16"]
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "| blockwise_fp8 | 5.0513 | +0.000% | 1.0000 |" in out
    assert "PASSED: blockwise_fp8 wgrad=bf16 is +0.000% from bf16 over the last 2 logged steps, 0.25% at most" in out
    assert result["within_threshold"] == {"blockwise_fp8": True, "blockwise_fp8 wgrad=bf16": True}


def test_profiles_stand_side_by_side(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trace = [
        {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#11", "ts": 0, "dur": 100},
        {"ph": "X", "cat": "kernel", "name": "nvjet_tst_1", "ts": 10, "dur": 60, "args": {}},
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_AllGather_RING_LL", "ts": 60, "dur": 20, "args": {}},
    ]

    def with_trace(train: Callable[..., list[Step]]) -> Callable[..., list[Step]]:
        def train_arm(arm: Arm, args: Any, *, folder: Path, extra: list[str], **options: Any) -> list[Step]:
            assert "--profiling.profile_freq=12" in extra
            path = profile_step.trace_file(folder, args.steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"traceEvents": trace if arm.converter == "bf16" else trace[:1]}))
            return train(arm, args, folder=folder, **options)

        return train_arm

    monkeypatch.setattr(profile_step, "train_arm", with_trace(profile_step.train_arm))
    command = ["debug", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert profile_step.main(command) == (1 if torch.cuda.device_count() else 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(profile_step, "provenance", lambda: {"date": "", "commit": "", "versions": {}, "hardware": {}})
    capsys.readouterr()
    assert profile_step.main(command) == 1  # blockwise_fp8's trace has no kernel
    assert "no kernel ran on a GPU" in capsys.readouterr().err
    result = json.loads((tmp_path / "profile.json").read_text())
    assert list(result["profiles"]) == ["bf16"] and list(result["failures"]) == ["blockwise_fp8"]
    parts = {name: round(ms * 1e3) for name, ms in result["profiles"]["bf16"]["timeline_ms"].items()}
    assert parts == {"compute": 60, "exposed communication": 10, "exposed copies": 0, "idle": 30}
    text = (tmp_path / "profile.md").read_text()
    assert "| bf16 GEMM | 0.1 (1) |" in text and "| `nvjet_tst_1` |  | bf16 GEMM | 1 | 0.06 | 60.0% |" in text


def test_the_unprofiled_step_is_that_before_the_profiler(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    form = "[rank0]:[titan] 2026-01-01 00:00:{:06.3f} - root - INFO - {}\n"
    ends = {1: 20.0, 2: 22.0, 3: 23.0, 4: 24.0, 5: 25.2, 6: 30.0, 7: 35.0}
    lines = [(10.0, "Training starts at step 1"), *((at, f"step: {n}  loss:") for n, at in ends.items())]
    log.write_text("".join(form.format(at, what).replace(".", ",") for at, what in lines))
    assert profile_step.unprofiled_ms(log, 9) == pytest.approx(1000)  # steps 3, 4, 5
    assert profile_step.unprofiled_ms(log, 6) is None
