"""Where and with what a result was measured: commit, date, versions, hardware."""

import os
import platform
import subprocess
from datetime import datetime, timezone

from launch import ROOT

from blockfp8_titan.environment import hardware, versions


def commit() -> str | None:
    """The checked-out commit, with "+" where tracked files differ from it.

    Outside a git checkout the environment variable COMMIT, else None.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


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
