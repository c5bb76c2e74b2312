"""The three GEMMs of a linear layer, differentiable: what is quantised when, and what is kept for backward.

    y  [M,N] = x  w^T     x in 1x128 along K,    w in 128x128
    dx [M,K] = dy w       dy in 1x128 along N,   w^T in 128x128 (the same blocks, transposed)
    dw [N,K] = dy^T x     dy^T and x^T in 1x128 along M

Numerics of DeepSeek-V3 (arXiv:2412.19437, section 3.3), with 1x128 instead of 128x1 regrouping done from the original values.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .recipe import GemmBackend, Recipe, ScaleFormat, WeightGradient
from .weight import GatheredFP8Weight

FLOATS = (torch.bfloat16, torch.float32)
"""The dtypes of inputs, weights and outputs."""


class _BlockwiseFP8Matmul(torch.autograd.Function):
    """y = x w^T for 2D x; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        w_q: Tensor | None,
        w_dq: Tensor | None,
        wt_q: Tensor | None,
        out_dtype: torch.dtype,
        wants_dw: bool,
        gemm_backend: GemmBackend,
        wgrad: WeightGradient,
        scale_format: ScaleFormat,
    ) -> Tensor:
        quantize_backend = "reference" if gemm_backend == "reference" else "auto"
        x_kept: tuple[Tensor, ...] = ()
        if wants_dw and wgrad == "fp8":
            x_q, x_dq, *x_kept = ops.quantize_1x128_both(x, scale_format, backend=quantize_backend)
        else:
            x_q, x_dq = ops.quantize_1x128(x, scale_format, backend=quantize_backend)
            if wants_dw and wgrad == "bf16":
                x_kept = (x,)
            elif wants_dw:
                xb_q, xb_dq = ops.quantize_128x128(x, scale_format, backend=quantize_backend)
                x_kept = (ops.transpose_fp8(xb_q), xb_dq)
        # Of the weight, what was given is kept: FSDP2 frees that memory after the forward and gathers into it again for backward.
        ctx.save_for_backward(w if w_q is None else None, w_q, w_dq, wt_q, *x_kept)
        if w_q is None:
            w_q, w_dq = ops.quantize_128x128(w, scale_format, backend=quantize_backend)
        ctx.x_dtype, ctx.w_dtype = x.dtype, w.dtype
        ctx.recipe = (gemm_backend, wgrad, scale_format, quantize_backend)
        return ops.gemm_1x128_128x128(x_q, x_dq, w_q, w_dq, out_dtype, backend=gemm_backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "a blockwise-fp8 linear has no second derivative (its rounding has none): call backward or autograd.grad "
                'without create_graph=True, or keep this layer out of fp8 (a rule with action = "skip")'
            )
        w, w_q, w_dq, wt_q, *x_kept = ctx.saved_tensors
        gemm_backend, wgrad, scale_format, quantize_backend = ctx.recipe
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        dx = dw = None

        if wants_dw and wgrad != "bf16":
            dy_q, dy_dq, dyt_q, dyt_dq = ops.quantize_1x128_both(dy, scale_format, backend=quantize_backend)
        elif wants_dx:
            dy_q, dy_dq = ops.quantize_1x128(dy, scale_format, backend=quantize_backend)
        if wants_dx:
            if w_q is None:
                w_q, w_dq = ops.quantize_128x128(w, scale_format, backend=quantize_backend)
            if wt_q is None:
                wt_q = ops.transpose_fp8(w_q)
            dx = ops.gemm_1x128_128x128(dy_q, dy_dq, wt_q, w_dq.t(), ctx.x_dtype, backend=gemm_backend)
        if wants_dw:
            if wgrad == "bf16":
                dw = (dy.to(torch.bfloat16).t() @ x_kept[0].to(torch.bfloat16)).to(ctx.w_dtype)
            elif wgrad == "fp8":
                dw = ops.gemm_1x128_1x128(dyt_q, dyt_dq, *x_kept, ctx.w_dtype, backend=gemm_backend)
            else:
                xbt_q, xb_dq = x_kept
                dw = ops.gemm_1x128_128x128(dyt_q, dyt_dq, xbt_q, xb_dq.t(), ctx.w_dtype, backend=gemm_backend)
        return dx, dw, *([None] * 8)


def matmul_obstacle(x: Tensor, w: Tensor) -> str | None:
    """Why `blockwise_fp8_matmul` cannot take these operands, on any mesh; None where it can."""
    for name, tensor in (("input", x), ("weight", w)):
        if tensor.dtype not in FLOATS:
            return (
                f"{name} of a blockwise-fp8 linear has dtype {tensor.dtype}: must be torch.bfloat16 or torch.float32; "
                "cast it, or keep the layer out of fp8"
            )
    if x.shape[-1] != w.shape[1]:
        return f"input has shape {tuple(x.shape)}: its last dimension must be in_features = {w.shape[1]}"
    if (dtype := _output_dtype(x)) not in FLOATS:
        return f"autocast's dtype is {dtype}: a blockwise-fp8 linear computes bf16 or fp32; use autocast to bf16"
    return None


def _output_dtype(x: Tensor) -> torch.dtype:
    # The meta device has no autocast, and torch raises if asked whether it is on there. (amp.is_autocast_available would be a
    # graph break in torch 2.11.)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def blockwise_fp8_matmul(
    x: Tensor, w: Tensor, recipe: Recipe, quantized: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """y = x w^T with all three GEMMs in blockwise fp8.

    Args:
        x: [..., K] bf16 or fp32.
        w: [N, K] bf16 or fp32; N % 16 == 0 and K % 16 == 0. A `GatheredFP8Weight` is used as it was quantised.
            The caller has asked `matmul_obstacle`, whose answer it can give with the layer's name.
        recipe: numerics and backend.
        quantized: w_q, w_dq and wt_q of `ops.quantize_128x128(w)` and `ops.transpose_fp8(w_q)`, where they are known.
    Returns:
        [..., N]: in autocast's dtype where autocast is on, else in x's. dx has x's dtype and dw has w's.
    Raises:
        ValueError: the device cannot run recipe.gemm_backend.
        RuntimeError: on double backward.
    """
    wants_dw = torch.is_grad_enabled() and w.requires_grad
    w_q, w_dq, wt_q = quantized or (None, None, None)
    if isinstance(w, GatheredFP8Weight):
        w_q, w_dq = w.w_q, w.w_dq
    y = _BlockwiseFP8Matmul.apply(
        x.reshape(-1, x.shape[-1]),
        w,
        w_q,
        w_dq,
        wt_q,
        _output_dtype(x),
        wants_dw,
        recipe.gemm_backend,
        recipe.wgrad,
        recipe.scale_format,
    )
    return y.view(*x.shape[:-1], w.shape[0])
