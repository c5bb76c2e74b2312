"""What a run tells about fp8 health, and the rules that follow: console, curves, health.jsonl, suggest_rules. Whole runs too."""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
import torch
import torch.nn as nn
from torch.torch_version import TorchVersion
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.tools.utils import NoColor

from blockfp8_titan import BlockwiseFP8Linear, suggest_rules
from blockfp8_titan.conversion import plan_conversion
from blockfp8_titan.health_limits import Limits, skip_rule, to_toml
from blockfp8_titan.health_log import HealthLog, curves, from_record, to_record, watch_health
from blockfp8_titan.journal import Journal, read
from blockfp8_titan.metrics import RunLog, RunRecorder
from blockfp8_titan.quantization_error import TensorHealth
from blockfp8_titan.rules import load_rules_file

from .conftest import Train
from .llama import model_of
from .test_report import Page, make, write_run

GOOD = TensorHealth(31.5, 0.001, 0.01, 1e-4, 2e-4, 0)
FLUSHED = TensorHealth(22.0, 0.3, 0.01, 2.0**-126, 2e-4, 0)
NAN = TensorHealth(math.nan, 0.0, 0.0, math.nan, math.nan, 7)


def health_of(**bad: TensorHealth):
    """Of four layers, in good health but for those given by name as "layer_role"."""
    names = [f"layers.{i}.w1" for i in range(4)]
    return {
        name: {role: bad.get(f"{name.replace('.', '_')}_{role}", GOOD) for role in ("x", "w", "dy")} for name in names
    }


SICK = health_of(layers_1_w1_dy=FLUSHED, layers_3_w1_x=NAN)


class Kept(BaseLogger):
    def __init__(self) -> None:
        self.logged = {}

    def log(self, metrics, step: int) -> None:
        self.logged.setdefault(step, {}).update(metrics)


@pytest.fixture
def processor(tmp_path: Path):
    """A metrics processor of one linear's run whose health is due at steps 1, 4, 8 ... and which logs steps 3, 6 ..."""
    linear = BlockwiseFP8Linear(144, 128, bias=False)
    linear.fqn = "layers.0.w1"
    lines = logging.getLogger()
    processor = SimpleNamespace(
        model_parts=[nn.ModuleList([linear])],
        color=NoColor(),
        kept=Kept(),
        should_log=lambda step: step % 3 == 0,
        log=lambda step, loss: lines.info(f"step: {step} loss: {loss}"),
    )
    run_log = RunLog([processor.kept], RunRecorder(tmp_path, {}), 3, reports_mfu=False)
    should_log = processor.should_log
    processor.should_log = lambda step: run_log.note_step(step) or should_log(step)
    watch_health(processor, 4, run_log.log_health)
    return processor


def train_steps(processor: MetricsProcessor, steps: range, size: float = 1.0) -> None:
    (linear,) = processor.model_parts[0]
    for step in steps:
        x = torch.randn(24, 144, requires_grad=True)
        (linear(x) * size).sum().backward()
        if processor.should_log(step):
            processor.log(step, 5.0)


def test_steps_that_are_due_are_told(processor, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        train_steps(processor, range(1, 13))
    records = read(tmp_path / "health.jsonl")
    assert [record["step"] for record in records] == [4, 8, 12] and len({record["run"] for record in records}) == 1
    assert list(processor.kept.logged) == [4, 8, 12]
    assert set(records[0]["layers"]["layers.0.w1"]) == {"x", "w", "dy"}
    told = [record.message for record in caplog.records if record.message.startswith("step:")]
    # After torchtitan's own, where it logs the step.
    expected = ["3 loss", "4  fp8", "6 loss", "8  fp8", "9 loss", "12 loss", "12  fp8"]
    assert [re.match(r"step:\s+(\d+ +\w+)", line)[1] for line in told] == expected
    assert re.search(r"worst SQNR: layers\.0\.w1 (x|w|dy) 3\d\.\d dB", told[1])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_resumed_run_tells_nothing_of_its_first_step_and_no_step_twice(processor, tmp_path: Path) -> None:
    Journal(tmp_path / "health.jsonl").append(*({"step": step, "layers": {}} for step in (4, 8)))
    train_steps(processor, range(6, 9))
    assert [(r["step"], bool(r["layers"])) for r in read(tmp_path / "health.jsonl")] == [
        (4, False),
        (8, True),
    ]
    assert [record["step"] for record in read(tmp_path / "health.superseded.jsonl")] == [8]


def test_a_run_that_diverged_is_warned_of_once_and_without_rules(caplog) -> None:
    log = HealthLog(1, lambda: [], None)
    everywhere = health_of(**{f"layers_{i}_w1_{role}": NAN for i in (1, 2, 3) for role in ("x", "dy")})
    for step in (1, 2):
        log._warn(everywhere, step)
    (warning,) = [record.message for record in caplog.records]
    assert "step 1: 3 of 4 layers have NaN or Inf, layers.1.w1 among them: the run has diverged" in warning
    # Not where it is a few layers.
    log._warn(SICK, 3)
    assert sum("rules = [" in record.message for record in caplog.records) == 2


def test_a_layer_beyond_a_limit_is_warned_of_once_with_its_rule(processor, caplog) -> None:
    # Gradients below the least multiplier's reach are lost.
    train_steps(processor, range(1, 9), size=1e-40)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "fp8 health at step 4: layers.0.w1: " in warnings[0]
    assert re.search(r"SQNR of dy -?\d+\.\d dB, below 26", warnings[0])
    assert warnings[0].endswith('under [blockwise_fp8]: rules = [{ match = "layers.0.w1", action = "skip" }]')
    (rule,) = tomli.loads(warnings[0].partition("under [blockwise_fp8]: ")[2])["rules"]
    assert rule == {"match": "layers.0.w1", "action": "skip"}


def test_a_step_that_could_not_be_measured_is_told_of(processor, tmp_path: Path, caplog, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("blockfp8_titan.health.tallies_of", fail)
        train_steps(processor, range(1, 9))  # observes two
    train_steps(processor, range(9, 13))
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        "fp8 health of step 4: not measured, because of rank 0: OutOfMemoryError" in warning
        and "health_freq = 0" in warning
    )
    assert [record["step"] for record in read(tmp_path / "health.jsonl")] == [12]


def test_curves_and_records() -> None:
    points = curves(SICK)
    assert points["fp8_health/layers.1.w1/dy/sqnr_db"] == points["fp8_health/worst/dy/sqnr_db"] == 22
    assert points["fp8_health/worst/dy/flushed"] == 0.3 and points["fp8_health/worst/x/nonfinite"] == 7
    assert "fp8_health/layers.3.w1/x/sqnr_db" not in points and all(map(math.isfinite, points.values()))
    assert len(points) == 4 * 3 * 3 - 1 + 3 * 4
    again = from_record(json.loads(json.dumps(to_record(health_of(layers_1_w1_dy=FLUSHED)))))
    assert again["layers.0.w1"]["x"] == GOOD and again["layers.1.w1"]["dy"].sqnr_db == 22


def test_limits() -> None:
    assert list(Limits().crossings(health_of())) == []
    found = {(crossing.fqn, crossing.role, crossing.what): crossing.text for crossing in Limits().crossings(SICK)}
    assert found == {
        ("layers.1.w1", "dy", "sqnr"): "SQNR of dy 22.0 dB, below 26",
        ("layers.1.w1", "dy", "flushed"): "30.0% of dy flushed to zero, above 10.0%",
        ("layers.3.w1", "x", "nonfinite"): "x has 7 NaN or Inf",
    }
    assert len(list(Limits(clamped_above=0.005).crossings(health_of()))) == 12
    with pytest.raises(ValueError, match=r"flushed_above = 2: must be a share"):
        Limits(flushed_above=2)


def write_log(folder: Path, *steps, rules_file: str = "") -> Path:
    Journal(folder / "runs.jsonl").append({"config": {"blockwise_fp8": {"rules_file": rules_file}}})
    for step, health in enumerate(steps, start=1):
        Journal(folder / "health.jsonl").append({"step": step, "layers": to_record(health)})
    return folder


def test_suggested_rules_skip_exactly_the_layers_beyond_a_limit(tmp_path: Path, capsys) -> None:
    names = [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("attention.wk", "feed_forward.w1")]
    sick = {"layers.1.attention.wk": {"x": GOOD, "dy": FLUSHED}, "layers.0.feed_forward.w1": {"w": NAN}}
    health = {name: {"x": GOOD} for name in names} | sick
    folder = write_log(tmp_path, health, health, {name: {"x": FLUSHED} for name in names}, rules_file="ffn_only")
    assert suggest_rules.main([str(folder)]) == 0
    assert f'rules_file = "{folder / "suggested_rules.toml"}"' in capsys.readouterr().out
    placed = load_rules_file(str(folder / "suggested_rules.toml"))
    own = load_rules_file("ffn_only")
    assert [rule.rule for rule in placed[2:]] == [rule.rule for rule in own]
    assert "SQNR of dy 22.0 dB, below 26" in placed[1].rule.reason or "SQNR of dy" in placed[0].rule.reason
    # Without the run's own rules.
    plan = plan_conversion(model_of(layers=2), placed[:2])
    skipped = {row.fqn for row in plan.rows if not row.in_fp8}
    assert skipped == {"output", *sick}


def test_suggestions_depend_on_limits_and_steps(tmp_path: Path, capsys) -> None:
    folder = write_log(tmp_path, SICK, health_of(), health_of())
    out = tmp_path / "rules" / "r.toml"
    assert suggest_rules.main([str(folder), "--from-step=2", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "No layer is beyond a limit" in printed and not out.exists()
    assert "; SQNR below 26 dB, over 10.0% flushed to zero, NaN or Inf. Nothing is written." in printed
    assert suggest_rules.main([str(folder), "--from-step=2", f"--out={out}", "--sqnr-below=40"]) == 0
    assert [placed.rule.match for placed in load_rules_file(str(out))] == [f"layers.{i}.w1" for i in range(4)]
    gone = write_log(tmp_path / "gone", SICK, rules_file="gone.toml")
    for arguments, words in (
        ([str(gone)], "gone: the run's rules_file = 'gone.toml': no such file"),
        ([str(folder), "--from-step=9"], "health.jsonl has no step from 9 on"),
        ([str(tmp_path / "none")], "no step was observed; name the job.dump_folder of a run that came to a step that"),
        ([str(folder), "--flushed-above=7"], "flushed_above = 7.0: must be a share"),
    ):
        with pytest.raises(SystemExit):
            suggest_rules.main(arguments)
        assert words in capsys.readouterr().err


def test_rules_quote_what_globs_and_toml_take_for_their_own(tmp_path: Path) -> None:
    rule = skip_rule('a[0]."b"', "why")
    (tmp_path / "r.toml").write_text(to_toml(rule))
    (placed,) = load_rules_file(str(tmp_path / "r.toml"))
    assert placed.rule.matches_name('a[0]."b"') and not placed.rule.matches_name('a0."b"')


def test_the_report_maps_health(tmp_path: Path) -> None:
    folder = write_log(write_run(tmp_path / "fp8", ["blockwise_fp8"]), health_of(), SICK)
    html, markdown = make(tmp_path, folder)
    texts = Page(html).texts
    for role in ("inputs", "weights", "gradients of outputs"):
        assert f"SQNR of {role}, by layer and step" in texts
    table = markdown.split("| worst layers |")[1].splitlines()
    assert table[2] == "| layers.3.w1 | x | 2 | not finite | 0.10% | 1.00% | 7 |"
    assert table[3] == "| layers.1.w1 | dy | 2 | 22.0 dB | 30.00% | 1.00% | 0 |"
    assert "fp8 health" not in make(tmp_path, write_run(tmp_path / "bf16", []))[1]


LAYERS = {
    f"layers.{i}.{name}"
    for i in range(6)
    for name in (*(f"attention.w{c}" for c in "qkvo"), *(f"feed_forward.w{c}" for c in "123"))
}


def check_records(folder: Path, steps: list[int]) -> None:
    """All tensors of all layers, in the health of a run that has just begun."""
    records = read(folder / "health.jsonl")
    assert [record["step"] for record in records] == steps
    for record in records:
        assert record["layers"].keys() == LAYERS
        for tensors in record["layers"].values():
            assert tensors.keys() == {"x", "w", "dy"}
            for tensor in tensors.values():
                assert tensor["sqnr_db"] > 29 and tensor["flushed"] < 0.05 and tensor["nonfinite"] == 0
                assert 0 < tensor["multiplier_min"] <= tensor["multiplier_max"]


def test_a_run_records_its_health(train: Train, tmp_path: Path, corpus: Path, capsys) -> None:
    options = ["--blockwise_fp8.health_freq=2", *validating(corpus)]
    run = train("debug_blockwise_fp8", *options, "--training.global_batch_size=16", steps=2, folder=tmp_path)
    check_records(run.folder, [2])
    lines = [line for line in run.log.read_text().splitlines() if "fp8 health" in line]
    assert len(lines) == 1 and all(line.startswith("[rank0]:") and "worst SQNR: layers." in line for line in lines)
    assert all("fp8_health" not in json.dumps(record) for record in read(run.folder / "metrics.jsonl"))
    # Numbers of training do not depend on whether it is watched.
    quiet = train("debug_blockwise_fp8", "--blockwise_fp8.health_freq=0", "--training.global_batch_size=16", steps=1)
    assert quiet.losses == run.losses[:1] and quiet.grad_norms == run.grad_norms[:1]
    assert not (quiet.folder / "health.jsonl").exists()
    # Its rules keep out of fp8 what they name: here the worst tenth.
    worst = sorted(
        min(tensor["sqnr_db"] for tensor in tensors.values())
        for tensors in read(run.folder / "health.jsonl")[-1]["layers"].values()
    )
    limit = f"--sqnr-below={worst[4]}"
    assert suggest_rules.main([str(run.folder), limit, f"--out={tmp_path / 'rules.toml'}"]) == 0
    named = {placed.rule.match for placed in load_rules_file(str(tmp_path / "rules.toml"))}
    assert named and named < LAYERS
    rules = f"--blockwise_fp8.rules_file={tmp_path / 'rules.toml'}"
    after = train("debug_blockwise_fp8", rules, "--blockwise_fp8.health_freq=2", steps=2, nproc=1)
    (record,) = read(after.folder / "health.jsonl")
    assert record["layers"].keys() == LAYERS - named


def validating(corpus: Path) -> list[str]:
    """After each step."""
    options = ("enable", "dataset=c4_test", f"dataset_path={corpus / 'corpus'}", "seq_len=64", "freq=1", "steps=1")
    return [f"--validation.{option}" for option in options]


@pytest.mark.parametrize(
    "overrides",
    [
        # Stages run on uninitialised memory in the first step, and again after a validation.
        ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B"),
        ("--parallelism.tensor_parallel_degree=2", "--activation_checkpoint.mode=full"),
    ],
    ids=["PP", "TP, full AC"],
)
def test_all_layers_of_a_parallel_run_are_recorded(train: Train, corpus: Path, overrides: tuple[str, ...]) -> None:
    # Torch 2.11 refuses validation whose micro-batches have another shape than training's, without fp8 too.
    validation = validating(corpus) if TorchVersion(torch.__version__) >= "2.12" else []
    run = train("debug_blockwise_fp8", "--blockwise_fp8.health_freq=2", *validation, *overrides, steps=2)
    check_records(run.folder, [2])
