"""An activation that is quantised once, where it is made, for all linears that multiply it."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from . import ops
from .ops.layouts import Quantized
from .recipe import Recipe, ScaleFormat, WeightGradient


class QuantizedInput:
    """An activation [..., K] in fp8, M tokens in all; passes from a module that quantises to the linears that multiply.

    A plain object, not a tensor: nothing but a BlockwiseFP8Linear can compute with it, and modules in between may only read its
    shape. Not a dataclass either: FSDP2 goes into those to cast the tensors that a module receives, payloads too.

    Args:
        carrier: [..., K]: has the activation's shape and dtype and its place in autograd's graph, which dx flows into. Not its
            values.
        rows: as `ops.quantize_1x128` of [M, K]: what y is computed from.
        columns: what dw is computed from, as `ops.quantize_1x128_columns` of [M, K], under wgrad = "fp8_block" as
            `ops.quantize_128x128_columns`; None where no gradient was asked for, and under "bf16".
        scale_format: of both.
        wgrad: how dw is computed of it.
    """

    def __init__(
        self,
        carrier: Tensor,
        rows: Quantized,
        columns: Quantized | None,
        scale_format: ScaleFormat,
        wgrad: WeightGradient,
    ) -> None:
        self.carrier = carrier
        self.rows = rows
        self.columns = columns
        self.scale_format = scale_format
        self.wgrad = wgrad

    @property
    def shape(self) -> torch.Size:
        return self.carrier.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.carrier.dtype

    @property
    def device(self) -> torch.device:
        return self.carrier.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.carrier.shape if dim is None else self.carrier.shape[dim]

    def columns_for_dw(self) -> Quantized:
        """Raises RuntimeError where there are none."""
        if self.columns is None:
            raise RuntimeError(
                "an input quantised without gradients (under torch.no_grad) meets a weight that wants one: run the module that "
                'quantises, such as the norm before, with gradients enabled, or convert with fuse = "off"'
            )
        return self.columns


def carrier_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """NaN of this shape, dtype and device at the cost of one element: a reader of values that are not there finds out."""
    return x.new_full((), math.nan).expand(shape)


@torch.no_grad()
def quantize_input(x: Tensor, recipe: Recipe, *, columns: bool, columns_apart: bool = False) -> QuantizedInput:
    """Quantise an activation that exists; its carrier is itself.

    Args:
        x: [..., K] bf16 or fp32.
        columns: dw will be asked for, and recipe.wgrad is not "bf16".
        columns_apart: see `Recomputation`.
    """
    x_2d, options = x.reshape(-1, x.shape[-1]), {"backend": recipe.quantize_backend}
    if columns and not columns_apart and not recipe.x_in_blocks:
        quantized: tuple[Tensor, ...] = ops.quantize_1x128_both(x_2d, recipe.scale_format, **options)
    else:
        quantized = ops.quantize_1x128(x_2d, recipe.scale_format, **options)
        if columns:
            quantize_columns = ops.quantize_128x128_columns if recipe.x_in_blocks else ops.quantize_1x128_columns
            quantized += quantize_columns(x_2d, recipe.scale_format, **options)
    return QuantizedInput(x, quantized[:2], quantized[2:] or None, recipe.scale_format, recipe.wgrad)


def alteration(module: nn.Module) -> str:
    """What somebody has put on a module that a fused neighbour would not respect; empty where there is nothing.

    Hooks would not see the tensors that they know, and a forward that stands before the class's would not be called.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    return "a forward of its own" if "forward" in module.__dict__ else ""
