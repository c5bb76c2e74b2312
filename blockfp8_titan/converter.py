"""torchtitan's way in: the model converter "blockwise_fp8"."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch.torch_version import TorchVersion
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import _registry_model_converter_cls, register_model_converter
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from .checkpointing import checkpointing_note, prepare_for_checkpointing
from .config import BlockwiseFP8
from .conversion import ConversionReport, convert_model, gather_weights_in_fp8
from .environment import describe_device, describe_versions
from .formats import BLOCK
from .ops.backend import describe_gemm_backend
from .recipe import Fuse, SwiGLUInputs
from .recomputation import ActivationSave
from .rotary import has_complex_rope, rotate_in_real_numbers
from .weight import refresh_scales
from .weight_cache import cache_weights, drop_cached_weights

NAME = "blockwise_fp8"
REPORT_FILE = "blockwise_fp8_conversion.json"

FIRST_TORCH_WITHOUT_COMPILED_TP = "2.12"
"""Compiled blocks under tensor parallelism fail in backward from here on; tried up to 2.13 (tests/test_tensor_parallel.py tries again)."""

# torchtitan's own are "quantize.linear.float8", "quantize.grouped_mm.mx" and their like.
_OTHER_QUANTISER = re.compile(r"quanti[sz]|float[48]|fp[48]|int[48]|(^|[._])mx")


def section_of(job_config: JobConfig) -> BlockwiseFP8:
    """The [blockwise_fp8] section; its defaults where `job.custom_config_module` does not bring it."""
    return getattr(job_config, NAME, None) or BlockwiseFP8()


def unused_section(job_config: JobConfig) -> str:
    """What to warn of where a job sets the section and converts nothing; empty elsewhere."""
    if NAME in job_config.model.converters or section_of(job_config) == BlockwiseFP8():
        return ""
    return (
        f"[{NAME}] is set and model.converters = {job_config.model.converters} has no {NAME!r}: nothing is in blockwise fp8; add it there "
        f"or with --model.converters={NAME}"
    )


def check_job(job_config: JobConfig, tensor_parallel_degree: int) -> None:
    """Refuse what blockwise fp8 cannot run beside.

    Raises:
        ValueError: this converter twice or another quantising one; tensor parallelism that is compiled on a torch where that fails,
            or asynchronous; with the way out.
    """
    if job_config.model.converters.count(NAME) > 1:
        raise ValueError(
            f"model.converters = {job_config.model.converters}: {NAME!r} converts a model once; name it once"
        )
    for other in job_config.model.converters:
        if other != NAME and _OTHER_QUANTISER.search(other):
            raise ValueError(
                f"model.converters = {job_config.model.converters}: {NAME!r} cannot run beside {other!r}, "
                "which quantises too; keep one of the two"
            )
    if tensor_parallel_degree > 1:
        check_tensor_parallel_job(job_config, tensor_parallel_degree)


def compiles_blocks(job_config: JobConfig) -> bool:
    return job_config.compile.enable and "model" in job_config.compile.components


def compiles_blocks_by_inductor(job_config: JobConfig) -> bool:
    return compiles_blocks(job_config) and job_config.compile.backend == "inductor"


def checkpoints_by_op(job_config: JobConfig) -> bool:
    """Whether selective activation checkpointing decides op by op."""
    checkpointing = job_config.activation_checkpoint
    return checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op"


def ac_save_of(job_config: JobConfig) -> ActivationSave:
    """What to tell `prepare_for_checkpointing`."""
    if checkpoints_by_op(job_config):
        return section_of(job_config).ac_save
    return "none" if job_config.activation_checkpoint.mode == "full" else "gemm"


def columns_apart(job_config: JobConfig) -> bool:
    """See `Recomputation`: whether blocks are compiled under a checkpoint."""
    return compiles_blocks(job_config) and job_config.activation_checkpoint.mode in ("full", "selective")


def fuse_beside(section: BlockwiseFP8, degree: int) -> Fuse:
    """What to fuse beside tensor parallelism of this degree: its shards go through hooks on norms and Linears."""
    return section.fuse if degree == 1 else "off"


def rotates_in_real_numbers(job_config: JobConfig, degree: int) -> bool:
    """Whether compiled blocks are to compute RoPE without complex numbers, beside tensor parallelism of this degree."""
    return compiles_blocks_by_inductor(job_config) and fuse_beside(section_of(job_config), degree) == "auto"


def swiglu_inputs_beside(job_config: JobConfig) -> SwiGLUInputs:
    """What fused feed-forwards are to keep: where checkpointing computes it again, rounding it would gain nothing."""
    section = section_of(job_config)
    kept = (
        section.ac_save != "none" if checkpoints_by_op(job_config) else job_config.activation_checkpoint.mode == "none"
    )
    return section.swiglu_inputs if kept else "bf16"


def check_tensor_parallel_job(job_config: JobConfig, degree: int) -> None:
    """Raises ValueError, with the way out, for what cannot run under tensor parallelism."""
    asked = f"parallelism.tensor_parallel_degree = {degree}"
    if job_config.parallelism.enable_async_tensor_parallel:
        raise ValueError(
            f"{asked} with enable_async_tensor_parallel = true: that pipelines the collectives of bf16 GEMMs and knows none "
            "of blockwise fp8; set parallelism.enable_async_tensor_parallel = false"
        )
    if compiles_blocks(job_config) and TorchVersion(torch.__version__) >= FIRST_TORCH_WITHOUT_COMPILED_TP:
        raise ValueError(
            f"{asked} with compile.enable = true and 'model' in compile.components: compiled blocks under tensor parallelism fail in "
            f"backward with torch {torch.__version__}, in bf16 too ('Tensor' object has no attribute '_local_tensor'); use torch 2.11, "
            "set compile.components = ['loss'], or shard with FSDP alone"
        )


def note_on_tensor_parallelism(report: ConversionReport, degree: int) -> list[str]:
    """Which Linears have other blocks than on one GPU where tensor parallelism of this degree splits them."""
    fqns = [row.fqn for row in report.rows if row.in_fp8 and any(size % (degree * BLOCK) for size in row.shape)]
    if degree == 1 or not fqns:
        return []
    return [
        f"tensor parallelism splits Linears over {degree} ranks and blocks of {BLOCK} begin anew at the edge of each shard: for "
        f"{len(fqns)} Linears ({fqns[0]} …) out_features / {degree} or in_features / {degree} is no multiple of {BLOCK}, and splitting "
        "that dimension gives other blocks than one GPU has"
    ]


def note_on_gathers(section: BlockwiseFP8, degree: int) -> list[str]:
    """That FSDP gathers unquantised weights where tensor parallelism of this degree shards them too."""
    if degree == 1 or not section.fp8_all_gather:
        return []
    return [
        f"fp8_all_gather = true has no effect beside tensor parallelism of degree {degree}: FSDP gathers each rank's part of a weight in "
        "training.mixed_precision_param, and the rank quantises it"
    ]


def notes_on_job(
    model: nn.Module, report: ConversionReport, job_config: JobConfig, degree: int, fsdp: bool
) -> list[str]:
    """What a report says about the job around the model.

    Args:
        report: of the model's conversion.
        degree: of tensor parallelism.
        fsdp: whether FSDP shards the model.
    """
    section = section_of(job_config)
    notes = note_on_tensor_parallelism(report, degree)
    if fsdp:
        notes += note_on_gathers(section, degree)
    if section.fuse != fuse_beside(section, degree):
        notes.append(f'fuse = "{section.fuse}" has no effect beside tensor parallelism of degree {degree}')
    if rotates_in_real_numbers(job_config, degree) and has_complex_rope(model):
        notes.append("fused: RoPE of compiled blocks, in real numbers")
    if checkpoints_by_op(job_config):
        notes.append(checkpointing_note(report, section.ac_save))
    return notes


class BlockwiseFP8Converter:
    """torchtitan's `ModelConverter` for blockwise fp8. Keeps no module: pipeline parallelism copies the model after conversion.

    Raises:
        ValueError: [blockwise_fp8] or its rules_file is wrong, the device cannot run a backend asked for, or the job has this
            converter twice, another quantising one or a tensor parallelism that cannot run (see `check_job`).
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        check_job(job_config, parallel_dims.tp)
        self.job_config = job_config
        self.section = section_of(job_config)
        self.rules = self.section.all_rules()
        self.tensor_parallel_degree = parallel_dims.tp
        self.fsdp = parallel_dims.fsdp_enabled
        self.fp8_all_gather = (
            self.section.fp8_all_gather and parallel_dims.fsdp_enabled and not parallel_dims.tp_enabled
        )
        self.cache_weight = self.section.cache_weight and not (parallel_dims.fsdp_enabled or parallel_dims.tp_enabled)
        self.world_size = parallel_dims.world_size
        self.device = device = torch.device(utils.device_type)
        try:
            self.backend = describe_gemm_backend(self.section.gemm_backend, device)
        except ValueError as error:
            raise ValueError(f"[{NAME}] {error}") from error
        for placed in self.rules:
            if placed.rule.gemm_backend is not None:
                try:
                    self.backend += f"; by {placed.origin}: {describe_gemm_backend(placed.rule.gemm_backend, device)}"
                except ValueError as error:
                    raise ValueError(f"[{NAME}] {placed}: {error}") from error

    def convert(self, model: nn.Module) -> None:
        """Swap the Linears that the rules choose; rank 0 logs the report and writes it as JSON to the dump folder.

        Raises:
            ValueError: as `convert_model`; nothing is swapped then.
        """
        try:
            fuse = fuse_beside(self.section, self.tensor_parallel_degree)
            report = convert_model(
                model,
                self.rules,
                recipe=self.section.recipe(),
                fuse=fuse,
                swiglu_inputs=swiglu_inputs_beside(self.job_config),
            )
        except ValueError as error:
            raise ValueError(f"[{NAME}] {error}") from error
        if self.fp8_all_gather:
            report = gather_weights_in_fp8(model, report)
        if self.cache_weight:
            cache_weights(model)
        prepare_for_checkpointing(
            model,
            report,
            ac_save_of(self.job_config),
            columns_apart=columns_apart(self.job_config),
        )
        if self.job_config.compile.enable and self.device.type == "cuda":
            name_triton_cache()
        degree = self.tensor_parallel_degree
        rotate_in_real_numbers(model, rotates_in_real_numbers(self.job_config, degree))
        report = report.with_notes(*notes_on_job(model, report, self.job_config, degree, self.fsdp))
        save_fp8_gemms_under_selective_checkpointing(self.job_config.model.name)
        if _rank() == 0:
            name, flavor = self.job_config.model.name, self.job_config.model.flavor
            logger.info(f"Blockwise fp8 conversion of {name} {flavor}:\n{report.to_table()}\n{self.banner()}")
            folder = Path(self.job_config.job.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            written = folder / f"{REPORT_FILE}.part"
            written.write_text(report.to_json(), encoding="utf-8")
            written.replace(folder / REPORT_FILE)  # at once: a reader finds a whole one

    def banner(self) -> str:
        """Who computes, on what and with which versions; below the report, which says what is converted and what falls back."""
        return (
            f"GEMM backend: {self.backend}\ndevice: {describe_device(self.device)}, one of {self.world_size}\n"
            f"versions: {describe_versions()}"
        )

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Recompute the multipliers of weights that are gathered in fp8, all in one all-reduce; drop quantised weights."""
        parts = model if isinstance(model, list) else [model]
        refresh_scales(*parts)
        drop_cached_weights(*parts)


def name_triton_cache() -> None:
    """Name the folder for what Triton compiles as inductor does, unless somebody has.

    Inductor does so when it makes its first kernel, and not in a process in which it finds them all made: our kernels, compiled in the
    one folder, would not be found in the other, and a second start would compile them once more.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(torch.cuda.current_device()))


def save_fp8_gemms_under_selective_checkpointing(model_name: str) -> None:
    """Let selective activation checkpointing by op save the output of the forward fp8 GEMM, as it saves that of a bf16 one, and what
    feed-forwards that are one op keep.

    The list of ops to save belongs to a model family's module; families without one have nothing to add to.
    """
    parallelize = sys.modules[get_train_spec(model_name).parallelize_fn.__module__]
    save_list = getattr(parallelize, "_op_sac_save_list", None)
    if save_list is not None:
        save_list.update((torch.ops.blockfp8.gemm_1x128_128x128.default, torch.ops.blockfp8.gated_feed_forward.default))


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", "0"))


# A second import of this module (a reload, a second name in custom_import) must not trip torchtitan's check for new names.
if NAME not in _registry_model_converter_cls:
    register_model_converter(BlockwiseFP8Converter, NAME)
