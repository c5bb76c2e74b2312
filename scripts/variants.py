"""`experimental.custom_import = "variants"`, for measurements: the plugin, cut models and peers' converters.

Records the runs of all converters as metrics.jsonl, and registers
- every flavor of Llama 3 cut to n layers as "FLAVOR-nL" ("8B-4L"), for GPUs that the whole model does not fit;
- the converter "torchao_blockwise": torchao's Float8BlockwiseLinear with cuBLASLt's GEMMs, which torchtitan does not offer;
- the converter "save_scaled_mm", to stand after another: selective activation checkpointing by op then keeps the outputs of
  `torch._scaled_mm`, which torchtitan's list lacks;
- the converter "real_rope", to stand after another or alone: RoPE of compiled blocks as this package computes it.
"""

import dataclasses
import sys

import torch
import torch.nn as nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import llama3_args
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

import blockfp8_titan.cpu  # noqa: F401
from blockfp8_titan.converter import compiles_blocks_by_inductor
from blockfp8_titan.metrics import record_every_job
from blockfp8_titan.rotary import has_complex_rope, rotate_in_real_numbers

LAYERS = {flavor: args.n_layers for flavor, args in llama3_args.items()}


class TorchaoBlockwise:
    """Every nn.Linear but `output` whose sizes are multiples of 128 becomes a Float8BlockwiseLinear."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        pass

    def convert(self, model: nn.Module) -> None:
        from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear

        count = 0
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                aligned = type(child) is nn.Linear and child.in_features % 128 == child.out_features % 128 == 0
                if aligned and name != "output":
                    setattr(parent, name, Float8BlockwiseLinear.from_float(child))
                    count += 1
        logger.info(f"torchao blockwise: converted {count} Linears")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        pass


class RealRoPE:
    """RoPE of compiled blocks in real numbers; changes no module.

    Raises:
        ValueError: nothing is compiled by inductor, or the model has no RoPE of this kind; runs would be named for what they do not do.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        if not compiles_blocks_by_inductor(job_config):
            raise ValueError(
                'real_rope: blocks must be compiled by inductor; set compile.enable = true, or leave out "+rope"'
            )

    def convert(self, model: nn.Module) -> None:
        if not has_complex_rope(model):
            raise ValueError('real_rope: the model computes no RoPE in complex numbers; leave out "+rope"')
        rotate_in_real_numbers(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        pass


class SaveScaledMM:
    """Adds `_scaled_mm` to the save list of the model's family; changes no module."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        parallelize = sys.modules[get_train_spec(job_config.model.name).parallelize_fn.__module__]
        parallelize._op_sac_save_list.add(torch.ops.aten._scaled_mm.default)

    def convert(self, model: nn.Module) -> None:
        pass

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        pass


for flavor, layers in LAYERS.items():
    for n in range(1, layers):
        llama3_args[f"{flavor}-{n}L"] = dataclasses.replace(llama3_args[flavor], n_layers=n)
register_model_converter(TorchaoBlockwise, "torchao_blockwise")
register_model_converter(RealRoPE, "real_rope")
register_model_converter(SaveScaledMM, "save_scaled_mm")
record_every_job()
