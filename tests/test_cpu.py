"""The trainer's device without an accelerator. Each import happens in a process of its own, since it changes torchtitan."""

import json
import os
import subprocess
import sys

import pytest

IMPORT = """
import importlib, json, math, sys, types, warnings
warnings.simplefilter("error", UserWarning)
import torch
from torch.distributed.fsdp import FSDPModule
from torchtitan.components import metrics
from torchtitan.distributed import parallel_dims, utils as distributed_utils
from torchtitan.tools import profiling, utils as tools_utils
modules = [tools_utils, distributed_utils, parallel_dims, metrics, profiling]
setter = FSDPModule.set_gradient_divide_factor
"""

WITHOUT_ACCELERATOR = """
a, b, c = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((48, 80), (80, 32), (48, 32)))
batched = torch.randn(3, 48, 80, dtype=torch.bfloat16), torch.randn(3, 80, 32, dtype=torch.bfloat16)
import blockfp8_titan.cpu as cpu
rebound = [getattr(module, "device_module", None) for module in modules]
wrapped = FSDPModule.set_gradient_divide_factor
importlib.reload(cpu)
once = FSDPModule.set_gradient_divide_factor is wrapped and tools_utils.device_module is rebound[0]

monitor = metrics.build_device_memory_monitor()
before = monitor.get_peak_stats().max_active_gib
block = torch.ones(300 * 2**20, dtype=torch.uint8)
with_block = monitor.get_peak_stats().max_active_gib
del block
monitor.reset_peak_stats()
after = monitor.get_peak_stats().max_active_gib

cpu.multiply_bf16_in_fp32()  # also where the processor has bf16 instructions
out = torch.empty(0, dtype=torch.bfloat16)
torch.mm(a, b, out=out)
exact = (a.double() @ b.double()).to(torch.bfloat16)
try:
    distributed_utils.init_distributed(None, enable_cpu_backend=True)
except ValueError as error:
    refusal = str(error)

print(json.dumps({
    "types": [module.device_type for module in modules if hasattr(module, "device_type")],
    "modules": [module is not None and module.current_device() == 0 for module in rebound],
    "once": once,
    "peaks": [before, with_block, after],
    "name": monitor.device_name,
    "capacity": monitor.device_capacity_gib,
    "peak flops": str(tools_utils.get_peak_flops(monitor.device_name)),
    "refusal": refusal,
    "mm": torch.equal(a @ b, (a.float() @ b.float()).bfloat16()) and torch.equal(a @ b, out),
    "exact": ((a @ b) == exact).float().mean().item(),
    "addmm": torch.equal(torch.addmm(c, a, b, beta=0.5), torch.addmm(c.float(), a.float(), b.float(), beta=0.5).bfloat16()),
    "bmm": torch.equal(torch.bmm(*batched), torch.bmm(*(t.float() for t in batched)).bfloat16()),
    "fp32 stays": (a.float() @ b.float()).dtype == torch.float32,
    "fp32 out": torch.equal(torch.mm(a.float(), b.float(), out=torch.empty(48, 32)), a.float() @ b.float()),
}))
"""

WITH_ACCELERATOR = """
before = [(module.__dict__.get("device_type"), module.__dict__.get("device_module")) for module in modules]
flops = tools_utils.get_peak_flops
torch.accelerator.is_available = lambda: True
import blockfp8_titan.cpu
print(json.dumps({
    "devices": before == [(module.__dict__.get("device_type"), module.__dict__.get("device_module")) for module in modules],
    "setter": FSDPModule.set_gradient_divide_factor is setter,
    "flops": tools_utils.get_peak_flops is flops,
}))
"""


def run(script: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT + script],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen() -> dict:
    return run(WITHOUT_ACCELERATOR)


def test_torchtitan_is_pointed_at_the_cpu_everywhere(seen: dict) -> None:
    assert set(seen["types"]) == {"cpu"}
    assert all(seen["modules"])


def test_a_second_import_changes_nothing(seen: dict) -> None:
    assert seen["once"]


def test_memory_is_the_resident_set_and_its_peak_starts_again(seen: dict) -> None:
    before, with_block, after = seen["peaks"]
    assert with_block > before + 0.25
    assert after < with_block - 0.25
    assert seen["capacity"] > before


def test_no_peak_is_made_up(seen: dict) -> None:
    assert seen["name"]
    assert seen["peak flops"] == "nan"


def test_offloading_is_refused_with_the_way_out(seen: dict) -> None:
    assert "training.enable_cpu_offload = true" in seen["refusal"]
    assert "set it to false" in seen["refusal"]


@pytest.mark.parametrize("product", ["mm", "addmm", "bmm", "fp32 stays", "fp32 out"])
def test_bf16_products_accumulate_in_fp32(seen: dict, product: str) -> None:
    assert seen[product]


def test_bf16_products_are_rounded_once(seen: dict) -> None:
    # fp32 sums in another order differ from the exact ones at ties of the last rounding only.
    assert seen["exact"] > 0.99


def test_with_an_accelerator_nothing_changes() -> None:
    assert run(WITH_ACCELERATOR) == {"devices": True, "setter": True, "flops": True}
