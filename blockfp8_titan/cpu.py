"""Run torchtitan's trainer on a machine without an accelerator.

``experimental.custom_import = "blockfp8_titan.cpu"`` stands for ``"blockfp8_titan"`` and, where ``torch.accelerator`` finds nothing,
also points torchtitan at the CPU and Gloo: plain ``torchrun -m torchtitan.train`` then trains there, with one process or more, FSDP2 or
DDP. With an accelerator it changes nothing, so one job config serves both kinds of machine.

torchtitan 0.2.2 copies its device into each module that uses it, takes "cuda" where it finds no accelerator, and asks the device for
memory statistics that `torch.cpu` does not have: `use_cpu` mends these. On a processor without bf16 instructions it also makes bf16
products ten times faster, in fp32 inside.
"""

import functools
import math
import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtitan.components import metrics
from torchtitan.config import Comm
from torchtitan.distributed import parallel_dims
from torchtitan.distributed import utils as distributed_utils
from torchtitan.tools import profiling
from torchtitan.tools import utils as tools_utils

from .environment import processor_name

# A registration ends with its library object.
ATEN = torch.library.Library("aten", "IMPL")


class CPUDevice:
    """What torchtitan asks of a device module such as `torch.cuda`, answered for this process and its host."""

    @staticmethod
    def set_device(device: torch.device) -> None:
        """All processes share the one CPU device: there is nothing to choose."""

    @staticmethod
    def current_device() -> int:
        """An index, which torchtitan's barrier needs and `torch.cpu.current_device` does not give."""
        return 0

    @staticmethod
    def synchronize() -> None:
        """CPU kernels have finished when they return."""

    @staticmethod
    def empty_cache() -> None:
        """The allocator keeps no cache of its own."""

    @staticmethod
    def get_device_name(device: torch.device) -> str:
        return processor_name()

    @staticmethod
    def get_device_properties(device: torch.device) -> SimpleNamespace:
        """`total_memory`: the host's physical memory in bytes, shared by all processes on it."""
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @staticmethod
    def memory_stats(device: torch.device) -> dict[str, int]:
        """This process's peak resident set in bytes, code and libraries included, under both names that torchtitan reads."""
        peak = peak_resident_set()
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    @staticmethod
    def reset_peak_memory_stats() -> None:
        reset_peak_resident_set()


def peak_resident_set() -> int:
    """Peak resident set of this process in bytes, since `reset_peak_resident_set` where Linux can reset it, else since its start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_resident_set() -> None:
    """Let the peak start again from the present resident set; does nothing where the system does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def no_peak_flops(device_name: str) -> float:
    """No peak is known for a CPU. torchtitan would take an A100's; NaN makes the MFU it logs NaN instead of wrong."""
    return math.nan


def sum_then_divide(
    set_gradient_divide_factor: Callable[[FSDPModule, float], None],
) -> Callable[[FSDPModule, float], None]:
    """Wrap FSDP2's setter so that gradients are reduced by a plain sum: Gloo cannot scale while it sums (PREMUL_SUM)."""

    @functools.wraps(set_gradient_divide_factor)
    def wrapper(self: FSDPModule, factor: float) -> None:
        set_gradient_divide_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    return wrapper


def refuse_offload(init_distributed: Callable[..., int]) -> Callable[..., int]:
    """Wrap torchtitan's `init_distributed`, which is asked for a second, CPU backend just where parameters are offloaded."""

    @functools.wraps(init_distributed)
    def wrapper(comm_config: Comm, enable_cpu_backend: bool = False, **kwargs) -> int:
        if enable_cpu_backend:
            raise ValueError(
                "training.enable_cpu_offload = true: there is no accelerator here to offload parameters from; set it to false"
            )
        return init_distributed(comm_config, **kwargs)

    return wrapper


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this processor (AVX-512, AMX, bf16 on Arm); ATen's own loops are slow."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_fp32(name: str) -> Callable[..., Tensor]:
    """An ATen product's CPU kernel that multiplies bf16 operands in fp32 and rounds the result once, to bf16.

    That is what a bf16 product with fp32 accumulation computes. Other dtypes go to the kernel that `name` has now.

    Args:
        name: such as "mm" or, writing to `out`, "mm.out".
    """
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    product = getattr(torch, name.removesuffix(".out"))

    def in_fp32_if_bf16(keyset: torch.DispatchKeySet, *args, **kwargs) -> Tensor:
        if args[0].dtype != torch.bfloat16:
            return kernel.call_boxed(keyset, *args, **kwargs)
        out = kwargs.pop("out", None)
        result = product(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args), **kwargs).bfloat16()
        return result if out is None else out.resize_(result.shape).copy_(result)

    return in_fp32_if_bf16


def multiply_bf16_in_fp32() -> None:
    """Replace ATen's bf16 matrix products on the CPU by fp32 ones, for as long as the process lives."""
    with warnings.catch_warnings():
        # Replacing kernels is the intention here.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            # Compiled code calls the second.
            for overload in (name, f"{name}.out"):
                ATEN.impl(overload, in_fp32(overload), "CPU", with_keyset=True)


def use_cpu() -> None:
    """Point torchtitan's trainer at the CPU where there is no accelerator; a second call changes nothing."""
    if torch.accelerator.is_available() or tools_utils.device_type == "cpu":
        return
    for module in (tools_utils, distributed_utils, parallel_dims, metrics, profiling):
        module.device_type = "cpu"
        module.device_module = CPUDevice
    tools_utils.get_peak_flops = no_peak_flops
    FSDPModule.set_gradient_divide_factor = sum_then_divide(FSDPModule.set_gradient_divide_factor)
    distributed_utils.init_distributed = refuse_offload(distributed_utils.init_distributed)
    if not has_bf16_products():
        multiply_bf16_in_fp32()


use_cpu()
