"""RMSNorm, quantised in the kernel that computes it: checks, allocation, launch. See `producers`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..formats import BLOCK, ceil_div
from ..recipe import ScaleFormat
from .backend import QuantizeBackend, use_reference
from .layouts import contiguous_rows
from .library import FLOATS, check_choice, define, kernels, launch
from .producers import LAYOUTS, Layout, allocate, launch_tiles, quantize
from .quantize import check_quantizable

_WHOLE_ROWS = 16384
"""The longest rows of which a program holds a whole one in its registers."""


def rms_norm_quantize_1x128(
    x: Tensor,
    weight: Tensor,
    eps: float,
    layout: Layout = "both",
    scale_format: ScaleFormat = "fp32",
    *,
    rstd: Tensor | None = None,
    backend: QuantizeBackend = "auto",
) -> tuple[Tensor, ...]:
    """Quantise y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row: fp32 inside, y rounded once to x's dtype.

    "rows" reads x once, so do "columns" and "blocks" where rstd is given; else x is read twice.

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        weight: [K] bf16 or fp32.
        eps: at least 0.
        layout: along which of its dimensions y is quantised, or in blocks; see `Layout`.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
        rstd: [M] fp32, what an earlier call returned; None to compute it.
    Returns:
        y_q, y_dq:   with "rows" and "both", as `quantize_1x128(y)`.
        yt_q, yt_dq: with "columns" and "both", as `quantize_1x128_columns(y)`; with "blocks", as `quantize_128x128_columns(y)`.
        rstd: [M] fp32; the one given, if one was.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    check_choice("layout", layout, LAYOUTS)
    _check_vector("weight", weight, FLOATS, x, 1)
    if rstd is not None:
        _check_vector("rstd", rstd, (torch.float32,), x, 0)
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: must be at least 0")
    outs = torch.ops.blockfp8.rms_norm_quantize_1x128.default(x, weight, eps, layout, scale_format, rstd, backend)
    return tuple(outs) if rstd is None else (*outs, rstd)


def _check_vector(name: str, vector: Tensor, dtypes: tuple[torch.dtype, ...], x: Tensor, dim: int) -> None:
    """Raises ValueError unless vector has an element for each of x in this dimension, and autograd does not follow it."""
    if vector.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which a quantising op does not have: call it under torch.no_grad() or detach {name}"
        )
    if vector.shape != x.shape[dim : dim + 1]:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}: must be ({x.shape[dim]},) for x of shape {tuple(x.shape)}"
        )
    if vector.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {vector.dtype}: must be {' or '.join(map(str, dtypes))}")
    if vector.device != x.device:
        raise ValueError(f"{name} is on {vector.device} and x on {x.device}: must be on one device")


# Allocation, which is the fake kernels as well


def _allocate_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: str, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    new_rstd = [x.new_empty(x.shape[:1], dtype=torch.float32)] if rstd is None else []
    return allocate(x, layout) + new_rstd


# Reference


def _reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: ScaleFormat, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    new_rstd = [reference.rms_norm_rstd(x, eps)] if rstd is None else []
    y = reference.rms_norm(x, *(new_rstd or [rstd]), weight)
    return quantize(y, layout, scale_format) + new_rstd


# CUDA


def _cuda_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: ScaleFormat, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    if use_reference(x, backend):
        return _reference_rms_norm(x, weight, eps, layout, scale_format, rstd, backend)
    outs = allocate(x, layout)
    new_rstd = [x.new_empty(x.shape[:1], dtype=torch.float32)] if rstd is None else []
    if x.shape[0]:
        x, weight = contiguous_rows(x), weight.contiguous()
        if rstd is None and layout in ("rows", "both") and x.shape[1] <= _WHOLE_ROWS:
            _rms_norm_whole_rows(x, weight, *new_rstd, eps, outs[:2], scale_format)
            if layout == "both":
                # x is read twice, as it has to be for rstd first and both layouts then, which takes a quarter longer.
                _rms_norm_tiles(x, weight, *new_rstd, "columns", outs[2:], scale_format)
        else:
            if rstd is None:
                _rms_norm_rstd(x, *new_rstd, eps)
            _rms_norm_tiles(x, weight, *(new_rstd or [rstd.contiguous()]), layout, outs, scale_format)
    return outs + new_rstd


def _rms_norm_whole_rows(
    x: Tensor, weight: Tensor, rstd: Tensor, eps: float, outs: Sequence[Tensor], scale_format: ScaleFormat
) -> None:
    M, K = x.shape
    block_k = max(_power_of_two(K), BLOCK)
    block_m = max(8192 // block_k, 1)
    launch(
        kernels("producers")._quantize_rms_norm_rows_kernel,
        (ceil_div(M, block_m), 1, 1),
        (x, weight, rstd, *outs, M, K, x.stride(0), eps),
        (scale_format == "pow2", block_m, block_k),
        num_warps=4 if block_k <= 8192 else 8,
    )


def _power_of_two(n: int) -> int:
    """The least power of two not below n."""
    return 1 << (n - 1).bit_length()


def _rms_norm_rstd(x: Tensor, rstd: Tensor, eps: float) -> None:
    M, K = x.shape
    block_m, block_k = 4, 2048
    launch(
        kernels("producers")._rms_norm_rstd_kernel,
        (ceil_div(M, block_m), 1, 1),
        (x, rstd, M, K, x.stride(0), eps),
        (block_m, block_k),
        num_warps=4,
    )


def _rms_norm_tiles(
    x: Tensor, weight: Tensor, rstd: Tensor, layout: Layout, outs: Sequence[Tensor], scale_format: ScaleFormat
) -> None:
    launch_tiles(
        kernels("producers")._quantize_rms_norm_kernel,
        (x, weight, rstd),
        layout,
        outs,
        x.shape,
        (x.stride(0),),
        scale_format,
    )


define(
    "rms_norm_quantize_1x128(Tensor x, Tensor weight, float eps, str layout, str scale_format, Tensor? rstd, str backend)"
    " -> Tensor[]",
    reference=_reference_rms_norm,
    cuda=_cuda_rms_norm,
    fake=_allocate_rms_norm,
)
