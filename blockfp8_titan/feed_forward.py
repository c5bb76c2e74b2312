"""w2(silu(w1(x)) * w3(x)) in fp8: x is quantised once, and neither h = silu(gate) * up nor the gradients of gate and up exist in bf16.

    gate, up [M,F] = x w1^T, x w3^T          dgate, dup <- dh, gate, up: quantised in the kernel that computes them
    h        [M,F] = silu(gate) * up:        dx  = dgate w1 + dup w3
             quantised in the same kernel    dw1 = dgate^T x,   dw3 = dup^T x

gate and up themselves are in bf16 and kept for backward.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import ops
from .activation import QuantizedInput, alteration, carrier_like, quantize_input
from .autograd import KnownWeight, output_dtype, refuse_double_backward, shares_weights
from .linear import BlockwiseFP8Linear
from .recipe import Recipe


class Member(NamedTuple):
    """A linear of a feed-forward."""

    linear: nn.Module
    recipe: Recipe | None
    """How it computes in fp8; None where it does not."""

    @classmethod
    def of(cls, linear: nn.Module) -> "Member":
        # A subclass may do anything in its forward; FSDP2's, of a linear that it wraps by itself, gathers the weight there.
        return cls(linear, linear.recipe if type(linear) is BlockwiseFP8Linear else None)


class GatedFeedForward(nn.Module):
    """The forward of a feed-forward with BlockwiseFP8Linears w1 (gate), w2 (down) and w3 (up); the rest is the original class's.

    Where it cannot be followed (hooks on members, DTensors, a recipe changed since) it is the original forward, unfused.
    """

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        gate, down, up = self.w1, self.w2, self.w3
        if isinstance(x, DTensor) or obstacle(Member.of(gate), Member.of(down), Member.of(up)):
            return super().forward(x)
        return down(gated_half(x, gate, up, down))

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Pickle finds classes by name, and this one was made for its original.
        return _new_fused, (type(self).original,), *super().__reduce_ex__(protocol)[2:]


def obstacle(gate: Member, down: Member, up: Member) -> str:
    """Why a feed-forward with these members cannot be fused; empty where it can."""
    for name, (linear, recipe) in (("w1", gate), ("w2", down), ("w3", up)):
        if recipe is None:
            return f"{name} is not in fp8"
        if recipe.wgrad != "fp8":
            return f"{name} has wgrad = {recipe.wgrad!r}"
        if altered := alteration(linear):
            return f"{name} has {altered}"
        if isinstance(linear.weight, DTensor):
            return f"{name} has a sharded weight"
    for name, (linear, _) in (("w1", gate), ("w3", up)):
        if linear.bias is not None:
            return f"{name} has a bias"
    if gate.recipe != up.recipe:
        return "w1 and w3 have different recipes"
    if not down.recipe.quantizes_like(gate.recipe):
        return "w2 quantises in another way than w1 and w3"
    return ""


def gated_half(
    x: Tensor | QuantizedInput, gate: BlockwiseFP8Linear, up: BlockwiseFP8Linear, down: BlockwiseFP8Linear
) -> QuantizedInput:
    """silu(gate(x)) * up(x), [..., F], quantised for `down`.

    Args:
        x: [..., K] bf16 or fp32, quantised already or not.
    """
    recipe = gate.recipe
    for linear in (gate, up):
        linear.check_input(x)
    training = torch.is_grad_enabled()
    wants_dw = training and (gate.weight.requires_grad or up.weight.requires_grad)
    if not isinstance(x, QuantizedInput):
        x = quantize_input(x, recipe, columns=wants_dw, columns_apart=gate.recomputation.columns_apart)
    weights = [linear.known_weight() for linear in (gate, up)]
    dtype, as_backward = output_dtype(x.carrier), shares_weights(x, gate.recomputation)
    with torch.no_grad():
        gate_2d, up_2d = (
            ops.gemm_1x128_128x128(
                *x.rows,
                *weight.along_rows(recipe, as_backward=as_backward),
                dtype,
                backend=recipe.gemm_backend,
                recomputed=linear.recomputation.output,
            )
            for weight, linear in zip(weights, (gate, up), strict=True)
        )
        quantized = _quantize_swiglu(gate_2d, up_2d, down, training and down.weight.requires_grad)
    carrier = _GatedHalf.apply(
        x.carrier,
        *weights[0],
        *weights[1],
        gate_2d,
        up_2d,
        *(x.columns_for_dw() if wants_dw else (None, None)),
        recipe,
        as_backward,
    )
    return QuantizedInput(carrier, tuple(quantized[:2]), tuple(quantized[2:]) or None, recipe.scale_format)


def _quantize_swiglu(gate: Tensor, up: Tensor, down: BlockwiseFP8Linear, columns: bool) -> tuple[Tensor, ...]:
    """Payload and multipliers of the rows of silu(gate) * up, and the same of its columns if asked for."""

    def run(layout: ops.Layout) -> tuple[Tensor, ...]:
        recipe = down.recipe
        return ops.swiglu_quantize_1x128(gate, up, layout, recipe.scale_format, backend=recipe.quantize_backend)

    if not columns:
        return run("rows")
    return (*run("rows"), *run("columns")) if down.recomputation.columns_apart else run("both")


class _GatedHalf(torch.autograd.Function):
    """Connects x, w1 and w3 to the carrier of h; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w1_q: Tensor | None,
        w1_dq: Tensor | None,
        w1t_q: Tensor | None,
        w3: Tensor,
        w3_q: Tensor | None,
        w3_dq: Tensor | None,
        w3t_q: Tensor | None,
        gate: Tensor,
        up: Tensor,
        xt_q: Tensor | None,
        xt_dq: Tensor | None,
        recipe: Recipe,
        as_backward: bool,
    ) -> Tensor:
        kept = KnownWeight(w1, w1_q, w1_dq, w1t_q).to_keep() + KnownWeight(w3, w3_q, w3_dq, w3t_q).to_keep()
        ctx.save_for_backward(*kept, gate, up, xt_q, xt_dq)
        ctx.x_shape, ctx.x_dtype, ctx.w1_dtype, ctx.w3_dtype = x.shape, x.dtype, w1.dtype, w3.dtype
        ctx.recipe, ctx.as_backward = recipe, as_backward
        return carrier_like(gate, (*x.shape[:-1], gate.shape[1]))

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        saved = ctx.saved_tensors
        w1, w3, (gate, up, *x_columns) = KnownWeight(*saved[:4]), KnownWeight(*saved[4:8]), saved[8:]
        wants_dx, wants_dw1, wants_dw3 = (ctx.needs_input_grad[i] for i in (0, 1, 5))
        recipe = ctx.recipe
        options = {"backend": recipe.gemm_backend}
        dgate, dup = ops.swiglu_backward_quantize_1x128_both(
            dh.reshape(-1, dh.shape[-1]), gate, up, recipe.scale_format, backend=recipe.quantize_backend
        )
        dx = dw1 = dw3 = None
        if wants_dx:
            w1_columns, w3_columns = (
                weight.along_columns(recipe, dy[0], as_forward=ctx.as_backward)
                for weight, dy in ((w1, dgate), (w3, dup))
            )
            dx = ops.gemm_1x128_128x128(*dgate[:2], *w1_columns, ctx.x_dtype, **options)
            dx = dx + ops.gemm_1x128_128x128(*dup[:2], *w3_columns, ctx.x_dtype, **options)
            dx = dx.view(ctx.x_shape)
        if wants_dw1:
            dw1 = ops.gemm_1x128_1x128(*dgate[2:], *x_columns, ctx.w1_dtype, **options)
        if wants_dw3:
            dw3 = ops.gemm_1x128_1x128(*dup[2:], *x_columns, ctx.w3_dtype, **options)
        return dx, dw1, None, None, None, dw3, *([None] * 9)


def fuse_feed_forward(module: nn.Module) -> None:
    """Give a feed-forward the forward of GatedFeedForward, in place; its members have no `obstacle`."""
    module.__class__ = _fused(type(module))


@cache
def _fused(original: type[nn.Module]) -> type[nn.Module]:
    return type(original.__name__, (GatedFeedForward, original), {"__doc__": original.__doc__, "original": original})


def _new_fused(original: type[nn.Module]) -> nn.Module:
    """An uninitialised module, for pickle and copy to fill."""
    fused = _fused(original)
    return fused.__new__(fused)
