"""The benchmark of the producers, with a clock in place of CUDA events."""

import json

import bench_producers as bench
import pytest
import torch
from measure import Pace
from shapes import SUITES, Shape

CPU = torch.device("cpu")


class ConstantTimer:
    def pace(self, run) -> Pace:
        return Pace(1, 0.0)

    def sample(self, run, pace) -> float:
        return 10.0

    def synchronize(self) -> None:
        pass


@pytest.fixture(scope="module")
def result():
    measured = [Shape(name, 48, 0, 48, (name,)) for name in bench.SUBJECTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)  # which takes 20 s
        return bench.bench(ConstantTimer(), CPU, measured, 60, copied=(32, 32))


def test_all_candidates_run_and_are_right(result) -> None:
    assert not result["dropped"] and len(result["records"]) == len(bench.SUBJECTS)
    for record in result["records"]:
        for name, candidate in record["candidates"].items():
            assert candidate.get("wrong") is False, (record["shape"], name, candidate)


def test_intermediate_tensors_count_twice(result) -> None:
    candidates = {record["shape"]: record["candidates"] for record in result["records"]}
    size = 48 * 48
    for name, inputs, reads, between, payloads in (
        ("rms_norm rows", 1, 1, 1, 1),
        ("rms_norm both", 1, 2, 1, 2),
        ("swiglu both", 2, 2, 1, 2),
        ("swiglu_backward both", 3, 3, 2, 4),
        ("swiglu_backward both, h columns", 3, 3, 3, 5),
        ("swiglu rows, inputs in fp8", 2, 2, 2, 3),  # of the inputs each is read once again
        ("swiglu_backward both, h columns, of inputs in fp8", 2, 2, 3, 5),  # two payloads are as long as one input
    ):
        fused, pair = candidates[name]["fused"]["bytes"], candidates[name]["pair"]["bytes"]
        small = 4 * 48 * (payloads + 2)  # multipliers, weight, rstd
        assert 0 < fused - size * (2 * reads + payloads) <= small
        assert 0 < pair - size * (2 * inputs + 4 * between + payloads) <= small

    blocks = candidates["quantize_128x128_both"]
    assert blocks["pair"]["bytes"] - blocks["fused"]["bytes"] == size  # the payload, read to be transposed


def test_time_saved_is_compared_with_bytes_saved(result) -> None:
    for record in result["records"]:
        # At equal times nothing of the bytes saved shows.
        assert record["time_ratio"] == pytest.approx(1)
        assert record["time_per_bytes_ratio"] == pytest.approx(1 / record["bytes_ratio"])


def test_report_names_what_misses_the_goal_and_what_is_wrong(result) -> None:
    text = bench.report(result)
    assert "above the goal" in text and "WRONG" not in text
    changed = json.loads(json.dumps(result, allow_nan=False))
    changed["records"][0]["candidates"]["pair"]["wrong"] = True
    assert "WRONG: pair" in bench.report(changed)


@pytest.mark.parametrize("suite", SUITES)
def test_shapes_have_one_name_each(suite: str) -> None:
    shapes = bench.shapes(SUITES[suite])
    assert {shape.kind for shape in shapes} == set(bench.SUBJECTS)
    assert len({shape.name for shape in shapes}) == len(shapes) == len({(s.kind, s.M, s.K) for s in shapes})


def test_without_a_gpu_it_says_so(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench.main([]) == 2
    assert "bench_producers.py times GPU kernels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--ops", "gelu"])
    assert "--ops gelu: none of rms_norm rows" in capsys.readouterr().err
