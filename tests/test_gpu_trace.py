"""Reading traces: synthetic events in the form that torch.profiler exports."""

import gzip
import json
from pathlib import Path
from typing import Any

import gpu_trace
import pytest
from gpu_trace import Kernel, Trace


def event(name: str, start: float, us: float, cat: str = "kernel", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": us, "pid": 0, "tid": 7, "args": args}


def op(name: str, number: int) -> dict[str, Any]:
    return event(name, 0, 1, "cpu_op", **{"External id": number})


@pytest.mark.parametrize(
    ("launched_by", "name", "group"),
    [
        (
            "nccl:_all_gather_base",
            "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "NCCL all-gather",
        ),
        ("", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgs)", "NCCL reduce-scatter"),
        ("", "ncclDevKernel_AllReduce_Max_f32_RING_LL(ncclDevKernelArgs)", "NCCL all-reduce"),
        ("", "ncclDevKernel_SendRecv(ncclDevKernelArgs)", "NCCL other"),
        ("aten::_scaled_mm", "nvjet_qqtst_128x256_128x6_2x1_v_bz_TNT", "fp8 GEMM"),
        ("aten::_scaled_mm", "void cutlass::device_kernel<at::cuda::enable_3x_kernel_for_sm9x<...>>", "fp8 GEMM"),
        ("blockfp8::gemm_1x128_1x128", "_gemm_hopper_kernel", "fp8 GEMM"),
        ("", "_gemm_kernel", "fp8 GEMM"),
        ("", "triton_fp8_gemm_1x128_128x128_kernel", "fp8 GEMM"),
        ("aten::mm", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "bf16 GEMM"),
        ("", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_kernel__5x_cublas", "bf16 GEMM"),
        ("blockfp8::quantize_1x128_both", "_quantize_1x128_both_kernel", "quantise"),
        ("blockfp8::transpose_fp8", "_transpose_kernel", "quantise"),
        ("", "_quantize_swiglu_gradients_kernel", "quantise"),
        ("", "_rms_norm_rstd_kernel", "quantise"),
        ("", "triton_fp8_blockwise_act_quant_lhs_kernel", "quantise"),
        (
            "aten::_scaled_dot_product_cudnn_attention",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma",
            "attention",
        ),
        ("triton_poi_fused__scaled_mm_clone_2", "triton_poi_fused__scaled_mm_clone_2", "inductor"),
        (
            "aten::_fused_adamw_",
            "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>(...)",
            "optimizer and norm",
        ),
        ("aten::_foreach_copy_", "void at::native::multi_tensor_apply_kernel<CopyFunctor>(...)", "copies and casts"),
        ("fsdp::chunk_cat", "void at::native::chunk_cat_cuda_kernel<float>(...)", "copies and casts"),
        ("", "Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("aten::embedding", "void at::native::vectorized_gather_kernel<16>(...)", "other"),
    ],
)
def test_kernels_are_grouped_by_op_and_name(launched_by: str, name: str, group: str) -> None:
    assert Kernel(name, launched_by, 0, 1).group == group


def test_a_label_has_no_template_arguments() -> None:
    name = "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(char*, char*)"
    assert Kernel(name, "", 0, 1).label == "at::native::vectorized_gather_kernel"


def test_overlaps_count_once() -> None:
    assert gpu_trace.union([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert gpu_trace.length([(0, 2), (1, 3), (10, 11)]) == 4
    assert gpu_trace.length([]) == 0


def test_every_moment_of_the_window_is_one_thing() -> None:
    kernels = (
        Kernel("_gemm_kernel", "", 10, 30),
        Kernel("ncclDevKernel_AllGather_RING_LL", "", 20, 50),  # 20 exposed, 5 of them under a copy
        Kernel("Memcpy DtoD", "", 45, 60),  # 10 exposed
        Kernel("nvjet_tst", "", 70, 80),
    )
    parts = gpu_trace.timeline(Trace(kernels, (0, 100)))
    assert parts == {"compute": 30, "exposed communication": 20, "exposed copies": 10, "idle": 40}


EVENTS = [
    event("ProfilerStep#8", 0, 50, "user_annotation"),
    event("ProfilerStep#9", 100, 100, "user_annotation"),
    op("aten::mm", 1),
    op("blockfp8::gemm_1x128_128x128", 2),
    event("nvjet_tst", 20, 5, **{"External id": 1}),  # of the step before
    event("nvjet_tst", 110, 30, **{"External id": 1}),
    event("_gemm_hopper_kernel", 140, 20, **{"External id": 2}),
    event("_gemm_hopper_kernel", 165, 25, **{"External id": 2}),
    event("Memset (Device)", 198, 4, "gpu_memset"),  # ends after the host's step
    {"ph": "i", "cat": "kernel", "name": "no duration", "ts": 150},
]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_last_step_is_summed_up(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    data = json.dumps({"traceEvents": EVENTS}).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    trace = gpu_trace.read_trace(path)
    assert trace.window == (100, 202)
    summary = json.loads(json.dumps(gpu_trace.summarise(trace)))
    assert summary["launches"] == 4 and summary["window_ms"] == pytest.approx(0.102)
    assert list(summary["groups"]) == ["fp8 GEMM", "bf16 GEMM", "copies and casts"]
    assert summary["groups"]["fp8 GEMM"] == {"calls": 2, "ms": 0.045, "share": pytest.approx(45 / 102)}
    assert summary["timeline_ms"]["idle"] == pytest.approx((102 - 75 - 4) / 1e3)
    assert summary["kernels"][0]["op"] == "blockfp8::gemm_1x128_128x128" and summary["kernels"][0]["calls"] == 2
    assert summary["idle"] == [
        {"before": "nvjet_tst", "gaps": 1, "ms": 0.01, "longest_ms": 0.01},
        {"before": "Memset", "gaps": 1, "ms": 0.008, "longest_ms": 0.008},
        {"before": "_gemm_hopper_kernel", "gaps": 1, "ms": 0.005, "longest_ms": 0.005},
    ]
    assert sum(wait["ms"] for wait in summary["idle"]) == pytest.approx(summary["timeline_ms"]["idle"])


def test_the_end_of_a_step_can_be_idle() -> None:
    kernels = (Kernel("long", "", 0, 50), Kernel("inside", "", 10, 20), Kernel("next", "", 55, 60))
    assert gpu_trace.gaps(Trace(kernels, (0, 100))) == [(40, "end of the step"), (5, "next")]


def test_without_steps_the_window_is_that_of_the_kernels() -> None:
    trace = gpu_trace.trace_of([event("a", 5, 5), event("b", 20, 5)], "here")
    assert trace.window == (5, 25)


def test_a_trace_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trace\.json: no kernel ran on a GPU"):
        gpu_trace.trace_of([op("aten::mm", 1)], "trace.json")
