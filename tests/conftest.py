"""Markers of tests that need GPUs, a tiny corpus, and training runs for the tests of whole runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import launch
import make_corpus
import pytest
import torch

from .forked import Forker

CAPABILITY = (8, 9)


def suitable_gpus() -> int:
    """The number of CUDA devices that multiply fp8."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return 0
    return sum(torch.cuda.get_device_capability(i) >= CAPABILITY for i in range(torch.cuda.device_count()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = suitable_gpus()
    for item in items:
        marker = item.get_closest_marker("gpus")
        needed = marker.args[0] if marker else 1 if item.get_closest_marker("gpu") else 0
        if needed > here:
            capability = ".".join(map(str, CAPABILITY))
            reason = f"needs {needed} CUDA GPU(s) of compute capability {capability} or higher, found {here}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/ and tokenizer/ of 600,000 characters."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus.make(folder, limit=600_000)
    return folder


@dataclass(frozen=True)
class Run:
    """A finished training run: what rank 0 logged, and the run's folder."""

    steps: list[launch.Step]
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    def losses_of(self, rank: int) -> list[float]:
        """As this rank logged them: under pipeline parallelism only ranks of the last stage know the loss."""
        lines = self.log.read_text().splitlines()
        return [step.loss for line in lines if (step := launch.parse_step(line, rank))]

    @property
    def grad_norms(self) -> list[float]:
        return [step.grad_norm for step in self.steps]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoint" / f"step-{step}"


Train = Callable[..., Run]


@pytest.fixture(scope="session")
def forker(corpus: Path) -> Iterator[Forker]:
    # One thread: two that share busy cores wait for each other most of the time.
    forker = Forker({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **launch.offline(corpus / "cache")})
    yield forker
    forker.close()


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, corpus: Path, request: pytest.FixtureRequest) -> Train:
    """Run torchtitan's trainer on a config of the project's, small: 4 sequences of 64 tokens a process and step.

    On the CPU in forks of one process, or with `torchrun=True` and on GPUs by torchrun. The schedule of the learning rate is that of
    6 steps, however many are run.
    """

    def run(
        config: str,
        *overrides: str,
        steps: int,
        nproc: int = 2,
        device: str = "cpu",
        torchrun: bool = False,
        folder: Path | None = None,
        on_step: Callable[[launch.Step], None] | None = None,
    ) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        small = [
            f"--job.dump_folder={folder}",
            f"--model.hf_assets_path={corpus / 'tokenizer'}",
            f"--training.dataset_path={corpus / 'corpus'}",
            f"--training.steps={steps}",
            "--training.seq_len=64",
            "--training.local_batch_size=4",
            "--lr_scheduler.total_steps=6",
            "--lr_scheduler.warmup_steps=2",
            "--metrics.log_freq=1",
        ]
        file = launch.ROOT / "configs" / f"{config}.toml"
        log = folder / "log.txt"
        if torchrun or on_step or device != "cpu":
            cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            logged = launch.train(
                file,
                [*small, *overrides],
                nproc=nproc,
                log=log,
                timeout=300,
                cache=corpus / "cache",
                environment=cpu,
                on_step=on_step or (lambda step: None),
            )
        else:
            arguments = [f"--job.config_file={file}", "--metrics.disable_color_printing", *small, *overrides]
            forker: Forker = request.getfixturevalue("forker")
            logged = forker.train(arguments, nproc=nproc, log=log, timeout=300)
        assert [step.step for step in logged] == list(range(logged[0].step, steps + 1))
        return Run(logged, folder)

    return run
