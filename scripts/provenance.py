"""Where and with what a result was measured: commit, date, versions, hardware."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """The checked-out commit, with "+" where tracked files differ from it.

    Outside a git checkout the environment variable COMMIT, else None.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def versions() -> dict[str, str | None]:
    """The installed versions that matter to a result; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("blockfp8-titan", "torch", "torchtitan", "triton", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, object]:
    """GPUs with driver, or the processor."""
    found: dict[str, object] = {"platform": platform.platform(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        try:
            text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            found["driver"], found["power_limit"] = text.splitlines()[0].split(", ")
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = None
    return found


def machine() -> str:
    """Tells this machine's GPUs, or without any this host, from others."""
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        return " ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError):
        return platform.node()


def provenance() -> dict[str, object]:
    """All of this, for a result's JSON."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": commit(), "versions": versions(), "hardware": hardware()}
