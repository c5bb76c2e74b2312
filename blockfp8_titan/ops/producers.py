"""What ops share that compute and quantise in one pass: see `rms_norm` and `swiglu`.

What is quantised is the result rounded to bf16 or fp32, as unfused ops would write it; it is never written itself. Quantised tensors
lie in memory as those of the ops that `Layout` names do.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..recipe import ScaleFormat
from .backend import is_hopper
from .layouts import aligned_rows, fill, group_multipliers, row_major, tiles, transposed_block_multipliers
from .library import launch

Layout = Literal["rows", "columns", "both", "blocks"]
"""Which results: of `quantize_1x128_both` the first two, the last two, or all four; or those of `quantize_128x128_columns`."""

LAYOUTS = get_args(Layout)


def allocate(like: Tensor, layout: Layout) -> list[Tensor]:
    """The results of quantising a tensor of this shape along a layout, without data; the fake kernels are made of it."""
    M, K = like.shape
    if layout == "blocks":
        return [aligned_rows(like, K, M), transposed_block_multipliers(like, K, M)]
    rows = [row_major(like, M, K), group_multipliers(like, M, K)] if layout != "columns" else []
    columns = [aligned_rows(like, K, M), group_multipliers(like, K, M)] if layout != "rows" else []
    return rows + columns


def quantize(y: Tensor, layout: Layout, scale_format: ScaleFormat) -> list[Tensor]:
    """The reference: y quantised, laid out as `allocate` does."""
    quantizers: dict[Layout, Callable[..., tuple[Tensor, ...]]] = {
        "rows": reference.quantize_1x128,
        "columns": reference.quantize_1x128_columns,
        "both": reference.quantize_1x128_both,
        "blocks": reference.quantize_128x128_columns,
    }
    return list(map(fill, allocate(y, layout), quantizers[layout](y, scale_format)))


def launch_tiles(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    layout: Layout,
    outs: Sequence[Tensor],
    shape: torch.Size,
    strides: tuple[int, ...],
    scale_format: ScaleFormat,
) -> None:
    """Launch a kernel that has a program for each tile and stores the layouts asked for."""
    M, K = shape
    pointers = outs if layout == "both" else (*outs, *outs)  # those that the kernel does not use have to be something
    yt_stride = outs[-2].stride(0)
    rows, columns = layout in ("rows", "both"), layout != "rows"
    padded = columns and yt_stride != M
    # Columns alone: half of the warps need fewer instructions, and more than 168 registers would leave room for two programs, not three.
    warps, registers = (4, 168) if not rows else (8, 128) if columns else (8, None)
    if not rows and inputs[0].dtype == torch.float32:
        warps = 8  # four would spill
    # With so few registers more programs run at a time; in other cases it would spill.
    capped = is_hopper(inputs[0].device) and inputs[0].dtype == torch.bfloat16 and not padded
    launch(
        kernel,
        tiles(M, K),
        (*inputs, *pointers, M, K, *strides, yt_stride),
        (32 // warps, rows, columns, padded, scale_format == "pow2", layout == "blocks"),
        num_warps=warps,
        maxnreg=registers if capped else None,
    )
