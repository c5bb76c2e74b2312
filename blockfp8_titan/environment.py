"""With what a run computes: versions of the software, processor and GPUs."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("blockfp8-titan", "torch", "torchtitan", "triton", "torchao")


def versions() -> dict[str, str | None]:
    """The installed versions that matter to a result; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, object]:
    """This host's GPUs with driver, and its processor."""
    found: dict[str, object] = {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        try:
            text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
            found["driver"], found["power_limit"] = text.splitlines()[0].split(", ")
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            found["driver"] = None
    return found


def processor_name() -> str:
    """The processor's model name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_versions() -> str:
    """ "torch 2.11.0, …": the installed ones on a line."""
    return ", ".join(f"{name} {number}" for name, number in versions().items() if number)


def describe_device(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3, compute capability 9.0", or the processor's name."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return processor_name()
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
