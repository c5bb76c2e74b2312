"""How far losses are apart, and compare_loss.py's verdict on it; the trainer is replaced."""

import json
import math
import time
from pathlib import Path
from typing import Any

import compare_loss
import losses
import pytest
from launch import Step, TrainingFailed
from runs import Arm


@pytest.fixture(autouse=True)
def data(request, monkeypatch):
    """There is a corpus, for all that the trainer's stand-in needs."""
    if "missing_data" not in request.node.name:
        monkeypatch.setattr(compare_loss, "check_data", lambda data: None)


def test_gaps_are_those_of_common_steps() -> None:
    base = {step: 2.0 for step in range(1, 101)}
    run = {step: 2.0 if step <= 180 else 2.2 for step in range(2, 201, 2)}
    assert list(losses.gaps(run, base)) == list(range(2, 101, 2)) and losses.mean_gap(run, base) == 0
    late = {step: 2.0 if step <= 90 else 2.2 for step in range(1, 101)}
    assert losses.mean_gap(late, base) == pytest.approx(0.1)
    assert math.isnan(losses.gaps({1: 2.0}, {1: 0.0})[1]) and math.isnan(losses.mean_gap({1: 2.0}, {1: 0.0}))
    assert losses.mean_gap({}, base) is None and not losses.is_close(None) and not losses.is_close(math.nan)
    assert losses.is_close(-0.0025) and not losses.is_close(0.00251)
    assert losses.smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(("factor", "status"), [(1.002, 0), (0.998, 0), (1.003, 1), (0.997, 1), (math.nan, 1)])
def test_the_verdict_on_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, factor: float, status: int
) -> None:
    def train_arm(arm: Arm, args: Any, **options: Any) -> list[Step]:
        # Far apart at the beginning, which does not count.
        scale = {"bf16": 1.0}.get(arm.converter, factor)
        return [Step(n, 5 * (scale if n > 18 else 2.0), 0.5 * scale, 10.0, 100.0) for n in range(1, args.steps + 1)]

    monkeypatch.setattr(compare_loss, "train_arm", train_arm)
    command = ["debug", "--steps", "20", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert compare_loss.main(command) == status
    result = json.loads((tmp_path / "loss.json").read_text())
    assert result["threshold"] == 0.0025 and result["within_threshold"] == {"blockwise_fp8": status == 0}
    captured = capsys.readouterr()
    assert ("FAILED: blockwise_fp8" in captured.err) == bool(status) != ("PASSED: blockwise_fp8" in captured.out)
    if not math.isnan(factor):
        summary = result["summary"]["blockwise_fp8"]
        assert summary["gap"] == pytest.approx(factor - 1) and summary["grad_norm"] == pytest.approx(0.5 * factor)
        assert summary["largest_step_gap"] == pytest.approx(abs(factor - 1))
        assert result["gap"]["blockwise_fp8"][-1] == [20, pytest.approx(factor - 1)]
        assert result["grad_norm"]["blockwise_fp8"][0] == [1, 0.5 * factor]
        # Asked for more, it is not enough.
        assert compare_loss.main([*command, "--threshold", "0.001"]) == 1


def test_runs_at_once_have_gpus_of_their_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert compare_loss.gpus_apart(1, 2, 2) == [{}]
    assert compare_loss.gpus_apart(2, 1, 0) == [{}, {}]  # CPUs are shared
    assert [v["CUDA_VISIBLE_DEVICES"] for v in compare_loss.gpus_apart(2, 2, 5)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [v["CUDA_VISIBLE_DEVICES"] for v in compare_loss.gpus_apart(2, 1, 2)] == ["3", "1"]
    with pytest.raises(ValueError, match="--at-once 3.*want 3 GPUs, there are 2"):
        compare_loss.gpus_apart(3, 1, 2)
    with pytest.raises(ValueError, match="--at-once 0"):
        compare_loss.gpus_apart(0, 1, 2)


@pytest.mark.parametrize("at_once", [1, 2])
def test_after_a_failed_run_no_other_begins(at_once: int) -> None:
    begun: list[str] = []

    def run(arm: Arm) -> None:
        begun.append(arm.converter)
        if arm.converter == "fails":
            raise TrainingFailed("fails")
        time.sleep(1)

    with pytest.raises(TrainingFailed):
        compare_loss.run_all([Arm("debug", name) for name in ("first", "fails", "next", "last")], run, at_once)
    assert begun == ["first", "fails"]
    compare_loss.run_all([Arm("debug", name) for name in "ab"], run, at_once)
    assert sorted(begun[2:]) == ["a", "b"]


COMMAND = ["debug", "--steps", "20", "--converters", "bf16", "blockwise_fp8", "float8_tensorwise"]


def test_a_failed_run_leaves_the_results_of_those_before(tmp_path, monkeypatch, capsys):
    def train_arm(arm: Arm, args: Any, **options: Any) -> list[Step]:
        if arm.converter == "float8_tensorwise":
            raise TrainingFailed("out of memory")
        return [Step(n, 5.0, 0.5, 10.0, 100.0) for n in range(1, args.steps + 1)]

    monkeypatch.setattr(compare_loss, "train_arm", train_arm)
    assert compare_loss.main([*COMMAND, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 1
    result = json.loads((tmp_path / "loss.json").read_text())
    assert list(result["summary"]) == ["bf16", "blockwise_fp8"] and result["within_threshold"] == {
        "blockwise_fp8": True
    }
    assert "out of memory" in capsys.readouterr().err


def test_runs_that_log_other_steps_and_losses_that_are_no_numbers(tmp_path, monkeypatch, capsys):
    def train_arm(arm: Arm, args: Any, **options: Any) -> list[Step]:
        every = {"bf16": 1, "blockwise_fp8": 5}.get(arm.converter, 1)
        loss = math.nan if arm.converter == "float8_tensorwise" else 5.0
        tps = [10.0, *[100.0] * (args.steps - 1)]
        return [Step(n, loss, 0.5, 10.0, tps[n - 1]) for n in range(1, args.steps + 1) if n == 1 or n % every == 0]

    monkeypatch.setattr(compare_loss, "train_arm", train_arm)
    assert compare_loss.main([*COMMAND, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 1
    text = (tmp_path / "loss.json").read_text()
    assert "NaN" not in text
    result = json.loads(text)
    assert result["within_threshold"] == {"blockwise_fp8": True, "float8_tensorwise": False}
    assert result["summary"]["blockwise_fp8"]["tps"] == 100.0 and result["gap"]["blockwise_fp8"][-1] == [20, 0.0]
    assert result["summary"]["float8_tensorwise"]["gap"] is None
    assert "float8_tensorwise is not at a finite distance from bf16" in capsys.readouterr().err


def test_missing_data_is_found_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_loss.main(["debug", "--data", str(tmp_path / "none")])
    assert (
        f"has no corpus and tokenizer; make them, in the repository's root: python scripts/make_corpus.py {tmp_path}"
        in (capsys.readouterr().err)
    )
