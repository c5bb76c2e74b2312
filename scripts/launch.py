"""Run torchtitan's trainer under torchrun and read the steps it logs."""

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
TAIL = 40

STEP = re.compile(
    r"step:\s*(?P<step>\d+)\s+loss:\s*(?P<loss>\S+)\s+grad_norm:\s*(?P<grad_norm>\S+)\s+"
    r"memory:\s*(?P<memory>\S+?)GiB\S*\s+tps:\s*(?P<tps>[\d,]+)"
)
STAMP = re.compile(
    r"^\[rank0\]:\[titan\] (?P<time>\S+ \S+) - .* - (Training starts at step 1$|step:\s*(?P<step>\d+)\s+loss:)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Step:
    """One step as torchtitan's rank 0 logged it.

    loss has 5 decimals, grad_norm 4; memory is the peak of a process in GiB; tps are tokens per second and process.
    """

    step: int
    loss: float
    grad_norm: float
    memory: float
    tps: float


class TrainingFailed(RuntimeError):
    """The run ended with an error or ran past its time; the message holds the log's tail."""


def parse_step(line: str, rank: int = 0) -> Step | None:
    """The step that a line of this rank's log reports, or None."""
    match = STEP.search(line)
    if match is None or not line.startswith(f"[rank{rank}]:"):
        return None
    number = {name: float(text.replace(",", "")) for name, text in match.groupdict().items()}
    return Step(int(number["step"]), number["loss"], number["grad_norm"], number["memory"], number["tps"])


def step_times(log: Path) -> dict[int, float]:
    """Step -> the time in seconds at which rank 0 logged it, 0 when training started; empty where the log does not tell that."""
    times: dict[int, datetime] = {}
    for match in STAMP.finditer(log.read_text()):
        step = 0 if match["step"] is None else int(match["step"])
        times[step] = datetime.strptime(match["time"], "%Y-%m-%d %H:%M:%S,%f")
    return {step: (time - times[0]).total_seconds() for step, time in times.items()} if 0 in times else {}


def offline(cache: Path) -> dict[str, str]:
    """Variables with which a run asks no network; cache: folder for the data set's prepared form."""
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}


def train(
    config: Path,
    overrides: Sequence[str],
    *,
    nproc: int,
    log: Path,
    timeout: float,
    cache: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train with ``torchrun -m torchtitan.train`` on this machine and return the logged steps.

    Args:
        config: a torchtitan job config; paths in it are relative to the repository root.
        overrides: command-line overrides, such as ``--training.steps=4``.
        nproc: number of processes.
        log: file that receives the output of all processes; its folder is made.
        timeout: seconds until the run is stopped.
        cache: folder for the data set's prepared form.
        environment: variables to set for the processes.
        on_step: called with each step as it is logged.
    Raises:
        TrainingFailed: the exit status is not 0, or the time is over.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [f"--nproc-per-node={nproc}", "--role=rank", "--tee=3", f"--log-dir={log.parent / 'ranks'}"]
    command += ["-m", "torchtitan.train", f"--job.config_file={config}", "--metrics.disable_color_printing", *overrides]
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)), **offline(cache)}
    # As torchtitan's own run_train.sh has it. Without, the allocator holds memory in pieces of sizes that no longer come.
    allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    steps: list[Step] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=allocator | os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # torchrun stops its processes when it is asked to end.
    stopper = threading.Timer(timeout, process.terminate)
    stopper.start()
    try:
        with log.open("w") as out:
            print(shlex.join(command), file=out)
            for line in process.stdout:
                out.write(line)
                out.flush()
                if (step := parse_step(line)) is not None:
                    steps.append(step)
                    on_step(step)
        status = process.wait()
    finally:
        expired = stopper.finished.is_set()
        stopper.cancel()
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status != 0:
        why = f"ran past {timeout:.0f} s" if expired else f"ended with status {status}"
        tail = "\n".join(log.read_text().splitlines()[-TAIL:])
        raise TrainingFailed(f"{shlex.join(command)}\n{why}; the end of {log}:\n{tail}")
    return steps
