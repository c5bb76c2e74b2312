"""The [blockwise_fp8] section, for `job.custom_config_module = "blockfp8_titan.config"`.

torchtitan merges `JobConfig` into its own and lets tyro read overrides from the command line; both look at the annotations as
objects, so this module must not postpone their evaluation (no `from __future__ import annotations`).
"""

from dataclasses import dataclass, field
from typing import Annotated, get_args

import tyro

from .recipe import Fuse, GemmBackend, Recipe, ScaleFormat, SwiGLUInputs, WeightGradient
from .recomputation import ActivationSave
from .rules import PlacedRule, Rule, load_rules_file, rules_from

# tyro's own booleans are flags (`--a.b`, `--a.no-b`) and refuse `--a.b=false`.
Boolean = tyro.conf.FlagConversionOff[
    Annotated[
        bool,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            choices=("true", "false", "True", "False"),
            instance_from_str=lambda args: args[0].lower() == "true",
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        ),
    ]
]


@dataclass
class BlockwiseFP8:
    """Blockwise-fp8 linears: 1x128 activations and gradients, 128x128 weights, e4m3.

    Raises:
        ValueError: names the key (and the rule's position), its value and the requirement.
    """

    gemm_backend: GemmBackend = "auto"
    """
    Which kernels multiply: "auto" takes what suits the device; "triton" and "cublas" are errors where they cannot run;
    "reference" is plain PyTorch, on any device, slow.
    """

    wgrad: WeightGradient = "fp8"
    """
    Weight gradient dw = dy^T x: "fp8" scales both operands in groups of 128, "fp8_block" scales x in blocks of 128x128 (faster),
    "bf16" does not quantise.
    """

    scale_format: ScaleFormat = "fp32"
    """Dequantisation multipliers: "fp32" exact, "pow2" rounded up to a power of two."""

    fp8_all_gather: Boolean = True
    """
    FSDP2 gathers the weights of converted Linears in fp8, one byte per element, with multipliers that an all-reduce after each
    optimizer step makes known (4 bytes per 128x128 weights). Master weights are rounded once, to fp8; otherwise twice, first
    to training.mixed_precision_param.
    """

    cache_weight: Boolean = True
    """
    Without FSDP2: keep quantised weights until the next optimizer step, at two bytes per element, instead of quantising them
    in each forward and each backward. Pays with gradient accumulation or pipeline parallelism.
    """

    fuse: Fuse = "auto"
    """
    Norms and feed-forwards that quantise what they compute in the kernel that computes it, and RoPE of compiled Llama blocks in one
    kernel: "auto" where the model has torchtitan's Llama, Qwen or DeepSeek blocks, "off" nowhere.
    """

    swiglu_inputs: SwiGLUInputs = "fp8"
    """
    What fused feed-forwards keep of w1(x) and w3(x), SwiGLU's inputs, for backward: "fp8" e4m3 in groups of 128, half of the bytes, so
    that checkpointing by op need not compute them again, at the cost of some accuracy of gradients; "bf16" the values. No effect
    where nothing is fused, or under checkpointing that keeps neither.
    """

    ac_save: ActivationSave = "balanced"
    """
    Which outputs of fp8 GEMMs selective activation checkpointing by op keeps: "gemm" all, the fastest; "balanced" somewhat fewer
    bytes than it keeps of a bf16 model; "none" none, the smallest.
    """

    health_freq: int = 500
    """
    Every so many steps, measure what quantisation did to the input, weight and gradient of each converted Linear. A step so observed
    takes several times its time; 0 turns it off.
    """

    rules_file: str = ""
    """
    A TOML file with [[rules]] (a path, relative to the working directory) or a preset's name; its rules stand before those
    of this section.
    """

    rules: list[Rule] = field(default_factory=list)
    """
    Which Linears are converted and how; the first match decides. On the command line a rule of the TOML is overridden by its
    index (--blockwise_fp8.rules.0.match=...); to add rules there, use --blockwise_fp8.rules_file.
    """

    def __post_init__(self) -> None:
        for name in ("fp8_all_gather", "cache_weight"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"[blockwise_fp8] {name} = {value!r}: must be true or false")
        for name, choices in (
            ("fuse", Fuse),
            ("swiglu_inputs", SwiGLUInputs),
            ("ac_save", ActivationSave),
        ):
            if (value := getattr(self, name)) not in get_args(choices):
                allowed = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"[blockwise_fp8] {name} = {value!r}: must be one of {allowed}")
        freq = self.health_freq
        if not isinstance(freq, int) or isinstance(freq, bool) or freq < 0:
            raise ValueError(f"[blockwise_fp8] health_freq = {freq!r}: must be a number of steps, or 0 for never")
        if not isinstance(self.rules_file, str):
            raise ValueError(f"[blockwise_fp8] rules_file = {self.rules_file!r}: must be a path or a preset's name")
        if not isinstance(self.rules, list):
            raise ValueError(
                f"[blockwise_fp8] rules = {self.rules!r}: must be an array of tables, each under [[blockwise_fp8.rules]]"
            )
        try:
            self.recipe()
            self.rules = [placed.rule for placed in rules_from(self.rules)]
        except ValueError as error:
            raise ValueError(f"[blockwise_fp8] {error}") from error

    def recipe(self) -> Recipe:
        """How a converted Linear computes where its rule says nothing."""
        return Recipe(gemm_backend=self.gemm_backend, wgrad=self.wgrad, scale_format=self.scale_format)

    def all_rules(self) -> list[PlacedRule]:
        """The rules of rules_file, then those of this section.

        Reads the file here and not on construction: torchtitan constructs the section once before command line overrides apply.

        Raises:
            ValueError: rules_file cannot be read; names the file and what is wrong.
        """
        try:
            from_file = load_rules_file(self.rules_file) if self.rules_file else []
        except ValueError as error:
            raise ValueError(f"[blockwise_fp8] {error}") from error
        return from_file + rules_from(self.rules)


@dataclass
class JobConfig:
    """What torchtitan's JobConfig gains."""

    blockwise_fp8: BlockwiseFP8 = field(default_factory=BlockwiseFP8)
