"""python -m blockfp8_titan.plan --job.config_file X: which Linears a job would convert, without a GPU, weights or other processes."""

import argparse
import copy
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager, JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import set_default_dtype

from .conversion import ConversionReport, gather_notes, gather_obstacles, plan_conversion
from .converter import NAME, check_job, fuse_beside, notes_on_job, section_of
from .shards import Sharding, simulate


def read_job_config(args: list[str]) -> JobConfig:
    """The job's config as the trainer reads it, custom_import done.

    Raises:
        ValueError, OSError, ImportError: the file or a value in it is wrong. tyro exits by itself on a bad override, with code 2.
    """
    try:
        job_config = ConfigManager().parse_args(args)
    except (ValueError, AssertionError) as error:  # torchtitan asserts where it checks values
        raise ValueError(f"the job's config is wrong: {error}") from error
    if job_config.experimental.custom_import:
        importlib.import_module(job_config.experimental.custom_import)
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
    parallelism = job_config.parallelism
    degree = parallelism.tensor_parallel_degree
    check_job(job_config, degree)
    section = section_of(job_config)
    report = plan_conversion(model, section.all_rules(), recipe=section.recipe(), fuse=fuse_beside(section, degree))
    # The number of ranks is not known here: -1 shards over all that there are.
    fsdp = parallelism.data_parallel_shard_degree != 1 or parallelism.context_parallel_degree > 1
    report = report.with_notes(*notes_on_job(report, job_config, degree, fsdp))
    if fsdp and degree == 1 and section.fp8_all_gather:
        report = report.with_notes(*gather_notes(report, gather_obstacles(model, report)))
    return report


def build_on_meta(job_config: JobConfig) -> nn.Module:
    """The job's model as torchtitan's trainer first builds it: shapes without data.

    Raises:
        ValueError: the model or its flavor is unknown.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    spec = get_train_spec(name)
    if flavor not in spec.model_args:
        raise ValueError(f"model.flavor = {flavor!r}: {name} has {', '.join(spec.model_args)}")
    model_args = copy.deepcopy(spec.model_args[flavor])  # update_from_config writes to it
    model_args.update_from_config(job_config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
        return spec.model_cls(model_args)


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
    """Without the remarks on tokenizers and the tracebacks that torchtitan logs while it reads a config."""
    logging.disable(logging.CRITICAL)
    try:
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
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
