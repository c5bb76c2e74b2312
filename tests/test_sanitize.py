"""scripts/sanitize.sh: its verdicts with a stand-in for compute-sanitizer, and memcheck itself where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


SOURCE = (ROOT / "blockfp8_titan" / "kernels" / "gemm_hopper.py").read_text().splitlines()


def line_of(text):
    """The number of the first line that holds a text."""
    return next(number for number, line in enumerate(SOURCE, 1) if text in line)


TOLD = line_of("gl.warp_specialize(")


def races(*kernels, line=TOLD, other=None):
    """A report of one race in each of these kernels."""
    lines = [
        f"========= Error: Race reported between Read access at {kernel}+0x100 in gemm_hopper.py:{line}\n"
        f"=========     and Write access at {kernel}+0x3c90 in gemm_hopper.py:{other or line} [18 hazards]"
        for kernel in kernels
    ]
    count = f"{len(kernels)} hazard{'s' * (len(kernels) > 1)}"
    return "\n".join([*lines, f"========= RACECHECK SUMMARY: {count} displayed ({len(kernels)} errors, 0 warnings)"])


GEMM = "_gemm_hopper_kernel"


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(
    "places",
    [
        ("def _gemm_hopper_kernel", None),
        ("def _gemm_hopper_kernel", "gl.warp_specialize("),
        ("def _gemm_hopper_kernel", "if WARPGROUPS == 2:"),
        ("tile_buf.load", "tile_bufs.index(stage).store"),
    ],
)
def test_what_racecheck_misjudges_in_the_warp_specialised_gemm_is_shown_and_does_not_count(tmp_path, count, places):
    line, other = (place and line_of(place) for place in places)
    report = races(*[GEMM] * count, line=line, other=other)
    run = sanitize("racecheck", **stand_in(tmp_path, racecheck=report, status=9))
    assert run.returncode == 0, run.stderr
    assert f"{count} of {count} reports are of {GEMM} and do not count" in run.stdout and "+0x3c90" in run.stdout


@pytest.mark.parametrize(
    "more",
    [
        {"racecheck": races(GEMM, "_quantize_rows_kernel")},
        {"racecheck": races("_quantize_rows_kernel")},
        {"racecheck": races(GEMM + "_of_others", GEMM)},
        {"racecheck": races(GEMM, line=line_of("c_buf.store"))},
        {"racecheck": races(GEMM, other=line_of("a_dq_part.load"))},
        {"racecheck": races(GEMM).replace("gemm_hopper.py", "gemm.py")},
        {"racecheck": races(GEMM).replace("1 hazard ", "11 hazards ")},
        {"racecheck": races(GEMM), "ran": "AssertionError"},
        {"racecheck": races(GEMM), "status": 1},
        {"racecheck": races(GEMM).partition("\n=========     and")[0]},
    ],
)
def test_other_races_and_failures_beside_them_count(tmp_path, more):
    run = sanitize("racecheck", **stand_in(tmp_path, **{"status": 9} | more))
    assert run.returncode == 1 and run.stderr == "sanitize.sh: not clean: racecheck\n"


def test_one_tool_can_be_named(tmp_path):
    run = sanitize("racecheck", **stand_in(tmp_path, memcheck="not asked"))
    assert run.returncode == 0 and "memcheck" not in (tmp_path / "called").read_text()


def test_bad_arguments_and_missing_tools_are_named(tmp_path):
    run = sanitize("initcheck")
    assert run.returncode == 2 and "unknown argument initcheck: memcheck, racecheck, --few" in run.stderr
    if not shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}"):
        run = sanitize()
        assert run.returncode == 2 and "found no compute-sanitizer; install the CUDA toolkit" in run.stderr


def skip_without_the_tool(output=""):
    if not shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}"):
        pytest.skip("found no compute-sanitizer")
    if "Device not supported" in output:  # as under some hypervisors
        pytest.skip("compute-sanitizer does not support this device")


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool):
    skip_without_the_tool()
    run = sanitize(tool, "--few", timeout=300, PYTHON=sys.executable)
    skip_without_the_tool(run.stdout)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr


@pytest.mark.gpu
def test_racecheck_reports_races_in_warp_specialised_kernels_without_any():
    """Where it no longer does, sanitize.sh has to count what it reports of ours."""
    skip_without_the_tool()
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernels are for Hopper")
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}")
    command = [tool, "--tool", "racecheck", "--target-processes", "application-only", "--report-api-errors", "no"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "tests.warp_specialized"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    skip_without_the_tool(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    without, rest = run.stdout.split("after adding(False,)")
    meeting, rest = rest.split("after adding(True,)")
    handing, _ = rest.split("after handing()")
    assert "Race reported" not in without, "of warps that meet nowhere by themselves it is right"
    assert "access at adding+" in meeting and "access at handing+" in handing
