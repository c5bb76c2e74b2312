"""w2(silu(w1(x)) * w3(x)) in fp8: x is quantised once, and neither h = silu(gate) * up nor the gradients of gate and up exist in bf16.

    gate, up [M,F] = x w1^T, x w3^T          dgate, dup <- dh, gate, up: quantised in the kernel that computes them
    h        [M,F] = silu(gate) * up:        dx  = dgate w1 + dup w3
             quantised in the same kernel    dw1 = dgate^T x,   dw3 = dup^T x
    y        [M,K] = h w2^T                  dh  = dy w2,       dw2 = dy^T h: of h computed again, with dgate and dup

gate and up themselves are kept for backward, in bf16 or, at half of the bytes, quantised in the kernel that computes h; of h nothing
is. In fp8 they cost all gradients some of their accuracy; y does not depend on it.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import ops
from .activation import QuantizedInput, alteration, quantize_input
from .autograd import KnownWeight, dw_gemm, output_dtype, refuse_double_backward, shares_weights
from .linear import BlockwiseFP8Linear
from .recipe import Recipe, SwiGLUInputs


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

    swiglu_inputs: SwiGLUInputs = "bf16"

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        gate, down, up = self.w1, self.w2, self.w3
        if isinstance(x, DTensor) or obstacle(Member.of(gate), Member.of(down), Member.of(up)):
            return super().forward(x)
        return gated_feed_forward(x, gate, up, down, self.swiglu_inputs)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Pickle finds classes by name, and this one was made for its original.
        return _new_fused, (type(self).original,), *super().__reduce_ex__(protocol)[2:]


def obstacle(gate: Member, down: Member, up: Member) -> str:
    """Why a feed-forward with these members cannot be fused; empty where it can."""
    for name, (linear, recipe) in (("w1", gate), ("w2", down), ("w3", up)):
        if recipe is None:
            return f"{name} is not in fp8"
        if recipe.wgrad == "bf16":
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


def gated_feed_forward(
    x: Tensor | QuantizedInput,
    gate: BlockwiseFP8Linear,
    up: BlockwiseFP8Linear,
    down: BlockwiseFP8Linear,
    swiglu_inputs: SwiGLUInputs,
) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    Args:
        x: [..., K] bf16 or fp32, quantised already or not.
        swiglu_inputs: what is kept of gate(x) and up(x) for backward: "bf16" the values, in the dtype computed in; "fp8" quantised,
            unless `Recomputation` says that checkpointing keeps neither.
    Returns:
        [..., K]: as `down` returns it.
    """
    recipe, dtype = gate.recipe, output_dtype(x.carrier if isinstance(x, QuantizedInput) else x)
    for linear in (gate, up):
        linear.check_input(x)
    down.check_operand((*x.shape[:-1], gate.weight.shape[0]), dtype)
    upstream_weights = gate.weight.requires_grad or up.weight.requires_grad
    wants_dw = torch.is_grad_enabled() and upstream_weights
    if not isinstance(x, QuantizedInput):
        x = quantize_input(x, recipe, columns=wants_dw, columns_apart=gate.recomputation.columns_apart)
    # Not for dw2 alone, which h is computed from their values for; nor where nothing is kept.
    wants_gradients = torch.is_grad_enabled() and (x.carrier.requires_grad or upstream_weights)
    inputs_in_fp8 = swiglu_inputs == "fp8" and wants_gradients and not gate.recomputation.output
    y = _GatedFeedForward.apply(
        x.carrier,
        *(tensor for linear in (gate, up, down) for tensor in linear.known_weight()),
        *x.rows,
        *(x.columns_for_dw() if wants_dw else (None, None)),
        dtype,
        recipe,
        down.recipe,
        tuple(linear.recomputation.output for linear in (gate, up, down)),
        inputs_in_fp8,
        shares_weights(x.carrier.requires_grad, gate.recomputation),
        shares_weights(x.carrier.requires_grad or upstream_weights, down.recomputation),
    )
    return y if down.bias is None else y + down.bias.to(y.dtype)


class _GatedFeedForward(torch.autograd.Function):
    """See the module's docstring.

    Of x, rows are multiplied here and columns kept for dw1 and dw3, under wgrad = "fp8_block" in blocks, as h for dw2. dtype: of y, gate
    and up. inputs_in_fp8: gate and up are kept so, by one op; else recomputed says of which GEMMs (of gate, of up, of y) checkpointing
    computes the outputs again.
    """

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
        w2: Tensor,
        w2_q: Tensor | None,
        w2_dq: Tensor | None,
        w2t_q: Tensor | None,
        x_q: Tensor,
        x_dq: Tensor,
        xt_q: Tensor | None,
        xt_dq: Tensor | None,
        dtype: torch.dtype,
        recipe: Recipe,
        down_recipe: Recipe,
        recomputed: tuple[bool, bool, bool],
        inputs_in_fp8: bool,
        as_backward: bool,
        down_as_backward: bool,
    ) -> Tensor:
        gate_weight, up_weight = KnownWeight(w1, w1_q, w1_dq, w1t_q), KnownWeight(w3, w3_q, w3_dq, w3t_q)
        down_weight = KnownWeight(w2, w2_q, w2_dq, w2t_q)
        w1_rows, w3_rows = (w.along_rows(recipe, as_backward=as_backward) for w in (gate_weight, up_weight))
        w2_rows = down_weight.along_rows(down_recipe, as_backward=down_as_backward)
        if inputs_in_fp8:
            y, gate, up = ops.gated_feed_forward(
                (x_q, x_dq),
                *(w1_rows, w3_rows, w2_rows, dtype, recipe.scale_format),
                backend=recipe.gemm_backend,
                down_backend=down_recipe.gemm_backend,
                quantize_backend=recipe.quantize_backend,
            )
        else:
            gate, up = (
                (ops.gemm_1x128_128x128(x_q, x_dq, *rows, dtype, backend=recipe.gemm_backend, recomputed=again), None)
                for rows, again in ((w1_rows, recomputed[0]), (w3_rows, recomputed[1]))
            )
            h = ops.swiglu_quantize_1x128(gate[0], up[0], "rows", recipe.scale_format, backend=recipe.quantize_backend)
            y = ops.gemm_1x128_128x128(*h, *w2_rows, dtype, backend=down_recipe.gemm_backend, recomputed=recomputed[2])
        weights = (gate_weight, up_weight, down_weight)
        ctx.save_for_backward(*(t for w in weights for t in w.to_keep()), *gate, *up, xt_q, xt_dq)
        ctx.x_shape, ctx.x_dtype, ctx.w_dtypes, ctx.dtype = x.shape, x.dtype, [w.dtype for w in (w1, w3, w2)], dtype
        ctx.recipe, ctx.down_recipe = recipe, down_recipe
        ctx.as_backward, ctx.down_as_backward = as_backward, down_as_backward
        return y.view(*x.shape[:-1], w2.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        saved = ctx.saved_tensors
        w1, w3, w2 = (KnownWeight(*saved[i : i + 4]) for i in (0, 4, 8))
        gate, gate_dq, up, up_dq, *x_columns = saved[12:]
        wants_dx, wants_dw1, wants_dw3, wants_dw2 = (ctx.needs_input_grad[i] for i in (0, 1, 5, 9))
        recipe = ctx.recipe
        quantizing = {"scale_format": recipe.scale_format, "backend": recipe.quantize_backend}
        options, down_options = ({"backend": r.gemm_backend} for r in (recipe, ctx.down_recipe))
        multiply_for_dw = dw_gemm(recipe)
        h_layout: ops.HLayout = "blocks" if recipe.x_in_blocks else "columns"
        dx = dw1 = dw3 = dw2 = None

        quantize = ops.quantize_1x128_both if wants_dw2 else ops.quantize_1x128
        quantized = quantize(dy.reshape(-1, dy.shape[-1]), **quantizing)
        h: tuple[Tensor, ...] = ()
        if wants_dx or wants_dw1 or wants_dw3:
            w2_columns = w2.along_columns(ctx.down_recipe, quantized[0], as_forward=ctx.down_as_backward)
            dh = ops.gemm_1x128_128x128(*quantized[:2], *w2_columns, ctx.dtype, **down_options)
            dgate, dup, *rest = ops.swiglu_backward_quantize_1x128_both(
                dh, gate, up, gate_dq=gate_dq, up_dq=up_dq, h=h_layout if wants_dw2 else None, **quantizing
            )
            h = rest[0] if rest else ()
            del dh, rest  # memory: the GEMMs below need neither
        else:
            h = ops.swiglu_quantize_1x128(gate, up, h_layout, **quantizing)
        if wants_dw2:
            dw2 = multiply_for_dw(*quantized[2:], *h, ctx.w_dtypes[2], **down_options)
        del quantized, h
        if wants_dx:
            w1_columns, w3_columns = (
                weight.along_columns(recipe, dy_q[0], as_forward=ctx.as_backward)
                for weight, dy_q in ((w1, dgate), (w3, dup))
            )
            dx = ops.gemm_1x128_128x128(*dgate[:2], *w1_columns, ctx.x_dtype, **options)
            dx = dx + ops.gemm_1x128_128x128(*dup[:2], *w3_columns, ctx.x_dtype, **options)
            dx = dx.view(ctx.x_shape)
        if wants_dw1:
            dw1 = multiply_for_dw(*dgate[2:], *x_columns, ctx.w_dtypes[0], **options)
        if wants_dw3:
            dw3 = multiply_for_dw(*dup[2:], *x_columns, ctx.w_dtypes[1], **options)
        return dx, dw1, None, None, None, dw3, None, None, None, dw2, *([None] * 14)


def fuse_feed_forward(module: nn.Module, swiglu_inputs: SwiGLUInputs) -> None:
    """Give a feed-forward the forward of GatedFeedForward, in place; its members have no `obstacle`."""
    module.__class__ = _fused(type(module))
    module.swiglu_inputs = swiglu_inputs


@cache
def _fused(original: type[nn.Module]) -> type[nn.Module]:
    return type(original.__name__, (GatedFeedForward, original), {"__doc__": original.__doc__, "original": original})


def _new_fused(original: type[nn.Module]) -> nn.Module:
    """An uninitialised module, for pickle and copy to fill."""
    fused = _fused(original)
    return fused.__new__(fused)
