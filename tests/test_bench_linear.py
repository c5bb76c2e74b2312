"""The benchmark of Linears and blocks on the CPU, with a clock in place of CUDA events; what needs a GPU is what it measures."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import bench_linear as bench
import linear_subjects
import pytest
import torch
import torch.nn as nn
from measure import Pace
from shapes import FORWARD, WGRAD
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama3.model.args import TransformerModelArgs

CPU = torch.device("cpu")
TOKENS, DIM, HIDDEN = 256, 128, 512


class Clock:
    """Says the same of every candidate, and runs none."""

    def __init__(self, us: float):
        self.us = us

    def pace(self, run: Callable[[], object]) -> Pace:
        return Pace(1, self.us / 10)

    def sample(self, run: Callable[[], object], pace: Pace) -> float:
        return self.us

    def synchronize(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def tiny() -> None:
    """A flavor with one small layer, and a compiler that needs no C++ one but partitions as inductor does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llama3_args, "tiny", TransformerModelArgs(dim=DIM, n_layers=1, n_heads=2, n_kv_heads=1))
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
        yield


def one(subject: str, *converters: str, modes: tuple[str, ...] = ("eager",)) -> dict:
    torch.manual_seed(0)
    clocks = {"timer": Clock(100.0), "ahead": Clock(80.0)}
    return bench.bench_subject(
        *(subject, "tiny", TOKENS), converters=converters, modes=modes, device=CPU, seconds=120, **clocks
    )


def test_subjects_have_the_sizes_of_the_block() -> None:
    linears = linear_subjects.subject_of("linears", "tiny", TOKENS, CPU)
    kv = (DIM // 2, DIM)
    assert linears.sizes == ((DIM, DIM), kv, kv, (DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN), (HIDDEN, DIM))
    assert next(name for name, _ in linears.module.named_parameters()) == "attention.wq.weight"
    block = linear_subjects.subject_of("block", "tiny", TOKENS, CPU)
    assert sorted(block.sizes) == sorted(linears.sizes) and block.inputs[0].shape == (1, TOKENS, DIM)
    assert {p.dtype for p in block.module.parameters()} == {torch.bfloat16} and block.module.freqs_cis.is_complex()
    assert linear_subjects.subject_of("w2", "tiny", TOKENS, CPU).sizes == ((DIM, HIDDEN),)


def test_a_linear_has_three_gemms() -> None:
    assert bench.gemms_of([(64, 32)], 8, WGRAD) == [(FORWARD, 8, 64, 32), (FORWARD, 8, 32, 64), (WGRAD, 64, 32, 8)]
    assert bench.gemms_of([(64, 32)], 8, FORWARD)[2] == (FORWARD, 64, 32, 8)


def test_the_roof_needs_every_gemm() -> None:
    a, b = (FORWARD, 1, 2, 3), (WGRAD, 1, 2, 3)
    roofs = {a: {"bf16": 5.0, "cublas": 3.0}, b: {"bf16": 7.0}}
    assert bench.roof_us([a, a, b], "bf16", roofs) == 17
    assert bench.roof_us([a, b], "cublas", roofs) is None and bench.roof_us([b], "absent", roofs) is None


def test_saved_storages_are_counted_once_and_without_parameters() -> None:
    subject = linear_subjects.subject_of("linears", "tiny", TOKENS, CPU)
    # wq, wk and wv share an input; so do w1 and w3.
    inputs = 2 * TOKENS * (3 * DIM + HIDDEN)
    for mode in linear_subjects.MODES:
        assert linear_subjects.Step(subject.module, subject, mode).saved() == {
            "saved_bytes": inputs,
            "saved_weight_bytes": 0,
        }


def test_saved_weights_are_told_apart() -> None:
    class KeepsACopy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * 1)

    subject = linear_subjects.subject_of("wk", "tiny", TOKENS, CPU)
    subject.module.linear.__class__ = KeepsACopy
    weight = 2 * DIM * DIM // 2
    saved = linear_subjects.Step(subject.module, subject, "eager").saved()
    assert saved == {"saved_bytes": 2 * TOKENS * DIM + weight, "saved_weight_bytes": weight}


def test_a_step_leaves_no_gradients() -> None:
    subject = linear_subjects.subject_of("w1", "tiny", TOKENS, CPU)
    step = linear_subjects.Step(subject.module, subject, "eager")
    step()
    y, dx, dw = step.results()
    assert y.shape == (TOKENS, HIDDEN) and dx.shape == (TOKENS, DIM) and dw.shape == (HIDDEN, DIM)
    assert all(t.grad is None for t in (*subject.module.parameters(), *step.inputs, *subject.inputs))


def test_twins_share_parameters_and_not_modules() -> None:
    module = linear_subjects.subject_of("block", "tiny", TOKENS, CPU).module
    twin = bench._twin(module)
    assert all(a is b for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert twin.freqs_cis is module.freqs_cis and twin.block is not module.block
    linear_subjects.CONVERTERS["blockwise_fp8"].convert(twin)
    assert type(module.block.attention.wq) is nn.Linear and type(twin.block.attention.wq) is not nn.Linear


@pytest.fixture(scope="module")
def record() -> dict:
    return one("block", "blockwise_fp8", "bf16", "torchao_blockwise", modes=("eager", "compiled"))


def test_a_subject_is_measured_under_all_converters_and_modes(record: dict) -> None:
    found = {(c["converter"], c["mode"]): c for c in record["candidates"]}
    for mode in linear_subjects.MODES:
        bf16, ours, peer = (found[name, mode] for name in ("bf16", "blockwise_fp8", "torchao_blockwise"))
        assert (ours["us"], ours["gpu_us"], ours["host_us"], ours["ratio"]) == (100, 80, 10, 1)
        assert bf16["gemm_us"] == 21 * 80 and bf16["roof_share"] == pytest.approx(16.8)
        assert ours["roof_share"] is None  # cuBLASLt's GEMM needs a GPU
        assert 0.01 < ours["error"] < linear_subjects.BLOCK_ERROR_BOUND and not ours["wrong"]
        assert bf16["error"] == 0 or mode == "compiled"
        assert 0 < ours["saved_bytes"] < 1.2 * bf16["saved_bytes"]
        assert "failed" in peer  # for want of torchao or of a GPU
    assert len(record["gemms"]) == len({tuple(g.values())[:4] for g in record["gemms"]}) == 9


def test_wrong_results_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(module: nn.Module) -> None:
        module.linear.register_forward_hook(lambda module, args, y: 2 * y)

    def poison(module: nn.Module) -> None:
        module.linear.register_forward_hook(lambda module, args, y: y * torch.tensor([float("nan")], dtype=y.dtype))

    monkeypatch.setitem(linear_subjects.CONVERTERS, "twice", linear_subjects.Converter(twice, "bf16"))
    monkeypatch.setitem(linear_subjects.CONVERTERS, "poison", linear_subjects.Converter(poison, "bf16"))
    wrong = one("wk", "bf16", "twice", "poison")
    assert bench.wrong_results({"subjects": [wrong]}) == ["tiny wk: twice, eager", "tiny wk: poison, eager"]
    assert [c["error"] for c in wrong["candidates"]] == [0, 1, None]
    assert "1.0e+00 WRONG" in bench.overview(wrong) and "not finite WRONG" in bench.overview(wrong)


def test_without_bf16_nothing_is_compared() -> None:
    (ours,) = one("wk", "blockwise_fp8")["candidates"]
    assert "us" not in ours and "bf16" in ours["failed"]
    with pytest.raises(SystemExit):
        bench.main(["--converters", "blockwise_fp8"])


def test_a_result_survives_json_and_renders(record: dict) -> None:
    record = json.loads(json.dumps(record, allow_nan=False))
    record["candidates"][0] |= {"launches": 12, "group_us": {"bf16 GEMM": 60.0, "other": 5.0}}
    result = {**bench.provenance(), "gpu": "cpu", "subjects": [record], "dropped": {"tiny wq": "time was up"}}
    text = bench.report(result)
    assert "### tiny block, 256 tokens" in text and "- tiny wq: time was up" in text and "| bf16 GEMM | 60 |" in text
    (rows,) = [block.splitlines() for block in text.split("\n\n") if block.startswith("| converter")]
    assert len(rows) == 2 + 6 and len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_subjects_past_the_end_of_time_are_named_and_what_is_there_is_written() -> None:
    written: list[int] = []
    result = bench.bench(
        *(Clock(1.0), Clock(1.0), CPU),
        flavors=["tiny"],
        subjects=["wk", "wq"],
        tokens=TOKENS,
        converters=["bf16"],
        modes=["eager"],
        seconds=0.01,
        write=lambda result: written.append(len(result["subjects"])),
    )
    assert result["dropped"] == {"tiny wq": "time was up"} and written == [1]


def test_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--tokens", "10000"])
    assert "--tokens 10000" in capsys.readouterr().err


def test_a_converter_that_tunes_for_longer_than_there_is_time_is_left_out() -> None:
    record = one("wk", "torchao_blockwise", "blockwise_fp8", "bf16", modes=("eager", "compiled"))
    found = [(c["converter"], c["mode"], "us" in c) for c in record["candidates"]]
    assert found[-2:] == [("torchao_blockwise", mode, False) for mode in ("eager", "compiled")]
    assert all(measured for *_, measured in found[:-2]) and len(found) == 6
    assert "tune themselves" in record["candidates"][-1]["failed"]
