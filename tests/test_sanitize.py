"""scripts/sanitize.sh: its verdicts with a stand-in for compute-sanitizer, and memcheck itself where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "sanitize.sh"
TOOLKIT = "/usr/local/cuda/bin"
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


def sanitize(*arguments, timeout=60, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def stand_in(folder, memcheck=CLEAN["memcheck"], racecheck=CLEAN["racecheck"], status=0, ran="every kernel has run"):
    """PATH with a compute-sanitizer that prints this."""
    tool = folder / "compute-sanitizer"
    lines = [
        "#!/usr/bin/env bash",
        f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>"{folder}/called"',
        f'echo "{ran}"',
        f'case $2 in memcheck) echo "{memcheck}" ;; racecheck) echo "{racecheck}" ;; esac',
        f"exit {status}",
    ]
    tool.write_text("\n".join(lines) + "\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python-of-the-test"}


def test_clean_reports_of_both_tools_pass(tmp_path):
    run = sanitize("--few", **stand_in(tmp_path))
    assert run.returncode == 0 and run.stdout.endswith("sanitize.sh: clean: memcheck racecheck\n"), run.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[2] for line in called] == ["memcheck", "racecheck"]
    assert all(
        line.startswith("1 ") and line.endswith("python-of-the-test -m tests.sanitized --few") for line in called
    )


@pytest.mark.parametrize(
    "report, found",
    [
        ({"memcheck": "========= ERROR SUMMARY: 1 error"}, "memcheck"),
        ({"memcheck": "========= ERROR SUMMARY: 10 errors"}, "memcheck"),
        ({"memcheck": "========= Error: Device not supported. No kernel was checked"}, "memcheck"),
        ({"racecheck": "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"}, "racecheck"),
        ({"ran": "AssertionError"}, "memcheck racecheck"),
        ({"status": 9}, "memcheck racecheck"),
    ],
)
def test_any_finding_fails(tmp_path, report, found):
    run = sanitize(**stand_in(tmp_path, **report))
    assert run.returncode == 1 and run.stderr == f"sanitize.sh: not clean: {found}\n"
    assert all(str(text) in run.stdout for text in report.values() if text != 9), "what the tool printed is shown"


def test_one_tool_can_be_named(tmp_path):
    run = sanitize("racecheck", **stand_in(tmp_path, memcheck="not asked"))
    assert run.returncode == 0 and "memcheck" not in (tmp_path / "called").read_text()


def test_bad_arguments_and_missing_tools_are_named(tmp_path):
    run = sanitize("initcheck")
    assert run.returncode == 2 and "unknown argument initcheck: memcheck, racecheck, --few" in run.stderr
    if not shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}"):
        run = sanitize()
        assert run.returncode == 2 and "found no compute-sanitizer; install the CUDA toolkit" in run.stderr


@pytest.mark.gpu
def test_memcheck_is_clean():
    if not shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}"):
        pytest.skip("found no compute-sanitizer")
    run = sanitize("memcheck", "--few", timeout=300, PYTHON=sys.executable)
    if "Device not supported" in run.stdout:  # as under some hypervisors
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
