"""The three GEMMs of a linear layer, differentiable: what is quantised when, and what is kept for backward.

    y  [M,N] = x  w^T     x in 1x128 along K,    w in 128x128
    dx [M,K] = dy w       dy in 1x128 along N,   w^T in 128x128 (the same blocks, transposed)
    dw [N,K] = dy^T x     dy^T and x^T in 1x128 along M, under wgrad = "fp8_block" x^T in 128x128

Numerics of DeepSeek-V3 (arXiv:2412.19437, section 3.3), with 1x128 instead of 128x1 regrouping done from the original values.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .activation import QuantizedInput, quantize_input
from .ops.library import FLOATS
from .recipe import Recipe
from .recomputation import Recomputation


class KnownWeight(NamedTuple):
    """A weight and what is known of its quantised forms. Tensors side by side, as autograd wants them."""

    w: Tensor
    """[N, K]: the parameter, which dw is the gradient of."""
    w_q: Tensor | None = None
    w_dq: Tensor | None = None
    """As `ops.quantize_128x128(w)`."""
    wt_q: Tensor | None = None
    """As `ops.transpose_fp8(w_q)`."""

    def to_keep(self) -> tuple[Tensor | None, ...]:
        """For backward: what was given. FSDP2 frees that memory after the forward and gathers into it again for backward."""
        return (self.w if self.w_q is None else None, *self[1:])

    def along_rows(self, recipe: Recipe, *, as_backward: bool) -> tuple[Tensor, Tensor]:
        """w's payload and multipliers, for y; as_backward: by the op that `along_columns` calls, see `shares_weights`."""
        if self.w_q is not None:
            return self.w_q, self.w_dq
        options = {"scale_format": recipe.scale_format, "backend": recipe.quantize_backend}
        return (
            ops.quantize_128x128_both(self.w, **options)[:2] if as_backward else ops.quantize_128x128(self.w, **options)
        )

    def along_columns(self, recipe: Recipe, dy_q: Tensor, *, as_forward: bool) -> tuple[Tensor, Tensor]:
        """w^T's payload and multipliers, for dx.

        They do not depend on a gradient. A compiler would compute some in forward and keep them, where FSDP2 frees the weight.

        Args:
            dy_q: what they are multiplied with.
            as_forward: by the op that `along_rows` called, see `shares_weights`.
        """
        if self.w_q is None:
            options = {"backend": recipe.quantize_backend, "after": None if as_forward else dy_q}
            _, w_dq, wt_q = ops.quantize_128x128_both(self.w, recipe.scale_format, **options)
            return wt_q, w_dq.t()
        return ops.transpose_fp8(self.w_q, after=dy_q) if self.wt_q is None else self.wt_q, self.w_dq.t()


class _BlockwiseFP8Matmul(torch.autograd.Function):
    """y = x w^T; see the module's docstring.

    Of x, rows are multiplied here. x_kept: what dw takes of x: its columns, under wgrad = "bf16" x itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        w_q: Tensor | None,
        w_dq: Tensor | None,
        wt_q: Tensor | None,
        x_q: Tensor,
        x_dq: Tensor,
        x_kept: Tensor | None,
        x_kept_dq: Tensor | None,
        out_dtype: torch.dtype,
        recipe: Recipe,
        recomputed: bool,
        as_backward: bool,
    ) -> Tensor:
        weight = KnownWeight(w, w_q, w_dq, wt_q)
        ctx.save_for_backward(*weight.to_keep(), x_kept, x_kept_dq)
        ctx.x_shape, ctx.x_dtype, ctx.w_dtype = x.shape, x.dtype, w.dtype
        ctx.recipe, ctx.as_backward = recipe, as_backward
        w_q, w_dq = weight.along_rows(recipe, as_backward=as_backward)
        y = ops.gemm_1x128_128x128(x_q, x_dq, w_q, w_dq, out_dtype, backend=recipe.gemm_backend, recomputed=recomputed)
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        *weight, x_kept, x_kept_dq = ctx.saved_tensors
        recipe = ctx.recipe
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        options = {"backend": recipe.gemm_backend}
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dw = None

        quantized = ()
        if wants_dw and recipe.wgrad != "bf16":
            quantized = ops.quantize_1x128_both(dy, recipe.scale_format, backend=recipe.quantize_backend)
        elif wants_dx:
            quantized = ops.quantize_1x128(dy, recipe.scale_format, backend=recipe.quantize_backend)
        if wants_dx:
            w_columns = KnownWeight(*weight).along_columns(recipe, quantized[0], as_forward=ctx.as_backward)
            dx = ops.gemm_1x128_128x128(*quantized[:2], *w_columns, ctx.x_dtype, **options)
            dx = dx.view(ctx.x_shape)
        if wants_dw:
            if recipe.wgrad == "bf16":
                dw = (dy.to(torch.bfloat16).t() @ x_kept.to(torch.bfloat16)).to(ctx.w_dtype)
            else:
                dw = dw_gemm(recipe)(*quantized[2:], x_kept, x_kept_dq, ctx.w_dtype, **options)
        return dx, dw, *([None] * 11)


def dw_gemm(recipe: Recipe) -> Callable[..., Tensor]:
    """Of dy's columns and `QuantizedInput.columns`."""
    return ops.gemm_1x128_128x128 if recipe.x_in_blocks else ops.gemm_1x128_1x128


def refuse_double_backward() -> None:
    """Call first in backward. Raises RuntimeError where a graph of the backward is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a blockwise-fp8 linear has no second derivative (its rounding has none): call backward or autograd.grad "
            'without create_graph=True, or keep this layer out of fp8 (a rule with action = "skip")'
        )


def shares_weights(wants_dx: bool, recomputation: Recomputation) -> bool:
    """Whether forward and backward of these are in one graph, in which two calls of one op on one weight become one.

    Args:
        wants_dx: what the weight multiplies requires a gradient.
    """
    wants_dx = wants_dx and torch.is_grad_enabled()
    return torch.compiler.is_compiling() and wants_dx and not recomputation.columns_apart


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of y: autocast's where it is on, else x's."""
    # The meta device has no autocast, and torch raises if asked whether it is on there. (amp.is_autocast_available would be a
    # graph break in torch 2.11.)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def operand_obstacle(shape: Sequence[int], dtype: torch.dtype, w: Tensor) -> str | None:
    """Why a linear cannot multiply an input of this shape and dtype by w; None where nothing of these is in the way."""
    for name, found in (("input", dtype), ("weight", w.dtype)):
        if found not in FLOATS:
            return (
                f"{name} of a blockwise-fp8 linear has dtype {found}: must be torch.bfloat16 or torch.float32; "
                "cast it, or keep the layer out of fp8"
            )
    if not shape or shape[-1] != w.shape[1]:
        return f"input has shape {tuple(shape)}: must be [..., {w.shape[1]}], its last dimension in_features"
    return None


def matmul_obstacle(x: Tensor | QuantizedInput, w: Tensor, recipe: Recipe) -> str | None:
    """Why a linear cannot multiply x by w, on any mesh; None where it can."""
    if not isinstance(x, (Tensor, QuantizedInput)):
        return f"input is a {type(x).__name__}: must be a tensor"
    if x.device != w.device:
        return f"input is on {x.device} and weight on {w.device}: must be on one device; move one of them"
    if obstacle := operand_obstacle(x.shape, x.dtype, w):
        return obstacle
    if isinstance(x, QuantizedInput) and (
        recipe.wgrad == "bf16" or (recipe.wgrad, recipe.scale_format) != (x.wgrad, x.scale_format)
    ):
        return (
            f"the module before this linear quantises for wgrad = {x.wgrad!r} and scale_format = {x.scale_format!r}, "
            f"the linear has {recipe}: "
            'change recipes before the conversion, or convert with fuse = "off"'
        )
    if (dtype := output_dtype(x.carrier if isinstance(x, QuantizedInput) else x)) not in FLOATS:
        return f"autocast's dtype is {dtype}: a blockwise-fp8 linear computes bf16 or fp32; use autocast to bf16"
    return None


def blockwise_fp8_matmul(
    x: Tensor | QuantizedInput,
    weight: KnownWeight,
    recipe: Recipe,
    recomputation: Recomputation,
) -> Tensor:
    """y = x w^T with all three GEMMs in blockwise fp8.

    Args:
        x: [..., K] bf16 or fp32, quantised already or not.
        weight: w [N, K] bf16 or fp32, N % 16 == 0 and K % 16 == 0, and the quantised forms that are known. The caller has asked
            `matmul_obstacle`, whose answer it can give with the layer's name.
        recipe: numerics and backend.
        recomputation: what activation checkpointing computes again.
    Returns:
        [..., N]: in autocast's dtype where autocast is on, else in x's. dx has x's dtype and dw has w's.
    Raises:
        ValueError: the device cannot run recipe.gemm_backend.
        RuntimeError: on double backward.
    """
    wants_dw = torch.is_grad_enabled() and weight.w.requires_grad
    in_fp8 = recipe.wgrad != "bf16"
    if not isinstance(x, QuantizedInput):
        x = quantize_input(x, recipe, columns=wants_dw and in_fp8, columns_apart=recomputation.columns_apart)
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    if wants_dw:
        kept = x.columns_for_dw() if in_fp8 else (x.carrier.detach().reshape(-1, x.shape[-1]), None)
    return _BlockwiseFP8Matmul.apply(
        x.carrier,
        *weight,
        *x.rows,
        *kept,
        output_dtype(x.carrier),
        recipe,
        recomputation.output,
        shares_weights(x.carrier.requires_grad, recomputation),
    )
