"""scripts/accuracy.py: what it measures, and that it says the same again."""

import json
import math
from pathlib import Path

import accuracy
import pytest
import torch

from blockfp8_titan.numerics import SQNR_FLOOR_DB


def test_a_typical_slice_shows_what_the_whole_hides():
    exact = torch.randn(64, 128)
    exact[:, 0] *= 1e4
    actual = exact.clone()
    actual[:, 1:] += 0.1 * torch.randn(64, 127)
    assert accuracy.sqnr(exact, actual) > 60
    assert accuracy.typical_sqnr(exact, actual, 1) == pytest.approx(20, abs=1.5)
    assert accuracy.typical_sqnr(exact, actual, 0) > 60


def test_its_figures_are_finite_and_above_the_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accuracy, "TOKENS", 400)
    monkeypatch.setattr(accuracy, "IN", 256)
    monkeypatch.setattr(accuracy, "OUT", 256)
    assert accuracy.main(["--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "accuracy.json").read_text())
    for rows in result["linear"].values():
        for name in accuracy.OURS:
            assert all(math.isfinite(value) for value in rows[name].values())
    ours = result["linear"]["normal"]["blockwise_fp8"]
    assert all(ours[name] >= SQNR_FLOOR_DB[name] for name in ("y", "dx", "dw"))
    kept = result["feed_forward"]
    in_bf16, in_fp8, in_blocks = (kept[choice] for choice in accuracy.FEED_FORWARDS)
    assert in_blocks["y"] == in_fp8["y"] == in_bf16["y"] and in_blocks["dx"] == in_fp8["dx"]
    assert 0.2 < in_bf16["dw2"] - in_fp8["dw2"] < 2.2 and 0 < abs(in_blocks["dw2"] - in_fp8["dw2"]) < 0.5
    text = (tmp_path / "accuracy.md").read_text()
    assert all(name in text for name in accuracy.OURS)
    again = accuracy.measure(lambda line: None)
    assert again["linear"] == result["linear"] and again["feed_forward"] == kept
