"""scripts/bench_gather.py: what it reads out of a profile."""

import json

import bench_gather
import launch
import pytest


def kernel(name, start, duration):
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration}


def test_a_profile_is_read(tmp_path):
    path = tmp_path / "trace.json"
    events = [
        kernel("ncclDevKernel_AllGather_RING_LL(args)", 0, 4000),
        kernel("_quantize_rows_kernel", 1000, 500),
        kernel("gemm", 3000, 2000),
        kernel("ncclDevKernel_AllReduce_Max_i32_RING", 6000, 250),
        kernel("_amax_128x128_kernel", 5000, 750),
        {"cat": "cpu_op", "name": "AllGather", "ts": 0, "dur": 99999},
        {"name": "no category"},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    assert bench_gather.read_profile(path) == pytest.approx(
        {
            "all_gather": 4.0,
            "all_gather_exposed": 2.5,
            "reduce_scatter": 0.0,
            "amax": 0.75,
            "amax_all_reduce": 0.25,
            "cast": 0.5,
            "quantize_gathered": 0.0,
        }
    )


def test_steps_near_a_profile_do_not_count():
    slow = {1, 2, 6, 7, 8, 9, 10, 11, 12}
    steps = [launch.Step(n, 1.0, 1.0, 1.0, 100.0 if n in slow else 1000.0) for n in range(1, 21)]
    assert bench_gather.step_ms(steps, 8192) == pytest.approx(8192.0)


def test_one_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_gather.main(["debug", "--nproc", "1"])
    assert "nothing is gathered with fewer than two GPUs" in capsys.readouterr().err
