import pytest
import torch

from blockfp8_titan.ops import backend
from blockfp8_titan.ops.backend import (
    FASTER_ON_HOPPER,
    describe_gemm_backend,
    resolve_gemm_backend,
    resolve_quantize_backend,
)

Y_AND_DX, DW = "1x128_128x128", "1x128_1x128"
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that cuda:0 has a given compute capability."""

    def forget():
        for answer in (backend.triton_obstacle, backend.cublas_obstacle, backend.resolve_gemm_backend):
            answer.cache_clear()

    def pretend(capability, cuda="13.0", hip=None):
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

    yield pretend
    forget()


@pytest.mark.parametrize(
    "capability, y_and_dx, dw, quantize",
    [
        ((8, 0), "reference", "reference", "reference"),
        ((8, 9), "triton", "triton", "triton"),
        ((9, 0), *FASTER_ON_HOPPER.values(), "triton"),
        ((10, 0), "triton", "triton", "triton"),
        ((12, 0), "triton", "triton", "triton"),
    ],
)
def test_auto_by_capability(gpu, capability, y_and_dx, dw, quantize):
    gpu(capability)
    assert resolve_gemm_backend("auto", GPU, Y_AND_DX) == y_and_dx
    assert resolve_gemm_backend("auto", GPU, DW) == dw
    assert resolve_quantize_backend(GPU) == quantize


def test_auto_on_cpu_is_the_reference():
    assert resolve_gemm_backend("auto", CPU, Y_AND_DX) == "reference"
    assert resolve_quantize_backend(CPU) == "reference"


def test_old_cuda_has_no_blockwise_cublas(gpu):
    gpu((9, 0), cuda="12.8")
    assert resolve_gemm_backend("auto", GPU, Y_AND_DX) == "triton"
    with pytest.raises(ValueError, match=r"needs CUDA 12\.9 or newer, torch was built with 12\.8"):
        resolve_gemm_backend("cublas", GPU, Y_AND_DX)


def test_amd_runs_the_reference(gpu):
    gpu((9, 4), hip="6.4")
    assert resolve_gemm_backend("auto", GPU, Y_AND_DX) == "reference"
    with pytest.raises(ValueError, match="AMD GPU"):
        resolve_gemm_backend("triton", GPU, Y_AND_DX)


def test_forcing_what_the_device_lacks_says_what_it_lacks(gpu):
    with pytest.raises(
        ValueError,
        match=r'gemm_backend = "triton": it needs a CUDA GPU of compute capability 8\.9 or higher, the device is cpu; use "auto"',
    ):
        resolve_gemm_backend("triton", CPU, Y_AND_DX)
    gpu((8, 0))
    with pytest.raises(ValueError, match=r"Test GPU has 8\.0"):
        resolve_gemm_backend("triton", GPU, Y_AND_DX)
    gpu((10, 0))
    with pytest.raises(ValueError, match=r"needs an NVIDIA Hopper GPU \(compute capability 9\.0\), Test GPU has 10\.0"):
        resolve_gemm_backend("cublas", GPU, Y_AND_DX)


def test_description_names_backend_device_and_reason(gpu):
    assert (
        describe_gemm_backend("auto", CPU)
        == "reference on cpu, chosen by auto (plain PyTorch: exact numerics, no speed)"
    )
    gpu((9, 0))
    assert describe_gemm_backend("triton", GPU) == "triton on Test GPU, as configured"
    assert describe_gemm_backend("auto", GPU) == "triton on Test GPU, chosen by auto"


def test_description_names_both_backends_where_they_differ(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(backend, "FASTER_ON_HOPPER", {Y_AND_DX: "cublas", DW: "triton"})
    assert describe_gemm_backend("auto", GPU) == "cublas for y and dx, triton for dw on Test GPU, chosen by auto"


def test_what_auto_takes_is_logged_once_where_nobody_was_told(gpu, monkeypatch, caplog):
    gpu((9, 0))
    monkeypatch.setattr(backend, "_told", set())
    with caplog.at_level("INFO", logger="blockfp8_titan"):
        for kind in (Y_AND_DX, DW):
            resolve_gemm_backend("auto", GPU, kind)
        resolve_gemm_backend("triton", GPU, DW)
    assert caplog.messages == ["blockwise-fp8 GEMM backend: triton on Test GPU, chosen by auto"]
    caplog.clear()
    with caplog.at_level("INFO", logger="blockfp8_titan"):
        describe_gemm_backend("auto", CPU)
        resolve_gemm_backend("auto", CPU, DW)
    assert not caplog.messages
