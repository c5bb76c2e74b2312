"""Who computes: which backend a device can run, and which one "auto" takes. The one place that chooses."""

import logging
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ..recipe import GemmBackend
from .layouts import WIDEST
from .library import check_choice

ResolvedBackend = Literal["triton", "cublas", "reference"]
QuantizeBackend = Literal["auto", "reference"]
GemmKind = Literal["1x128_128x128", "1x128_1x128"]
_Y_AND_DX, _DW = get_args(GemmKind)

FASTER_ON_HOPPER: dict[GemmKind, ResolvedBackend] = {_Y_AND_DX: "triton", _DW: "triton"}
"""What "auto" takes on Hopper: the faster by scripts/results/bench_kernels_llama.json (1.099 and 1.042 of cuBLASLt there)."""


_logger = logging.getLogger(__name__)
_told: set[str] = set()
"""Kinds of devices of which somebody has been told who multiplies there."""


@cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None where they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it needs a CUDA GPU of compute capability 8.9 or higher, the device is {device.type}"
    if torch.version.hip:
        return "it needs NVIDIA's e4m3fn, the device is an AMD GPU"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        return (
            f"it needs compute capability 8.9 or higher, {torch.cuda.get_device_name(device)} has {_dotted(capability)}"
        )
    return None


@cache
def cublas_obstacle(device: torch.device) -> str | None:
    """Why cuBLASLt's blockwise GEMM cannot run on this device; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f"it needs an NVIDIA Hopper GPU, the device is {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return (
            f"it needs an NVIDIA Hopper GPU (compute capability 9.0), {torch.cuda.get_device_name(device)} "
            f"has {_dotted(capability)}"
        )
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"it needs torch.nn.functional.scaled_mm (torch 2.10 or newer), this is torch {torch.__version__}"
    if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"it needs CUDA 12.9 or newer, torch was built with {torch.version.cuda}"
    return None


@cache
def is_datacenter(device: torch.device) -> bool:
    """Hopper and datacenter Blackwell: 227 KiB of shared memory for a block where other GPUs have 99."""
    return torch.cuda.get_device_properties(device).major in (9, 10)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels written for Hopper run: they use its own matrix and copy instructions."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def suits_both_hopper(padded: bool, x: Tensor, *others: Tensor) -> bool:
    """Whether `kernels.both_hopper` takes these operands: on Hopper, x in bf16, M a multiple of 16, and rows where loads of 16 bytes
    are compiled: they begin at multiples of 16 bytes, and strides are multiples of 16.

    Args:
        padded: whether rows of the transposed payload are longer than M.
    """
    # In a tile the kernels count in 32 bits: columns of the transposed payload are M apart.
    if padded or x.dtype != torch.bfloat16 or x.shape[0] > WIDEST or not is_hopper(x.device):
        return False
    return all(y.data_ptr() % 16 == 0 and y.stride()[0] % 16 == 0 for y in (x, *others))


@cache
def resolve_gemm_backend(requested: GemmBackend, device: torch.device, kind: GemmKind) -> ResolvedBackend:
    """The backend that multiplies on this device; the first choice of "auto" is logged, unless `describe_gemm_backend` was asked before.

    Under "auto": the faster of cuBLASLt and Triton on Hopper, Triton on other GPUs that have e4m3, the reference elsewhere.
    Sizes that cuBLASLt does not take (see `ops.gemm`) go to Triton under "auto".

    Raises:
        ValueError: there is no such backend, or the device cannot run it.
    """
    check_choice("gemm_backend", requested, get_args(GemmBackend))
    obstacles = {"cublas": cublas_obstacle(device), "triton": triton_obstacle(device), "reference": None}
    if requested == "auto":
        candidates = [FASTER_ON_HOPPER[kind]] if obstacles["cublas"] is None else ["triton", "reference"]
        chosen = next(name for name in candidates if obstacles[name] is None)
        if device.type not in _told:
            _logger.info(f"blockwise-fp8 GEMM backend: {describe_gemm_backend(requested, device)}")
        return chosen
    if obstacle := obstacles[requested]:
        raise ValueError(f'gemm_backend = "{requested}": {obstacle}; use "auto" or "reference"')
    return requested


def resolve_quantize_backend(device: torch.device) -> Literal["triton", "reference"]:
    """The backend that quantises on this device: Triton wherever it runs."""
    return "triton" if triton_obstacle(device) is None else "reference"


def use_reference(x: Tensor, backend: QuantizeBackend) -> bool:
    """Whether a quantising op takes plain PyTorch for this CUDA tensor."""
    return backend == "reference" or resolve_quantize_backend(x.device) == "reference"


def describe_gemm_backend(requested: GemmBackend, device: torch.device) -> str:
    """One line for a log: which backend multiplies on this device, and why.

    Raises:
        ValueError: as `resolve_gemm_backend`.
    """
    _told.add(device.type)
    backends = {kind: resolve_gemm_backend(requested, device, kind) for kind in get_args(GemmKind)}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    why = "chosen by auto" if requested == "auto" else "as configured"
    if "reference" in backends.values():
        why += " (plain PyTorch: exact numerics, no speed)"
    if len(set(backends.values())) == 1:
        return f"{backends[_Y_AND_DX]} on {where}, {why}"
    return f"{backends[_Y_AND_DX]} for y and dx, {backends[_DW]} for dw on {where}, {why}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
