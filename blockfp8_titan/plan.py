"""python -m blockfp8_titan.plan --job.config_file X: which Linears a job would convert, without a GPU, weights or other processes."""

import argparse
import copy
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager, JobConfig
from torchtitan.models import _supported_models
from torchtitan.protocols.model_converter import _registry_model_converter_cls
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from .conversion import ConversionReport, gather_notes, gather_obstacles, plan_conversion
from .converter import NAME, check_job, fuse_beside, notes_on_job, section_of, swiglu_inputs_beside
from .job_file import check_keys, check_values
from .shards import Sharding, simulate
from .tensor_parallel import check_split

CONFIG_MODULE = "blockfp8_titan.config"

SPLIT_BY_ROWS = frozenset(["wq", "wk", "wv", "wq_b", "wkv_b", "w1", "w3", "output"])
"""Linears whose out_features tensor parallelism splits: the last part of their names, alike in all of torchtitan's models."""

SPLIT_BY_COLUMNS = frozenset(["wo", "w2"])
"""Linears whose in_features it splits."""


class _CheckedConfigManager(ConfigManager):
    """torchtitan's, with errors that name the section and the way out."""

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type:
        try:
            return super()._maybe_add_custom_config(args, toml_values)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"job.custom_config_module: {error}; for [{NAME}] set it to {CONFIG_MODULE!r}, a module with a JobConfig"
            ) from error

    def _dict_to_dataclass(self, cls: type, data: dict[str, Any]) -> Any:
        if NAME in data and is_dataclass(cls) and NAME not in (field.name for field in fields(cls)):
            raise ValueError(
                f"unknown section [{NAME}]: set job.custom_config_module = {CONFIG_MODULE!r}, which brings it"
            )
        check_keys(cls, data)
        try:
            return super()._dict_to_dataclass(cls, data)
        except TypeError as error:  # a section that looks at its values before anyone checked their types
            raise ValueError(f"{cls.__name__} cannot be made of {data}: {error}") from error

    def _validate_config(self) -> None:
        check_values(self.config)
        super()._validate_config()


def read_job_config(args: list[str]) -> JobConfig:
    """The job's config as the trainer reads it, custom_import done; values of a TOML are checked as those of the command line are.

    Raises:
        ValueError, OSError: the file or a value in it is wrong. tyro exits by itself on a bad override, with code 2.
    """
    try:
        job_config = _CheckedConfigManager().parse_args(args)
    except (ValueError, AssertionError) as error:  # torchtitan asserts where it checks values
        raise ValueError(f"the job's config is wrong: {error}") from error
    custom_import = job_config.experimental.custom_import
    if NAME in job_config.model.converters and not (custom_import or job_config.job.custom_config_module):
        raise ValueError(
            f"model.converters = {job_config.model.converters}: nothing brings {NAME!r}; set experimental.custom_import = 'blockfp8_titan' "
            f"and job.custom_config_module = {CONFIG_MODULE!r}"
        )
    if custom_import:
        try:
            importlib.import_module(custom_import)
        except Exception as error:
            raise ValueError(
                f"experimental.custom_import = {custom_import!r}: cannot be imported: {type(error).__name__}: {error}; "
                "for blockwise fp8 set it to 'blockfp8_titan', or to 'blockfp8_titan.cpu' to train without an accelerator too"
            ) from error
    return job_config


def plan(job_config: JobConfig, model: nn.Module) -> ConversionReport:
    """What the converter would do to this job's model. The device is not asked whether it can run the backend.

    Args:
        model: as `build_on_meta` builds it.
    Raises:
        ValueError: as the converter would at start-up; or the job does not convert.
    """
    if NAME not in job_config.model.converters:
        raise ValueError(
            f"model.converters = {job_config.model.converters}: has no {NAME!r}, so this job converts nothing; "
            f"add it there or with --model.converters={NAME}"
        )
    if unknown := [name for name in job_config.model.converters if name not in _registry_model_converter_cls]:
        raise ValueError(
            f"model.converters = {job_config.model.converters}: there is no {unknown[0]!r}, only "
            f"{', '.join(map(repr, _registry_model_converter_cls))} and what custom_import registers"
        )
    parallelism = job_config.parallelism
    degree = parallelism.tensor_parallel_degree
    if degree < 1:
        raise ValueError(f"parallelism.tensor_parallel_degree = {degree}: must be at least 1")
    check_job(job_config, degree)
    section = section_of(job_config)
    rules = section.all_rules()
    try:
        fuse = fuse_beside(section, degree)
        report = plan_conversion(
            model, rules, recipe=section.recipe(), fuse=fuse, swiglu_inputs=swiglu_inputs_beside(job_config)
        )
        if job_config.model.name in _supported_models:
            check_tensor_parallel_sizes(report, degree)
    except ValueError as error:
        raise ValueError(f"[{NAME}] {error}") from error
    # The number of ranks is not known here: -1 shards over all that there are.
    fsdp = parallelism.data_parallel_shard_degree != 1 or parallelism.context_parallel_degree > 1
    report = report.with_notes(*notes_on_job(model, report, job_config, degree, fsdp))
    if fsdp and degree == 1 and section.fp8_all_gather:
        report = report.with_notes(*gather_notes(report, gather_obstacles(model, report)))
    return report


def check_tensor_parallel_sizes(report: ConversionReport, degree: int) -> None:
    """Find the shards that fp8 GEMMs cannot take, which the trainer finds when it splits the weights.

    Raises:
        ValueError: as `tensor_parallel.check_weight_shards`.
    """
    for row in report.rows:
        name = row.fqn.rpartition(".")[2]
        if row.in_fp8:
            degrees = degree if name in SPLIT_BY_ROWS else 1, degree if name in SPLIT_BY_COLUMNS else 1
            check_split(row.shape, degrees, row.fqn)


def build_on_meta(job_config: JobConfig) -> nn.Module:
    """The job's model as torchtitan's trainer first builds it: shapes without data.

    Raises:
        ValueError: the model or its flavor is unknown, or cannot be built as the job wants it.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        spec = get_train_spec(name)
    except ValueError as error:
        models = ", ".join(sorted(_supported_models))
        raise ValueError(f"model.name = {name!r}: torchtitan has {models}; custom_import can bring others") from error
    if flavor not in spec.model_args:
        raise ValueError(f"model.flavor = {flavor!r}: {name} has {', '.join(spec.model_args)}")
    model_args = copy.deepcopy(spec.model_args[flavor])  # update_from_config writes to it
    try:
        model_args.update_from_config(job_config)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
            return spec.model_cls(model_args)
    except Exception as error:  # what a model raises of its sizes is its own affair
        raise ValueError(
            f"{name} {flavor} cannot be built for training.seq_len = {job_config.training.seq_len} and the job's other values: "
            f"{type(error).__name__}: {error}"
        ) from error


def simulate_sharding(job_config: JobConfig, model: nn.Module, report: ConversionReport, ranks: int) -> Sharding:
    """How FSDP would split and gather this job's weights on so many ranks.

    Raises:
        ValueError: fewer than one rank, or the job cuts its weights by tensor parallelism too.
    """
    degree = job_config.parallelism.tensor_parallel_degree
    if degree > 1:
        raise ValueError(
            f"--ranks: shows FSDP alone, and parallelism.tensor_parallel_degree = {degree} cuts the weights before it; "
            "add --parallelism.tensor_parallel_degree=1"
        )
    return simulate(
        model,
        report,
        ranks,
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        fp8_all_gather=section_of(job_config).fp8_all_gather,
    )


@contextmanager
def quiet_torchtitan() -> Iterator[None]:
    """Without the remarks on tokenizers and types, and the tracebacks, that torchtitan and tyro give while they read a config."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code, 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m blockfp8_titan.plan",
        description="Show which Linears a torchtitan job would convert to blockwise fp8, how and why.",
        epilog="All other options are torchtitan's: --job.config_file FILE and any override, such as "
        "--blockwise_fp8.rules_file=skip_kv.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there, every Linear in full")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also show how FSDP would shard over N ranks, for each N",
    )
    options, torchtitan_args = parser.parse_known_args(argv)
    try:
        with quiet_torchtitan():
            job_config = read_job_config(torchtitan_args)
            model = build_on_meta(job_config)
            report = plan(job_config, model)
            shardings = [simulate_sharding(job_config, model, report, ranks) for ranks in options.ranks]
        print(f"{job_config.model.name} {job_config.model.flavor}")
        print(report.to_table())
        for sharding in shardings:
            print(f"\n{sharding.to_table()}")
        if options.json:
            everything = report.to_dict() | {"sharding": [asdict(sharding) for sharding in shardings]}
            options.json.write_text(json.dumps(everything, indent=2), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
