"""Training runs to compare: a bf16 config, a converter, settings. What the comparisons of loss, throughput and kernels share."""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import tomli
import torch
from launch import ROOT, Step, train
from torchtitan.models.llama3 import llama3_args

TENSORWISE = "quantize.linear.float8"
_tensorwise = [
    f"--{TENSORWISE}.filter_fqns=output",
    f"--{TENSORWISE}.enable_fsdp_float8_all_gather",
    f"--{TENSORWISE}.precompute_float8_dynamic_scale_for_fsdp",
]
_rowwise = [f"--{TENSORWISE}.recipe_name=rowwise", f"--{TENSORWISE}.filter_fqns=output"]
# What each converter adds to a bf16 config; torchao's as torchtitan's documentation recommends them for Llama. "+saved": selective
# activation checkpointing keeps the outputs of the GEMM, which torchtitan by itself recomputes. "+rope": compiled RoPE in real numbers,
# as ours has it.
CONVERTERS = {
    "bf16": [],
    "bf16+rope": ["--model.converters=real_rope"],
    "blockwise_fp8": ["--model.converters=blockwise_fp8", "--job.custom_config_module=blockfp8_titan.config"],
    "float8_tensorwise": [f"--model.converters={TENSORWISE}", *_tensorwise],
    "float8_tensorwise+rope": [f"--model.converters={TENSORWISE},real_rope", *_tensorwise],
    "float8_tensorwise+saved": [f"--model.converters={TENSORWISE},save_scaled_mm", *_tensorwise],
    "float8_rowwise": [f"--model.converters={TENSORWISE}", *_rowwise],
    "float8_rowwise+saved": [f"--model.converters={TENSORWISE},save_scaled_mm", *_rowwise],
    "torchao_blockwise": ["--model.converters=torchao_blockwise"],
    "torchao_blockwise+saved": ["--model.converters=torchao_blockwise,save_scaled_mm"],
}
ADDED = {"save_scaled_mm": "+saved", "real_rope": "+rope"}
"""Converters that stand after another, and what they add to its name."""
BF16 = "bf16"
COLORS = {
    "bf16": "#9aa5b1",
    "bf16+rope": "#64748b",
    "blockwise_fp8": "#c2410c",
    "float8_tensorwise": "#1d4ed8",
    "float8_tensorwise+rope": "#1e3a8a",
    "float8_tensorwise+saved": "#60a5fa",
    "float8_rowwise": "#15803d",
    "float8_rowwise+saved": "#4ade80",
    "torchao_blockwise": "#7c3aed",
    "torchao_blockwise+saved": "#c4b5fd",
}
PLOT_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
OURS = "blockwise_fp8."  # settings of the section, which only our converter's config has
CHECKPOINTING = {
    "none": ["activation_checkpoint.mode=none"],
    "full": ["activation_checkpoint.mode=full"],
    "op": ["activation_checkpoint.mode=selective", "activation_checkpoint.selective_ac_option=op"],
    "2": ["activation_checkpoint.mode=selective", "activation_checkpoint.selective_ac_option=2"],
}


@dataclass(frozen=True)
class Arm:
    """One of the contenders: a config under a converter, with settings of its own."""

    config: str
    """A file, or the NAME of configs/NAME_bf16.toml."""
    converter: str
    settings: tuple[str, ...] = ()
    """KEY=VALUE, torchtitan's overrides."""
    checkpointing: str = ""
    """Of `CHECKPOINTING`; empty: as the config has it."""
    variant: tuple[str, ...] = ()
    """KEY=VALUE, settings that its group's bf16 has too."""
    nproc: int = 0
    """Processes; 0: as --nproc says."""

    @property
    def name(self) -> str:
        return " ".join([self.converter, *(setting.removeprefix(OURS) for setting in self.settings)])

    @property
    def group(self) -> str:
        """Arms of one group differ in converter and settings, and are compared with the group's plain bf16."""
        return ", ".join([self.work, *([f"{self.nproc} processes"] if self.nproc else [])])

    @property
    def work(self) -> str:
        """What arms do on however many processes, apart from converter and settings."""
        checkpointing = [f"activation checkpointing {self.checkpointing}"] if self.checkpointing else []
        return ", ".join([Path(self.config).stem, *checkpointing, *self.variant])

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+=-]+", "_", f"{self.group}/{self.name}")

    @property
    def is_base(self) -> bool:
        return self.converter == BF16 and not self.settings


def parse_arm(text: str) -> tuple[str, tuple[str, ...]]:
    """ "CONVERTER" or "CONVERTER,KEY=VALUE,..." -> converter and settings.

    Raises:
        argparse.ArgumentTypeError: an unknown converter, or settings of another form.
    """
    converter, *settings = re.split(r",(?=[\w.]+=)", text)
    if converter not in CONVERTERS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must begin with one of {', '.join(CONVERTERS)}, and go on with ,KEY=VALUE or end there"
        )
    return converter, tuple(settings)


def config_path(config: str) -> Path:
    """The TOML of a config's name or path.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(config) if config.endswith(".toml") else ROOT / "configs" / f"{config}_bf16.toml"
    if not path.is_file():
        names = sorted(p.name.removesuffix("_bf16.toml") for p in (ROOT / "configs").glob("*_bf16.toml"))
        raise ValueError(f"config {config!r}: there is no file {path}; name one, or one of {', '.join(names)}")
    return path.resolve()


def cut_flavor(config: str, layers: int) -> str:
    """The flavor of scripts/variants.py that cuts the config's model to this many layers.

    Raises:
        ValueError: the model is no Llama 3, or has not more layers.
    """
    flavor = tomli.loads(config_path(config).read_text())["model"].get("flavor")
    if flavor not in llama3_args:
        raise ValueError(f"--layers {layers}: {config} has the flavor {flavor!r}, which is none of Llama 3's")
    if not 1 <= layers < llama3_args[flavor].n_layers:
        raise ValueError(f"--layers {layers}: must be 1 to {llama3_args[flavor].n_layers - 1} for {config}")
    return f"{flavor}-{layers}L"


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, data: Path = ROOT / "outputs" / "demo") -> None:
    """What every comparison of runs takes: --converters, --steps, --layers, --compile, --nproc, --log-freq, --data, --set."""
    parser.add_argument(
        "--converters",
        nargs="+",
        type=parse_arm,
        default=[(BF16, ()), ("blockwise_fp8", ())],
        metavar="CONVERTER[,KEY=VALUE...]",
        help=f"of {', '.join(CONVERTERS)} (default: bf16 blockwise_fp8)",
    )
    parser.add_argument("--steps", type=int, default=steps, help="of each run (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the model to N layers, for a smaller GPU")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: as the config has it)"
    )
    parser.add_argument(
        "--nproc", type=int, default=torch.cuda.device_count() or 2, help="processes (default here: %(default)s)"
    )
    parser.add_argument("--log-freq", type=int, default=1, help="steps from line to line (default: %(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        default=data,
        help="folder made by make_corpus.py, relative to the repository's root (default: %(default)s)",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="more torchtitan overrides, for all runs"
    )


def check_data(data: Path) -> None:
    """Raises ValueError, with the way out, unless `make_corpus.py` has made this folder."""
    folder = ROOT / data
    if not ((folder / "corpus").is_dir() and (folder / "tokenizer").is_dir()):
        raise ValueError(
            f"--data {data}: has no corpus and tokenizer; make them, in the repository's root: python scripts/make_corpus.py {data}"
        )


def overrides_of(arm: Arm, args: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of a run after the config file.

    Args:
        args: those of `add_arguments`; settings of our section reach our converter's runs alone.
        folder: receives the run's files.
    Raises:
        ValueError: a count below 1; --layers that do not fit the config; see `check_parallelism`.
    """
    for name in ("steps", "nproc", "log_freq"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    # Runs begin in the repository's root, and results are to name no other folder of this machine.
    data = args.data.relative_to(ROOT) if args.data.is_relative_to(ROOT) else args.data
    overrides = [
        "--experimental.custom_import=variants",
        f"--training.steps={args.steps}",
        f"--lr_scheduler.warmup_steps={max(1, args.steps // 10)}",
        f"--metrics.log_freq={args.log_freq}",
        "--debug.seed=1",
        f"--training.dataset_path={data / 'corpus'}",
        "--training.dataset=c4_test",
        f"--model.hf_assets_path={data / 'tokenizer'}",
        f"--job.dump_folder={folder}",
        *CONVERTERS[arm.converter],
    ]
    if args.compile is not None:
        overrides.append("--compile.enable" if args.compile else "--compile.no-enable")
    if args.layers:
        overrides.append(f"--model.flavor={cut_flavor(arm.config, args.layers)}")
    common = [setting for setting in args.set if arm.converter == "blockwise_fp8" or not setting.startswith(OURS)]
    settings = [*common, *CHECKPOINTING.get(arm.checkpointing, []), *arm.variant, *arm.settings]
    overrides += [f"--{setting}" for setting in settings]
    check_parallelism(arm, overrides, arm.nproc or args.nproc)
    return overrides


DEGREES = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "context_parallel": 1,
    "data_parallel_replicate": 1,
    "data_parallel_shard": -1,
}
"""torchtitan's, of a job that does not set them."""


def check_parallelism(arm: Arm, overrides: Sequence[str], nproc: int) -> None:
    """Raises ValueError unless an arm's parallelism fits so many processes, and computes in the precision that its config asks for."""
    table = tomli.loads(config_path(arm.config).read_text())
    given = dict(word.removeprefix("--").split("=", 1) for word in overrides if "=" in word)

    def setting(section: str, key: str, default: int | str) -> int | str:
        return given.get(f"{section}.{key}", table.get(section, {}).get(key, default))

    degrees = {}
    for name, default in DEGREES.items():
        key = f"{name}_degree"
        try:
            degrees[name] = int(value := setting("parallelism", key, default))
        except ValueError:
            raise ValueError(f"parallelism.{key} = {value!r}: must be a number") from None
        if degrees[name] < 1 and (name, degrees[name]) != ("data_parallel_shard", -1):
            raise ValueError(f"parallelism.{key} = {degrees[name]}: must be 1 or more")
    shards = degrees.pop("data_parallel_shard")
    others = math.prod(degrees.values())
    if shards == -1:
        shards = max(nproc // others, 1)
    where = f"{arm.work} on {nproc} processes"
    if shards * others != nproc:
        raise ValueError(
            f"{where}: its degrees of parallelism multiply to {shards * others}; change one of them, or give these runs a command of "
            "their own, with another --nproc"
        )
    model_parallel = degrees["tensor_parallel"] * degrees["pipeline_parallel"]
    dtype = setting("training", "dtype", "float32")
    mixed = setting("training", "mixed_precision_param", "bfloat16") != dtype
    if mixed and model_parallel > 1 and shards == degrees["context_parallel"] == 1:
        raise ValueError(
            f"{where}: beside tensor and pipeline parallelism none are left to FSDP, without which torchtitan computes in {dtype} there, "
            "bf16's runs too; give these runs a command of their own, with a higher --nproc, or set training.dtype=bfloat16"
        )


def train_arm(
    arm: Arm,
    args: argparse.Namespace,
    *,
    folder: Path,
    cache: Path,
    timeout: float,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train an arm; its log is FOLDER/log.txt.

    Args:
        extra: more overrides, after all others.
        environment: variables to set for the processes.
    Raises:
        TrainingFailed: see `launch.train`.
    """
    # torchrun's processes import `variants` from this folder.
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return train(
        config_path(arm.config),
        [*overrides_of(arm, args, folder), *extra],
        nproc=arm.nproc or args.nproc,
        log=folder / "log.txt",
        timeout=timeout,
        cache=cache,
        environment={"PYTHONPATH": path, **environment},
        on_step=on_step,
    )
