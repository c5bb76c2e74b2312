"""How one linear computes in fp8: the few choices that a rule in the TOML can make for it."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

GemmBackend = Literal["auto", "triton", "cublas", "reference"]
WeightGradient = Literal["fp8", "bf16", "fp8_block"]
ScaleFormat = Literal["fp32", "pow2"]
Fuse = Literal["auto", "off"]
SwiGLUInputs = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Recipe:
    """The numerics and the backend of one blockwise-fp8 linear.

    Raises:
        ValueError: names the field, its value and the values allowed.
    """

    gemm_backend: GemmBackend = "auto"
    """Who multiplies: "auto" takes what suits the device, "reference" is plain PyTorch (any device, slow)."""

    wgrad: WeightGradient = "fp8"
    """dw = dy^T x: "fp8" scales both operands per 1x128, "fp8_block" scales x per 128x128, "bf16" does not quantise."""

    scale_format: ScaleFormat = "fp32"
    """Dequantisation multipliers: "fp32" exact, "pow2" rounded up to a power of two."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if value not in allowed:
                raise ValueError(f"{field.name} = {value!r}: must be one of {', '.join(map(repr, allowed))}")

    @property
    def quantize_backend(self) -> Literal["auto", "reference"]:
        """Who quantises for that GEMM backend."""
        return "reference" if self.gemm_backend == "reference" else "auto"

    @property
    def x_in_blocks(self) -> bool:
        """Whether dw is computed of x in blocks of 128x128."""
        return self.wgrad == "fp8_block"

    def quantizes_like(self, other: "Recipe") -> bool:
        """Whether what the one quantises for y and dw the other can multiply."""
        keys = [(recipe.wgrad, recipe.scale_format, recipe.quantize_backend) for recipe in (self, other)]
        return keys[0] == keys[1]


def check_recipe(recipe: object) -> None:
    """Raises ValueError unless this is a Recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe = {recipe!r}: must be a Recipe, such as Recipe(wgrad='bf16')")
