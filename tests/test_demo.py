"""The demo's parts: corpus and tokenizer, launching and reading a run, comparing two."""

import json
import math
from pathlib import Path

import demo
import launch
import make_corpus
import pytest
from launch import Step
from tokenizers import Tokenizer

LINE = (
    "[rank0]:[titan] 2026-01-01 00:00:00,000 - root - INFO - step: 12  loss:  6.37990  grad_norm:  1.3730  "
    "memory:  0.70GiB(2.98%)  tps: 12,345  tflops: 0.01  mfu: nan%\n"
)


def steps(losses: list[float]) -> list[Step]:
    return [Step(i + 1, loss, 1.0, 0.5, 100.0 if i < 3 else 400.0) for i, loss in enumerate(losses)]


FALLING = [8.0 - 0.03 * i for i in range(100)]  # ends near 5


def test_a_logged_step_is_read() -> None:
    assert launch.parse_step(LINE) == Step(12, 6.3799, 1.373, 0.70, 12345.0)


@pytest.mark.parametrize(
    "line",
    [
        LINE.replace("rank0", "rank1"),
        "[rank0]: validate step: 12  loss:  6.3799  memory:  0.70GiB(2.98%)  tps: 12,345\n",
        "[rank0]: Training starts at step 1\n",
    ],
)
def test_other_lines_are_not_steps(line: str) -> None:
    assert launch.parse_step(line) is None


def test_a_diverged_step_is_read() -> None:
    assert math.isnan(launch.parse_step(LINE.replace("6.37990", "nan")).loss)


def test_a_failing_run_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(launch.TrainingFailed, match="ended with status 1") as failed:
        launch.train(tmp_path / "missing.toml", [], nproc=1, log=log, timeout=120, cache=tmp_path)
    assert "missing.toml" in str(failed.value)
    assert "FileNotFoundError" in str(failed.value)
    assert "FileNotFoundError" in log.read_text()


def test_a_run_is_stopped_when_its_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(launch.TrainingFailed, match="ran past 1 s"):
        launch.train(tmp_path / "missing.toml", [], nproc=1, log=tmp_path / "log.txt", timeout=1, cache=tmp_path)


def test_corpus_and_tokenizer(corpus: Path, tmp_path: Path) -> None:
    lines = (corpus / "corpus" / "data.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert 500_000 < sum(map(len, texts)) < 1_700_000
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    config = json.loads((corpus / "tokenizer" / "tokenizer_config.json").read_text())
    assert {config["bos_token"], config["eos_token"]} <= tokenizer.get_vocab().keys()
    assert all(tokenizer.decode(tokenizer.encode(text).ids) == text for text in texts[:20])


def test_the_same_source_gives_the_same_corpus(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "tests").mkdir(parents=True)
    for i in range(30):
        (source / f"{i}.py").write_text(f"line {i}\n" * 200)
    (source / "tests" / "left_out.py").write_text("left out\n" * 200)
    (source / "short.py").write_text("left out\n")
    for name in "ab":
        make_corpus.make(tmp_path / name, source)
    for path in ("corpus/data.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    text = "".join(json.loads(line)["text"] for line in (tmp_path / "a/corpus/data.jsonl").read_text().splitlines())
    assert sorted(text.splitlines()) == sorted(f"line {i}" for i in range(30) for _ in range(200))


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no text; name a folder"):
        make_corpus.make(tmp_path / "out", tmp_path)


def test_comparison_of_like_runs() -> None:
    runs = {"bf16": steps(FALLING), "blockwise_fp8": steps([1.01 * loss for loss in FALLING])}
    comparison = demo.compare(runs)
    assert comparison.gap == pytest.approx(0.01)
    assert comparison.last_loss["bf16"] == pytest.approx(sum(FALLING[90:]) / 10)
    assert comparison.tps == {"bf16": 400.0, "blockwise_fp8": 400.0}
    assert comparison.failures() == []
    assert "1.00%" in demo.table(runs, comparison)


@pytest.mark.parametrize(
    ("bf16", "fp8", "words"),
    [
        ([8.0] * 100, [8.0] * 100, "not below 5.5"),
        (FALLING, [1.03 * loss for loss in FALLING], "the curves part"),
        (FALLING, [*FALLING[:50], *[math.nan] * 50], "the curves part"),
    ],
)
def test_runs_that_did_not_work_are_told(bf16: list[float], fp8: list[float], words: str) -> None:
    failures = demo.compare({"bf16": steps(bf16), "blockwise_fp8": steps(fp8)}).failures()
    assert any(words in failure for failure in failures)


@pytest.mark.parametrize(("factor", "status"), [(1.001, 0), (1.1, 1)])
def test_demo_writes_its_results_and_tells_success(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, factor: float, status: int
) -> None:
    def train(config: Path, overrides: list[str], *, log: Path, on_step, **options) -> list[Step]:
        log.parent.mkdir()
        log.write_text("CPU capacity: Some Processor with 23.54GiB memory")
        logged = steps(FALLING if "bf16" in config.name else [factor * loss for loss in FALLING])
        for step in logged:
            on_step(step)
        return logged

    monkeypatch.setattr(demo, "DEMO", tmp_path)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(make_corpus, "make", lambda dest: pytest.fail("the corpus was there"))
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    assert demo.main([]) == status
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == "Some Processor"
    assert result["gap"] == pytest.approx(factor - 1)
    assert len(result["runs"]["bf16"]) == 100
    assert (tmp_path / "loss.png").stat().st_size > 10_000
