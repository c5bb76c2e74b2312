"""Read weights tensor by tensor: from torchtitan's checkpoints, and from folders of Hugging Face's safetensors.

    python scripts/checkpoints.py outputs/checkpoint/step-1000    # is every file of it whole? Optimizer state too

Exits with 1 and names what is damaged or missing, with 2 where the folder is no torchtitan checkpoint.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

try:
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError:
    sys.exit("error: safetensors is not installed: pip install '.[export]', or pip install safetensors")


class Named(Protocol):
    """A parameter: torchtitan's name of it, and Hugging Face's."""

    @property
    def fqn(self) -> str: ...

    @property
    def key(self) -> str: ...


class Checkpoint(Protocol):
    """A folder of weights. Errors are `ValueError`s that name the folder or file, and the key."""

    folder: Path

    def stored(self, parameter: Named) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of a parameter in it; None where it has none."""

    def unknown_keys(self, parameters: Iterable[Named]) -> list[str]:
        """Keys of a model's tensors beyond these."""

    def read(self, parameter: Named) -> Tensor:
        """The whole parameter on the CPU, as it is stored, in Hugging Face's layout."""


class _TorchtitanReader(dcp.FileSystemReader):
    """Reads the metadata, which a large job's run to many megabytes, once and not for every tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class TorchtitanCheckpoint:
    """A step's folder of a torchtitan job on any number of ranks (torch.distributed.checkpoint).

    Args:
        adapter: to Hugging Face's layout, for `read`.
    """

    def __init__(self, folder: Path, adapter: BaseStateDictAdapter | None) -> None:
        self.folder, self.adapter = folder, adapter
        try:
            self.reader = _TorchtitanReader(folder)
            self.tensors = self.reader.metadata.state_dict_metadata
            self.files: dict[str, set[str]] = {}
            for index, info in self.reader.metadata.storage_data.items():
                self.files.setdefault(index.fqn, set()).add(info.relative_path)
        except Exception as error:  # it is a pickle: damage shows as anything
            raise ValueError(f"{folder / '.metadata'} is damaged: {_first_line(error)}") from error

    def stored(self, parameter: Named) -> tuple[tuple[int, ...], torch.dtype] | None:
        tensor = self.tensors.get(parameter.fqn)
        if not isinstance(tensor, TensorStorageMetadata):
            return None
        for file in self.files.get(parameter.fqn, ()):
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder / file} is missing: it holds a part of {parameter.fqn}")
        return tuple(tensor.size), tensor.properties.dtype

    def unknown_keys(self, parameters: Iterable[Named]) -> list[str]:
        known = {parameter.fqn for parameter in parameters}
        # Beside the model lie the optimizer's state and the trainer's own, under other names.
        return [key for key in self.tensors if key.startswith("layers.") and key not in known]

    def read(self, parameter: Named) -> Tensor:
        return self.adapter.to_hf({parameter.fqn: self.load(parameter.fqn)})[parameter.key]

    def load(self, fqn: str) -> Tensor:
        """The whole tensor of this name, under torchtitan's layout. Raises ValueError: a file with a part of it is damaged."""
        value = torch.empty(self.tensors[fqn].size, dtype=self.tensors[fqn].properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load({fqn: value}, storage_reader=self.reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            files = ", ".join(str(self.folder / file) for file in sorted(self.files[fqn]))
            raise ValueError(f"cannot read {fqn}: {files} is damaged: {_first_line(error)}") from error
        return value


class HuggingFaceCheckpoint:
    """A folder of safetensors files under Hugging Face's names, each tensor whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with _open(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118, a safe_open is not iterable
                    if key in self.files:
                        raise ValueError(f"{key} is in {self.files[key]} and in {file}: keep one of the two files")
                    part = tensors.get_slice(key)
                    self.tensors[key] = (tuple(part.get_shape()), _dtype(file, key, part.get_dtype()))
                    self.files[key] = file

    def stored(self, parameter: Named) -> tuple[tuple[int, ...], torch.dtype] | None:
        return self.tensors.get(parameter.key)

    def unknown_keys(self, parameters: Iterable[Named]) -> list[str]:
        known = {parameter.key for parameter in parameters}
        # Old files carry the rotary frequencies, which follow from the config.
        return [key for key in self.tensors if key not in known and not key.endswith(".rotary_emb.inv_freq")]

    def read(self, parameter: Named) -> Tensor:
        with _open(self.files[parameter.key]) as tensors:
            return tensors.get_tensor(parameter.key)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {_first_line(error)}") from error


def _dtype(file: Path, key: str, name: str) -> torch.dtype:
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(
            f"{file}: {key} is stored as {name}: must be one of {', '.join(dtypes)}, not quantised already"
        )
    return dtypes[name]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def open_checkpoint(folder: Path, adapter: BaseStateDictAdapter) -> TorchtitanCheckpoint | HuggingFaceCheckpoint:
    """The weights in a folder, of either kind.

    Raises:
        ValueError: there is no such folder, there are no weights in it, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"--checkpoint {folder}: no such folder")
    if (folder / ".metadata").is_file():
        return TorchtitanCheckpoint(folder, adapter)
    if any(folder.glob("*.safetensors")):
        return HuggingFaceCheckpoint(folder)
    steps = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    hint = f"; name one of the steps in it: {', '.join(steps)}" if steps else ""
    raise ValueError(
        f"--checkpoint {folder}: has neither .metadata, as a torchtitan checkpoint does once it is complete, nor *.safetensors{hint}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a step's folder")
    folder: Path = parser.parse_args(arguments).folder
    if not (folder / ".metadata").is_file():
        parser.error(f"{folder}: has no .metadata, as a torchtitan checkpoint does once it is complete")
    try:
        checkpoint = TorchtitanCheckpoint(folder, None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    tensors = [key for key, what in checkpoint.tensors.items() if isinstance(what, TensorStorageMetadata)]
    damaged = False
    for key in tensors:
        try:
            checkpoint.load(key)
        except ValueError as error:
            print(error, file=sys.stderr)
            damaged = True
    if not damaged:
        print(f"{folder}: all {len(tensors)} tensors can be read")
    return int(damaged)


if __name__ == "__main__":
    sys.exit(main())
