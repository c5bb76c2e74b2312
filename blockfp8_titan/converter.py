"""torchtitan's way in: the model converter "blockwise_fp8"."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import _registry_model_converter_cls, register_model_converter
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from .config import BlockwiseFP8
from .conversion import convert_model, gather_weights_in_fp8
from .ops.backend import describe_gemm_backend
from .weight import cache_weights, drop_cached_weights, refresh_scales

NAME = "blockwise_fp8"
REPORT_FILE = "blockwise_fp8_conversion.json"

# torchtitan's own are "quantize.linear.float8", "quantize.grouped_mm.mx" and their like.
_OTHER_QUANTISER = re.compile(r"quanti[sz]|float[48]|fp[48]|int[48]|(^|[._])mx")


def section_of(job_config: JobConfig) -> BlockwiseFP8:
    """The [blockwise_fp8] section; its defaults where `job.custom_config_module` does not bring it."""
    return getattr(job_config, NAME, None) or BlockwiseFP8()


def check_job(job_config: JobConfig, tensor_parallel_degree: int) -> None:
    """Refuse what blockwise fp8 cannot run beside.

    Raises:
        ValueError: another quantising converter, or tensor parallelism; with the way out.
    """
    for other in job_config.model.converters:
        if other != NAME and _OTHER_QUANTISER.search(other):
            raise ValueError(
                f"model.converters = {job_config.model.converters}: {NAME!r} cannot run beside {other!r}, "
                "which quantises too; keep one of the two"
            )
    if tensor_parallel_degree > 1:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {tensor_parallel_degree}: blockwise fp8 needs 1, its ops have no sharding rules "
            f"for tensor parallelism yet; shard with FSDP or pipeline parallelism, or remove {NAME!r} from model.converters"
        )


class BlockwiseFP8Converter:
    """torchtitan's `ModelConverter` for blockwise fp8. Keeps no module: pipeline parallelism copies the model after conversion.

    Raises:
        ValueError: [blockwise_fp8] or its rules_file is wrong, the device cannot run a backend asked for, or the job has another
            quantising converter or tensor parallelism.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        check_job(job_config, parallel_dims.tp)
        self.job_config = job_config
        self.section = section_of(job_config)
        self.rules = self.section.all_rules()
        self.fp8_all_gather = self.section.fp8_all_gather and parallel_dims.fsdp_enabled
        self.cache_weight = self.section.cache_weight and not (parallel_dims.fsdp_enabled or parallel_dims.tp_enabled)
        device = torch.device(utils.device_type)
        try:
            self.backend = describe_gemm_backend(self.section.gemm_backend, device)
        except ValueError as error:
            raise ValueError(f"[{NAME}] {error}") from error
        for placed in self.rules:
            if placed.rule.gemm_backend is not None:
                try:
                    describe_gemm_backend(placed.rule.gemm_backend, device)
                except ValueError as error:
                    raise ValueError(f"[{NAME}] {placed}: {error}") from error

    def convert(self, model: nn.Module) -> None:
        """Swap the Linears that the rules choose; rank 0 logs the report and writes it as JSON to the dump folder.

        Raises:
            ValueError: as `convert_model`; nothing is swapped then.
        """
        try:
            report = convert_model(model, self.rules, recipe=self.section.recipe())
        except ValueError as error:
            raise ValueError(f"[{NAME}] {error}") from error
        if self.fp8_all_gather:
            report = gather_weights_in_fp8(model, report)
        if self.cache_weight:
            cache_weights(model)
        save_fp8_gemms_under_selective_checkpointing(self.job_config.model.name)
        if _rank() == 0:
            name, flavor = self.job_config.model.name, self.job_config.model.flavor
            logger.info(f"Blockwise fp8 conversion of {name} {flavor}:\n{report.to_table()}")
            logger.info(f"Blockwise fp8 GEMM backend: {self.backend}")
            folder = Path(self.job_config.job.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Recompute the multipliers of weights that are gathered in fp8, all in one all-reduce; drop quantised weights."""
        parts = model if isinstance(model, list) else [model]
        refresh_scales(*parts)
        drop_cached_weights(*parts)


def save_fp8_gemms_under_selective_checkpointing(model_name: str) -> None:
    """Let selective activation checkpointing by op save the output of the forward fp8 GEMM, as it saves that of a bf16 one.

    The list of ops to save belongs to a model family's module; families without one have nothing to add to.
    """
    parallelize = sys.modules[get_train_spec(model_name).parallelize_fn.__module__]
    save_list = getattr(parallelize, "_op_sac_save_list", None)
    if save_list is not None:
        save_list.add(torch.ops.blockfp8.gemm_1x128_128x128.default)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", "0"))


# A second import of this module (a reload, a second name in custom_import) must not trip torchtitan's check for new names.
if NAME not in _registry_model_converter_cls:
    register_model_converter(BlockwiseFP8Converter, NAME)
