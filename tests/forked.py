"""Training runs in forks of one process that has imported PyTorch and torchtitan: the imports cost more than a short run.

What torchrun does for one host: environment, log, and an end for all processes when one fails.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launch


class Forker:
    """A process that forks training runs when asked to; close it at the end."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = os.pathsep.join([str(launch.ROOT), str(launch.ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=launch.ROOT,
            env=os.environ | environment | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, arguments: list[str], *, nproc: int, log: Path, timeout: float) -> list[launch.Step]:
        """Run torchtitan's trainer with these arguments in nproc processes and return the steps that rank 0 logged.

        Args:
            log: receives the output of all processes, lines marked as torchrun marks them.
        Raises:
            launch.TrainingFailed: a process failed, or the time was over.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {"arguments": arguments, "nproc": nproc, "folder": str(log.parent), "timeout": timeout}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"the forking process ended with status {self._server.wait()}"
        lines = [
            f"[rank{rank}]:{line}"
            for rank in range(nproc)
            for line in _output(log.parent, rank).read_text(errors="replace").splitlines()
        ]
        log.write_text("\n".join(lines))
        if failure := json.loads(answer):
            raise launch.TrainingFailed(f"{arguments}\n{failure}; {log}:\n" + "\n".join(lines[-2 * launch.TAIL :]))
        return [step for line in lines if (step := launch.parse_step(line))]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"


def _run(arguments: list[str], nproc: int, folder: str, timeout: float) -> str:
    """Fork, train, and say what failed; "" when nothing did."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(nproc):
        if child := os.fork():
            ranks[child] = rank
        else:
            os._exit(_train(arguments, rank, nproc, port, _output(Path(folder), rank)))
    failure = ""
    deadline = time.monotonic() + timeout
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            rank = ranks.pop(child)
            if status and not failure:
                failure = f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"
        elif time.monotonic() > deadline and not failure:
            failure = f"ran past {timeout:.0f} s"
        else:
            time.sleep(0.02)
        if failure:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failure


def _train(arguments: list[str], rank: int, nproc: int, port: int, output: Path) -> int:
    """A child's life, which ends with its exit status."""
    import traceback

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{nproc}", "LOCAL_WORLD_SIZE": f"{nproc}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    try:
        from torchtitan.config import ConfigManager
        from torchtitan.train import Trainer, main

        ConfigManager.parse_args.__defaults__ = (arguments,)  # sys.argv's when torchtitan was imported
        main(Trainer)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    # Imported but not run: a process with threads must not fork.
    for module in ("torch._inductor.compile_fx", "torchtitan.train", "blockfp8_titan.cpu"):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for request in sys.stdin:
        print(json.dumps(_run(**json.loads(request))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
