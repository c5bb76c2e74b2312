"""Weights that FSDP2 gathers in fp8: the checks of sharded.py, on 1 to 7 processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .sharded import CHECKS

OF_ONE_SEED = [f"losses_of_{world_size}" for world_size in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def outcomes():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.sharded"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in OF_ONE_SEED])
def test_on_processes(outcomes, name):
    assert "error" not in outcomes[name], outcomes[name]["error"]


def test_losses_do_not_depend_on_the_number_of_processes(outcomes):
    runs = [outcomes[name]["result"] for name in OF_ONE_SEED]
    assert runs[0][-1] < runs[0][0] / 1.5
    for losses in runs[1:]:
        assert max(abs(a / b - 1) for a, b in zip(runs[0], losses, strict=True)) < 1e-4
