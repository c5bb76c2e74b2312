"""RMSNorm whose result goes to fp8 linears alone: it is quantised in the kernel that computes it, and never written in bf16."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import ops
from .activation import QuantizedInput, alteration, carrier_like
from .autograd import refuse_double_backward
from .recipe import Recipe
from .recomputation import Recomputation


class QuantizingRMSNorm(nn.RMSNorm):
    """An nn.RMSNorm that returns a QuantizedInput: x / sqrt(mean(x^2) + eps) * weight, rounded to x's dtype, then to fp8.

    Made of an nn.RMSNorm by `quantize_output_of`; parameters and state dict are that one's. Where the kernel cannot follow (hooks,
    DTensors, a weight of another dtype than x, a recipe changed to wgrad = "bf16") it is the nn.RMSNorm that it was, and the linears
    quantise.

    Shape:
        [..., K] bf16 or fp32 -> [..., K].
    """

    recipe: Recipe
    """Of the linears that multiply the result."""

    recomputation: Recomputation = Recomputation()
    """What activation checkpointing computes again."""

    def forward(self, x: Tensor) -> Tensor | QuantizedInput:
        weight = self.weight
        sharded = isinstance(x, DTensor) or isinstance(weight, DTensor)
        if sharded or x.dtype != weight.dtype or self.recipe.wgrad == "bf16" or alteration(self):
            return super().forward(x)
        columns = torch.is_grad_enabled()
        with torch.no_grad():
            *quantized, rstd = self._quantize(x.reshape(-1, x.shape[-1]), weight, columns)
        carrier = _RMSNorm.apply(x, weight, rstd)
        rows, for_dw = tuple(quantized[:2]), tuple(quantized[2:]) or None
        return QuantizedInput(carrier, rows, for_dw, self.recipe.scale_format, self.recipe.wgrad)

    def _quantize(self, x: Tensor, weight: Tensor, columns: bool) -> tuple[Tensor, ...]:
        """Payload and multipliers of x's rows, the same of its columns, or blocks, if asked for, and rstd [M]."""

        def run(layout: ops.Layout, rstd: Tensor | None = None) -> tuple[Tensor, ...]:
            recipe = self.recipe
            return ops.rms_norm_quantize_1x128(
                x, weight, self.eps, layout, recipe.scale_format, rstd=rstd, backend=recipe.quantize_backend
            )

        if not columns:
            return run("rows")
        layout: ops.Layout = "blocks" if self.recipe.x_in_blocks else "columns"
        if layout == "columns" and not self.recomputation.columns_apart:
            return run("both")
        *rows, rstd = run("rows")
        # Where backward has no use for the rows, it need not run the first op again for rstd alone.
        again = self.recomputation.columns_apart and not self.recomputation.output
        return *rows, *run(layout, None if again else rstd)


def fused_gradients_run(dy: Tensor) -> bool:
    """Whether RMSNorm's gradients are PyTorch's kernel; elsewhere it has none, and compiled inductor makes one of the formula."""
    return not torch.compiler.is_compiling() and dy.is_cuda and dy.numel() > 0


class _RMSNorm(torch.autograd.Function):
    """Connects x and weight to the carrier of their quantised RMSNorm; rstd [M]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, rstd)
        return carrier_like(x, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, weight, rstd = ctx.saved_tensors
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        if fused_gradients_run(dy):
            rstd = rstd.view(*x.shape[:-1], 1)
            mask = [wants_dx, wants_dw]
            return *torch.ops.aten._fused_rms_norm_backward(dy, x, weight.shape, rstd, weight, mask), None
        dy_2d = dy.reshape(-1, dy.shape[-1]).float()
        normalized = x.reshape(dy_2d.shape).float() * rstd[:, None]
        dx = dw = None
        if wants_dx:
            dn = dy_2d * weight.float()
            dx = (dn - normalized * (dn * normalized).mean(1, keepdim=True)) * rstd[:, None]
            dx = dx.to(x.dtype).view(x.shape)
        if wants_dw:
            dw = (dy_2d * normalized).sum(0).to(weight.dtype)
        return dx, dw, None


def quantize_output_of(norm: nn.RMSNorm, recipe: Recipe) -> None:
    """Make an nn.RMSNorm a QuantizingRMSNorm, in place; what multiplies its result must take a QuantizedInput."""
    assert type(norm) is nn.RMSNorm and norm.eps is not None and norm.elementwise_affine
    norm.__class__ = QuantizingRMSNorm
    norm.recipe = recipe
