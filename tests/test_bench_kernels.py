"""The benchmark's logic, with a clock in place of CUDA events; what needs a GPU is what it measures."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import bench_kernels as bench
import candidates
import kernel_plots
import kernel_tables
import pytest
import torch
from bench_kernels import Budget
from candidates import BASE, COPY, OURS, Candidate, Contender
from measure import MIN_ROUNDS, PEERS, Pace, peak_tflops, spread
from shapes import FORWARD, MODELS, SUITES, WGRAD, Shape, chosen, gemm_shapes, quantize_shapes, spread_out

from blockfp8_titan import reference
from blockfp8_titan.numerics import relative_error

CPU = torch.device("cpu")


class ScriptedTimer:
    """Tells, for each function, the next of its times."""

    def __init__(self, times: dict[Callable, list[float]]):
        self.times = {run: iter(values) for run, values in times.items()}

    def pace(self, run: Callable) -> Pace:
        return Pace(1, 0.0)

    def sample(self, run: Callable, pace: Pace) -> float:
        return next(self.times[run])

    def synchronize(self) -> None:
        pass


class ConstantTimer(ScriptedTimer):
    def __init__(self, us: float):
        self.us = us

    def sample(self, run: Callable, pace: Pace) -> float:
        return self.us


def contender(name: str, run: Callable, exact: float = 1.0, **options) -> Contender:
    def error(out: torch.Tensor) -> float:
        return relative_error(torch.full_like(out, exact), out)

    return Contender(name, lambda operands: Candidate(run, (operands,), error, 1e-2), **options)


def measure(contenders: list[Contender], timer: ScriptedTimer, seconds: float = 60, **options):
    options = {"work": 10**9, "base": "base", "copy_gbps": 100.0} | options
    return bench.measure(contenders, torch.ones(4), timer, Budget(seconds), seconds, **options)


def test_a_linear_becomes_three_gemms_and_a_shared_size_is_measured_once() -> None:
    shapes = {use: shape for shape in gemm_shapes([("8B", 4096)]) for use in shape.uses}
    sizes = {use: (s.kind, s.M, s.N, s.K) for use, s in shapes.items()}
    assert sizes["8B w1.y 4k"] == (FORWARD, 4096, 14336, 4096)
    assert sizes["8B w1.dx 4k"] == sizes["8B w2.y 4k"] == (FORWARD, 4096, 4096, 14336)
    assert sizes["8B w1.dw 4k"] == (WGRAD, 14336, 4096, 4096)
    assert len(shapes) == 15 and len(set(shapes.values())) == 9
    assert shapes["8B w2.y 4k"].name == "8B w1.dx 4k"
    assert shapes["8B w1.y 4k"].flops == 2 * 4096 * 14336 * 4096


@pytest.mark.parametrize("suite", SUITES)
def test_every_shape_suits_ours_and_the_base(suite: str) -> None:
    gemms, quantized = gemm_shapes(SUITES[suite]), quantize_shapes(SUITES[suite])
    assert {s.kind for s in gemms} == {FORWARD, WGRAD} and {s.kind for s in quantized} == {"x", "w"}
    for shape in gemms:
        assert shape.M % 4 == 0 and shape.N % 16 == 0 and shape.K % 16 == 0, shape
    for shapes in (gemms, quantized):
        assert len({s.name for s in shapes}) == len(shapes) == len({(s.kind, s.M, s.N, s.K) for s in shapes})


def test_tensor_parallel_linears_are_cut_where_torchtitan_cuts_them() -> None:
    whole, cut = MODELS["70B"], MODELS["70B/TP8"]
    for name in ("wq", "wk", "w1"):
        assert cut[name] == (whole[name][0] // 8, whole[name][1])
    for name in ("wo", "w2"):
        assert cut[name] == (whole[name][0], whole[name][1] // 8)


def test_the_filter_reads_all_uses_of_a_shape() -> None:
    shapes = gemm_shapes(SUITES["quick"])
    assert [s.name for s in chosen(shapes, ["8B w2.y"])] == ["8B w1.dx 16k"]
    assert chosen(shapes, []) == shapes and chosen(shapes, ["9B"]) == []


@pytest.mark.parametrize("n", [0, 1, 5, 18])
def test_what_is_left_out_is_spread_evenly(n: int) -> None:
    order = spread_out(range(n))
    assert sorted(order) == list(range(n))
    if n == 18:
        assert max(b - a for a, b in zip(sorted(order[:9]), sorted(order[:9])[1:], strict=False)) <= 4


def test_spread_is_of_the_middle_four_fifths() -> None:
    assert spread([10.0] * 11) == 0
    assert spread([float(i) for i in range(95, 106)]) == pytest.approx(8 / 100)


def test_speed_is_compared_round_by_round() -> None:
    # The chip slows to a half midway; in each round fast takes 0.8 of the base.
    base_times = [7.0] + [100.0] * 10 + [200.0] * 10
    base, fast = (lambda: torch.ones(4)), (lambda: torch.ones(4) * 1)
    timer = ScriptedTimer({base: base_times, fast: [0.8 * t for t in base_times]})
    records = measure([contender("base", base), contender("fast", fast)], timer)
    assert records["fast"]["ratio"] == pytest.approx(1.25) and records["base"]["ratio"] == 1
    assert records["base"]["rounds"] == 20 and records["base"]["us"] == 150  # without the first round
    assert records["base"]["tflops"] == pytest.approx(1e9 / 150 / 1e6)
    assert records["base"]["bytes"] == 32 and records["base"]["gbps"] == pytest.approx(32 / 150 / 1e3)
    assert records["base"]["percent_of_copy"] == pytest.approx(32 / 150 / 1e3)


def test_without_flops_speed_is_bytes_per_second_of_the_copy() -> None:
    base, half = (lambda: torch.ones(4)), (lambda: torch.ones(4, dtype=torch.bfloat16))
    timer = ScriptedTimer({base: [10.0] * 21, half: [10.0] * 21})
    records = measure([contender("base", base), contender("half", half)], timer, work=None, copy_gbps=None)
    assert records["half"]["ratio"] == pytest.approx(24 / 32)
    assert records["half"]["percent_of_copy"] == pytest.approx(75)
    assert "tflops" not in records["half"]


def test_a_candidate_that_raises_is_recorded_and_the_others_go_on() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image\nat line 3")

    good = lambda: torch.ones(4)  # noqa: E731
    records = measure([contender("base", broken), contender("good", good)], ScriptedTimer({good: [1.0] * 21}))
    assert records["base"] == {"failed": "RuntimeError: no kernel image"}
    assert records["good"]["us"] == 1 and records["good"]["ratio"] is None


def test_wrong_and_unwritten_results_are_marked() -> None:
    kept = torch.ones(4)
    unwritten, far, near = (lambda: kept), (lambda: torch.full((4,), 1.02)), (lambda: torch.full((4,), 1.002))
    runs = {"unwritten": unwritten, "far": far, "near": near}
    timer = ScriptedTimer({run: [1.0] * 21 for run in runs.values()})
    records = measure([contender(name, run) for name, run in runs.items()], timer, base="near")
    assert {name: record["wrong"] for name, record in records.items()} == {
        "unwritten": True,
        "far": True,
        "near": False,
    }
    assert records["unwritten"]["error"] is None and records["far"]["error"] == pytest.approx(0.02, rel=1e-4)


def test_a_candidate_that_accumulates_starts_from_zero() -> None:
    out = torch.zeros(4)
    add = contender("add", lambda: out.add_(1.0))
    candidate = dataclasses.replace(add.prepare(torch.ones(4)), accumulates=True)
    assert candidates.check(candidate)[0] == 0


def test_tuning_has_its_own_budget() -> None:
    run = lambda: torch.ones(4)  # noqa: E731
    slow = contender("slow", run, tunes=True)
    assert "tuning" in measure([slow], ConstantTimer(1.0), seconds=0)["slow"]["failed"]
    assert measure([slow], ConstantTimer(1.0))["slow"]["us"] == 1


def test_slow_shapes_get_the_fewest_rounds() -> None:
    run = lambda: torch.ones(4)  # noqa: E731
    record = measure([contender("base", run)], ConstantTimer(1.0), seconds=0)["base"]
    assert record["rounds"] == MIN_ROUNDS


def test_shapes_past_the_end_of_time_are_named() -> None:
    run = bench.Bench(CPU, ConstantTimer(1.0))
    shapes = gemm_shapes([("8B", 4096)])
    run.measure_gemm(shapes, 0.0, 100.0)
    assert run.gemm == []
    assert run.dropped == {shape.name: "time was up" for shape in shapes}


def test_a_roof_is_bandwidth_then_peak() -> None:
    assert kernel_tables.roofline(10, 1979, 3000) == pytest.approx(30)
    assert kernel_tables.roofline(10_000, 1979, 3000) == 1979
    assert peak_tflops("NVIDIA H100 80GB HBM3") == {"fp8": 1979, "bf16": 989}
    assert peak_tflops("NVIDIA H100 PCIe") == {"fp8": 1513, "bf16": 756}
    assert peak_tflops("NVIDIA GeForce RTX 4090") is None


HOPPER = {"registers": 65536, "shared": 228 * 1024, "warps": 64, "programs": 32}


def test_occupancy_is_that_of_the_scarcest_resource() -> None:
    assert kernel_tables.ctas_per_multiprocessor(128, 0, 8, HOPPER)["fit"] == 2
    assert kernel_tables.ctas_per_multiprocessor(129, 0, 8, HOPPER)["fit"] == 1  # 136 registers are given
    assert kernel_tables.ctas_per_multiprocessor(168, 0, 12, HOPPER)["fit"] == 1
    by_shared = kernel_tables.ctas_per_multiprocessor(32, 113 * 1024, 4, HOPPER)
    assert by_shared == {"by_registers": 16, "by_shared": 2, "by_warps": 16, "fit": 2}
    assert kernel_tables.ctas_per_multiprocessor(16, 0, 1, HOPPER)["by_warps"] == 32


def test_kernels_that_compiled_alike_are_one_row() -> None:
    metadata = SimpleNamespace(name="_gemm_kernel", shared=131072, num_warps=8)
    kernel = SimpleNamespace(n_regs=254, n_spills=0, metadata=metadata)
    (row,) = kernel_tables.resources([("(128,)", kernel), ("(128,)", kernel)], HOPPER)
    assert (row["kernel"], row["registers"], row["shared_bytes"], row["warps"]) == ("_gemm_kernel", 254, 131072, 8)
    assert row["programs_per_multiprocessor"]["fit"] == 1


@pytest.fixture(scope="module")
def result() -> dict:
    """A whole run, small, on the CPU, where our kernels are the reference and what needs a GPU fails."""
    torch.manual_seed(0)
    return bench.bench(
        ConstantTimer(50.0),
        CPU,
        suite="tiny",
        sections=["gemm", "quantize", "host"],
        gemms=[Shape(FORWARD, 256, 128, 384, ("tiny y",)), Shape(WGRAD, 128, 384, 256, ("tiny dw",))],
        quantized=[Shape("x", 256, 0, 384, ("tiny x",)), Shape("w", 128, 0, 384, ("tiny w",))],
        seconds=60,
        copied=(64, 64),
        host_size=128,
        host_calls=5,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "host", "--shapes", "8B wq"], "--shapes: host times are taken on one small shape"),
        (["--candidates", "deepgemm"], "invalid choice: 'deepgemm'"),
        (["--shapes", "8B wx"], "--shapes 8B wx: no shape of suite quick has any of these"),
        (["--seconds", "-5"], "--seconds: -5: must be more than 0"),
        (["--seconds", "nan"], "--seconds: nan: must be more than 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert words in capsys.readouterr().err


def test_a_run_measures_what_is_here_and_names_what_is_not(result: dict) -> None:
    assert set(result["peers"]) | set(result["absent"]) == set(PEERS)
    for kind, gemm in zip((FORWARD, WGRAD), result["gemm"], strict=True):
        assert gemm["kind"] == kind and gemm["flops"] == 2 * gemm["M"] * gemm["N"] * gemm["K"]
        assert gemm["candidates"]["bf16"]["us"] == 50 and not gemm["candidates"]["bf16"]["wrong"]
        assert 'gemm_backend = "cublas"' in gemm["candidates"][BASE]["failed"]
        assert not {c.name for c in candidates.GEMMS if c.peer in result["absent"]} & set(gemm["candidates"])
    x, w = (record["candidates"] for record in result["quantize"])
    assert {COPY, "quantize_1x128", "quantize_1x128_both"} <= set(x)
    assert {COPY, "quantize_128x128", "transpose_fp8"} <= set(w)
    assert not any(c["wrong"] for c in (*x.values(), *w.values()))
    assert x["quantize_1x128"]["ratio"] == pytest.approx(x["quantize_1x128"]["bytes"] / x[COPY]["bytes"])
    assert result["host_us"]["quantize"]["quantize_1x128"] > 0
    assert not result["interrupted"]
    assert any(name.startswith(f"host {BASE}") for name in result["dropped"])


def test_only_those_asked_for_and_the_bases_take_part() -> None:
    run = bench.Bench(CPU, ConstantTimer(1.0), only=["ours", "quantize_1x128"])
    assert [c.name for c in run.contenders(candidates.GEMMS, FORWARD)] == [OURS, BASE]
    assert [c.name for c in run.contenders(candidates.QUANTIZERS, "x")] == [COPY, "quantize_1x128"]
    assert len(gemm_shapes(SUITES["llama"])) == 36


def test_results_are_saved_as_they_come_and_an_interrupt_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(x: torch.Tensor) -> Candidate:
        if x.shape[0] == 32:
            raise KeyboardInterrupt
        return Candidate(lambda: x.clone(), (x,), lambda out: 0.0, 1.0)

    saved: list[dict] = []
    copies = (Contender(COPY, candidates._copy, ("x",)), Contender("other", interrupt, ("x",)))
    monkeypatch.setattr(bench, "QUANTIZERS", copies)
    result = bench.bench(
        ConstantTimer(1.0),
        CPU,
        suite="tiny",
        sections=["quantize"],
        gemms=[],
        quantized=[Shape("x", rows, 0, 16, (f"{rows} rows",)) for rows in (16, 32, 64)],  # the second comes last
        seconds=60,
        copied=(64, 64),
        save=lambda partial: saved.append(json.loads(json.dumps(partial))),
    )
    assert [[record["shape"] for record in partial["quantize"]] for partial in saved] == [
        ["16 rows"],
        ["16 rows", "64 rows"],
    ]
    assert result["interrupted"] and [record["shape"] for record in result["quantize"]] == ["16 rows", "64 rows"]
    assert "not finished" in kernel_tables.report(result) and "not finished" in kernel_tables.report(saved[0])


@pytest.mark.parametrize("kind", [FORWARD, WGRAD])
@pytest.mark.parametrize("version", ["fp8_gemm_nt", "older names"])
def test_deep_gemm_gets_its_operands_under_both_its_names(
    version: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with DeepGEMM's signatures, computing by our reference."""

    def forward(lhs: tuple, rhs: tuple, out: torch.Tensor) -> None:
        assert out.dtype == torch.bfloat16 and lhs[1].stride(0) == 1 and rhs[1].is_contiguous()
        out.copy_(reference.gemm_1x128_128x128(*lhs, *rhs, torch.float32))

    def wgrad(lhs: tuple, rhs: tuple, out: torch.Tensor) -> None:
        assert out.dtype == torch.float32 and lhs[1].stride(0) == rhs[1].stride(0) == 1
        out.add_(reference.gemm_1x128_1x128(*lhs, *rhs, torch.float32))

    def fp8_gemm_nt(a, b, d, c=None, recipe=None, compiled_dims="nk", disable_ue8m0_cast=False) -> None:
        if recipe == (1, 1, 128):
            assert c is d
            wgrad(a, b, d)
        else:
            assert c is None and recipe is None
            forward(a, b, d)

    older = {"gemm_fp8_fp8_bf16_nt": forward, "wgrad_gemm_fp8_fp8_fp32_nt": wgrad}
    stand_in = SimpleNamespace(**({"fp8_gemm_nt": fp8_gemm_nt} if version == "fp8_gemm_nt" else older))
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    operands = candidates.GemmOperands(Shape(kind, 256, 128, 384, ("tiny",)), CPU)
    error, _ = candidates.check(candidates._deep_gemm(operands))
    assert error <= candidates.GEMM_BOUND


def test_the_error_of_a_blockwise_gemm_is_that_of_rounding_its_result() -> None:
    for kind in (FORWARD, WGRAD):
        operands = candidates.GemmOperands(Shape(kind, 4096 + 128, 128, 256, ("tiny",)), CPU)
        multiply = reference.gemm_1x128_128x128 if kind == FORWARD else reference.gemm_1x128_1x128
        right = multiply(*operands.blockwise, torch.bfloat16)
        error = operands.blockwise_candidate(lambda out=right: out).error
        assert 1e-3 < error(right) < 3e-3
        right[-1, -1] = math.nan
        assert math.isnan(error(right))


def test_a_result_survives_json_and_renders(result: dict, tmp_path: Path) -> None:
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again["commit"] == result["commit"] and again["versions"]["torch"]
    text = kernel_tables.report(again)
    for name in (*PEERS, "tiny y", "tiny dw", "tiny x", "tiny w", "bf16", "quantize_1x128_both"):
        assert name in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 10 and all(len({re.sub(r"\\\|", "", row).count("|") for row in t}) == 1 for t in tables)
    kernel_plots.plot(again, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_summary_has_means_worst_shapes_and_wrong_results() -> None:
    def record(shape: str, ours: float, wrong: bool = False) -> dict:
        us = {"us": 1.0, "wrong": False}
        candidates = {
            OURS: us | {"ratio": ours, "wrong": wrong},
            BASE: us | {"ratio": 1.0},
            "torchao": {"failed": "no"},
        }
        return {"kind": FORWARD, "shape": shape, "candidates": candidates}

    summary = kernel_tables.summarise([record("a", 2.0), record("b", 0.5, wrong=True)])
    ours = summary[FORWARD][OURS]
    assert ours["ratio"] == pytest.approx(1.0) and (ours["worst_shape"], ours["worst_ratio"]) == ("b", 0.5)
    assert ours["shapes"] == 2 and summary[FORWARD]["torchao"] == {"shapes": 0, "wrong": []}
    assert bench.wrong_results(summary) == ["ours, b"]
    assert f"| {OURS} | 2 | 1.000 | 0.500 (b) | 1 |" in kernel_tables.summary_table(summary)


def test_without_a_gpu_the_script_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_filter_that_fits_nothing_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "9B"])
    assert "9B" in capsys.readouterr().err
