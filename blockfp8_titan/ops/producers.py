"""Ops that compute and quantise in one pass: RMSNorm, SwiGLU and its gradients. Checks, allocation, launch.

What is quantised is the result rounded to its inputs' dtype, as unfused ops would write it; it is never written itself. Quantised
tensors lie in memory as those of `quantize_1x128_both` do.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..formats import BLOCK, ceil_div
from ..recipe import ScaleFormat
from .backend import QuantizeBackend, is_hopper, use_reference
from .layouts import E4M3, aligned_rows, column_major, contiguous_rows, fill, group_multipliers, row_major, tiles
from .library import FLOATS, check_choice, check_matrix, define, kernels, launch
from .quantize import check_quantizable

Layout = Literal["rows", "columns", "both"]
"""Which results of `quantize_1x128_both`: the first two, the last two, or all four."""

_LAYOUTS = get_args(Layout)


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

    "rows" reads x once, so does "columns" where rstd is given; else x is read twice.

    Args:
        x: [M, K] bf16 or fp32; K % 16 == 0.
        weight: [K] bf16 or fp32.
        eps: at least 0.
        layout: along which of its dimensions y is quantised; see `Layout`.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
        rstd: [M] fp32, what an earlier call returned; None to compute it.
    Returns:
        y_q, y_dq:   with "rows" and "both", as `quantize_1x128(y)`.
        yt_q, yt_dq: with "columns" and "both", as `quantize_1x128_columns(y)`.
        rstd: [M] fp32; the one given, if one was.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, x=x)
    check_choice("layout", layout, _LAYOUTS)
    _check_vector("weight", weight, FLOATS, x, 1)
    if rstd is not None:
        _check_vector("rstd", rstd, (torch.float32,), x, 0)
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: must be at least 0")
    outs = torch.ops.blockfp8.rms_norm_quantize_1x128.default(x, weight, eps, layout, scale_format, rstd, backend)
    return tuple(outs) if rstd is None else (*outs, rstd)


def swiglu_quantize_1x128(
    gate: Tensor,
    up: Tensor,
    layout: Layout = "both",
    scale_format: ScaleFormat = "fp32",
    *,
    backend: QuantizeBackend = "auto",
) -> tuple[Tensor, ...]:
    """Quantise h = silu(gate) * up: fp32 inside, h rounded once to gate's dtype, as inductor's fused product is.

    Args:
        gate, up: [M, K] bf16 or fp32, both of one dtype; K % 16 == 0.
        layout: along which of its dimensions h is quantised; see `Layout`.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        h_q, h_dq:   with "rows" and "both", as `quantize_1x128(h)`.
        ht_q, ht_dq: with "columns" and "both", as `quantize_1x128_columns(h)`.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, gate=gate, up=up)
    check_choice("layout", layout, _LAYOUTS)
    _check_alike("gate", gate, up=up)
    return tuple(torch.ops.blockfp8.swiglu_quantize_1x128.default(gate, up, layout, scale_format, backend))


def swiglu_quantize_1x128_with_inputs(
    gate: Tensor, up: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"
) -> tuple[tuple[Tensor, Tensor], ...]:
    """`swiglu_quantize_1x128(gate, up, "rows")`, and what a backward is to know of gate and up at one byte per element, in one pass.

    As DeepSeek-V3 keeps SwiGLU's inputs (arXiv:2412.19437, section 3.3.3).

    Args:
        gate, up: [M, K] bf16 or fp32, both of one dtype; K % 16 == 0.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        h, gate, up: each as `quantize_1x128` of it.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, gate=gate, up=up)
    _check_alike("gate", gate, up=up)
    outs = torch.ops.blockfp8.swiglu_quantize_1x128_with_inputs.default(gate, up, scale_format, backend)
    return tuple(outs[:2]), tuple(outs[2:4]), tuple(outs[4:])


def swiglu_backward_quantize_1x128_both(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    scale_format: ScaleFormat = "fp32",
    *,
    gate_dq: Tensor | None = None,
    up_dq: Tensor | None = None,
    with_h: bool = False,
    backend: QuantizeBackend = "auto",
) -> tuple[tuple[Tensor, ...], ...]:
    """Quantise the gradients of gate and up in h = silu(gate) * up: fp32 inside, both rounded once to dh's dtype.

    dup = dh silu(gate);  dgate = dh up (s + silu(gate) (1 - s)) with s = sigmoid(gate)

    Args:
        dh: [M, K] bf16 or fp32; K % 16 == 0.
        gate, up: [M, K] in dh's dtype; or float8_e4m3fn with row-major rows, both, and then with gate_dq and up_dq.
        gate_dq, up_dq: [M, ceil(K/128)] fp32, M-contiguous: as `swiglu_quantize_1x128_with_inputs` returns them.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
        with_h: h's columns too, which the gradient of the weight that h is multiplied with is computed from.
    Returns:
        dgate, dup: each as `quantize_1x128_both` of it.
        h: with_h alone: as `swiglu_quantize_1x128(gate, up, "columns")`, h rounded once to dh's dtype.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, dh=dh)
    if gate_dq is None and up_dq is None:
        check_quantizable(scale_format, backend, gate=gate, up=up)
        _check_alike("gate", gate, dh=dh, up=up)
    else:
        for name, x, x_dq in (("gate", gate, gate_dq), ("up", up, up_dq)):
            _check_payload(name, x, x_dq, dh)
    op = torch.ops.blockfp8.swiglu_backward_quantize_1x128_both.default
    outs = tuple(op(dh, gate, gate_dq, up, up_dq, scale_format, with_h, backend))
    return (outs[:4], outs[4:8], outs[8:]) if with_h else (outs[:4], outs[4:])


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


def _check_alike(name: str, x: Tensor, **others: Tensor) -> None:
    """Raises ValueError unless all have x's shape, dtype and device; others are named as the arguments are."""
    for other, y in others.items():
        for what in ("shape", "dtype", "device"):
            if getattr(y, what) != getattr(x, what):
                raise ValueError(
                    f"{other} and {name} differ in {what}, {getattr(y, what)} and {getattr(x, what)}: must have the same"
                )


def _check_payload(name: str, q: Tensor, dq: Tensor | None, like: Tensor) -> None:
    """Raises ValueError unless q and dq are a matrix of like's shape, quantised along rows."""
    if dq is None:
        raise ValueError(f"{name}_dq is None: gate and up are both payloads with multipliers, or neither is")
    check_matrix(name, q, (E4M3,))
    check_matrix(f"{name}_dq", dq, (torch.float32,))
    if q.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(q.shape)}: must be dh's, {tuple(like.shape)}")
    M, K = q.shape
    if dq.shape != (M, ceil_div(K, BLOCK)):
        raise ValueError(f"{name}_dq has shape {tuple(dq.shape)}: must be {(M, ceil_div(K, BLOCK))} for its payload")
    for tensor, what in ((q, name), (dq, f"{name}_dq")):
        if tensor.device != like.device:
            raise ValueError(f"{what} is on {tensor.device} and dh on {like.device}: must be on one device")


# Allocation, which is the fake kernels as well


def _allocate(like: Tensor, layout: Layout) -> list[Tensor]:
    M, K = like.shape
    rows = [row_major(like, M, K), group_multipliers(like, M, K)] if layout != "columns" else []
    columns = [aligned_rows(like, K, M), group_multipliers(like, K, M)] if layout != "rows" else []
    return rows + columns


def _allocate_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: str, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    new_rstd = [x.new_empty(x.shape[:1], dtype=torch.float32)] if rstd is None else []
    return _allocate(x, layout) + new_rstd


def _allocate_swiglu(gate: Tensor, up: Tensor, layout: Layout, scale_format: str, backend: str) -> list[Tensor]:
    return _allocate(gate, layout)


def _allocate_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: str, backend: str) -> list[Tensor]:
    return [out for _ in range(3) for out in _allocate(gate, "rows")]


def _allocate_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: str,
    with_h: bool,
    backend: str,
) -> list[Tensor]:
    return _allocate(dh, "both") + _allocate(dh, "both") + (_allocate(dh, "columns") if with_h else [])


# Reference


def _quantize(y: Tensor, layout: Layout, scale_format: ScaleFormat) -> list[Tensor]:
    quantizers: dict[Layout, Callable[..., tuple[Tensor, ...]]] = {
        "rows": reference.quantize_1x128,
        "columns": reference.quantize_1x128_columns,
        "both": reference.quantize_1x128_both,
    }
    return list(map(fill, _allocate(y, layout), quantizers[layout](y, scale_format)))


def _reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: ScaleFormat, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    new_rstd = [reference.rms_norm_rstd(x, eps)] if rstd is None else []
    y = reference.rms_norm(x, *(new_rstd or [rstd]), weight)
    return _quantize(y, layout, scale_format) + new_rstd


def _reference_swiglu(
    gate: Tensor, up: Tensor, layout: Layout, scale_format: ScaleFormat, backend: str
) -> list[Tensor]:
    return _quantize(reference.swiglu(gate, up), layout, scale_format)


def _reference_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    return [out for x in (reference.swiglu(gate, up), gate, up) for out in _quantize(x, "rows", scale_format)]


def _reference_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: ScaleFormat,
    with_h: bool,
    backend: str,
) -> list[Tensor]:
    if gate_dq is not None:
        gate, up = reference.dequantize_1x128(gate, gate_dq), reference.dequantize_1x128(up, up_dq)
    dgate, dup = reference.swiglu_backward(dh, gate, up)
    h = _quantize(reference.swiglu(gate, up).to(dh.dtype), "columns", scale_format) if with_h else []
    return _quantize(dgate, "both", scale_format) + _quantize(dup, "both", scale_format) + h


# CUDA

_WHOLE_ROWS = 16384
"""The longest rows of which a program holds a whole one in its registers."""


def _fits_a_cap(x: Tensor, padded: bool) -> bool:
    """Whether a kernel that reads x can be held to few registers, for more programs on a multiprocessor, and does not spill."""
    return is_hopper(x.device) and x.dtype == torch.bfloat16 and not padded


def _launch_tiles(
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
    padded = layout != "rows" and yt_stride != M
    # Columns alone: half of the warps need fewer instructions, and more than 168 registers would leave room for two programs, not three.
    warps, registers = {"rows": (8, None), "columns": (4, 168), "both": (8, 128)}[layout]
    if layout == "columns" and inputs[0].dtype == torch.float32:
        warps = 8  # four would spill
    launch(
        kernel,
        tiles(M, K),
        (*inputs, *pointers, M, K, *strides, yt_stride),
        (32 // warps, layout != "columns", layout != "rows", padded, scale_format == "pow2"),
        num_warps=warps,
        maxnreg=registers if _fits_a_cap(inputs[0], padded) else None,
    )


def _cuda_rms_norm(
    x: Tensor, weight: Tensor, eps: float, layout: Layout, scale_format: ScaleFormat, rstd: Tensor | None, backend: str
) -> list[Tensor]:
    if use_reference(x, backend):
        return _reference_rms_norm(x, weight, eps, layout, scale_format, rstd, backend)
    outs = _allocate(x, layout)
    new_rstd = [x.new_empty(x.shape[:1], dtype=torch.float32)] if rstd is None else []
    if x.shape[0]:
        x, weight = contiguous_rows(x), weight.contiguous()
        if rstd is None and layout == "rows" and x.shape[1] <= _WHOLE_ROWS:
            _rms_norm_whole_rows(x, weight, *new_rstd, eps, outs, scale_format)
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
    _launch_tiles(
        kernels("producers")._quantize_rms_norm_kernel,
        (x, weight, rstd),
        layout,
        outs,
        x.shape,
        (x.stride(0),),
        scale_format,
    )


def _cuda_swiglu(gate: Tensor, up: Tensor, layout: Layout, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    if use_reference(gate, backend):
        return _reference_swiglu(gate, up, layout, scale_format, backend)
    outs = _allocate(gate, layout)
    gate, up = contiguous_rows(gate), contiguous_rows(up)
    if gate.shape[0]:
        strides = (gate.stride(0), up.stride(0))
        _launch_tiles(
            kernels("producers")._quantize_swiglu_kernel, (gate, up), layout, outs, gate.shape, strides, scale_format
        )
    return outs


def _cuda_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    if use_reference(gate, backend):
        return _reference_swiglu_with_inputs(gate, up, scale_format, backend)
    outs = _allocate_swiglu_with_inputs(gate, up, scale_format, backend)
    gate, up = contiguous_rows(gate), contiguous_rows(up)
    M, K = gate.shape
    if M:
        columns, rows, _ = tiles(M, K)
        launch(
            kernels("producers")._quantize_swiglu_and_inputs_kernel,
            (3 * columns, rows, 1),
            (gate, up, *outs, M, K, gate.stride(0), up.stride(0)),
            (4, scale_format == "pow2"),
            num_warps=8,
        )
    return outs


def _cuda_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: ScaleFormat,
    with_h: bool,
    backend: str,
) -> list[Tensor]:
    if use_reference(dh, backend):
        return _reference_swiglu_backward(dh, gate, gate_dq, up, up_dq, scale_format, with_h, backend)
    outs = _allocate_swiglu_backward(dh, gate, gate_dq, up, up_dq, scale_format, with_h, backend)
    dh, gate, up = map(contiguous_rows, (dh, gate, up))
    M, K = dh.shape
    if M:
        columns, rows, _ = tiles(M, K)
        # Those that the kernel does not use have to be something.
        multipliers = [outs[1] if dq is None else column_major(dq) for dq in (gate_dq, up_dq)]
        pointers = outs if with_h else [*outs, *outs[:2]]
        strides = (dh.stride(0), gate.stride(0), up.stride(0), outs[2].stride(0))
        padded = outs[2].stride(0) != M
        launch(
            kernels("producers")._quantize_swiglu_gradients_kernel,
            ((3 if with_h else 2) * columns, rows, 1),
            (dh, gate, multipliers[0], up, multipliers[1], *pointers, M, K, *strides),
            (with_h, 4, padded, scale_format == "pow2"),
            num_warps=8,
            maxnreg=128 if _fits_a_cap(dh, padded) else None,
        )
    return outs


define(
    "rms_norm_quantize_1x128(Tensor x, Tensor weight, float eps, str layout, str scale_format, Tensor? rstd, str backend)"
    " -> Tensor[]",
    reference=_reference_rms_norm,
    cuda=_cuda_rms_norm,
    fake=_allocate_rms_norm,
)
define(
    "swiglu_quantize_1x128(Tensor gate, Tensor up, str layout, str scale_format, str backend) -> Tensor[]",
    reference=_reference_swiglu,
    cuda=_cuda_swiglu,
    fake=_allocate_swiglu,
)
define(
    "swiglu_quantize_1x128_with_inputs(Tensor gate, Tensor up, str scale_format, str backend) -> Tensor[]",
    reference=_reference_swiglu_with_inputs,
    cuda=_cuda_swiglu_with_inputs,
    fake=_allocate_swiglu_with_inputs,
)
define(
    "swiglu_backward_quantize_1x128_both(Tensor dh, Tensor gate, Tensor? gate_dq, Tensor up, Tensor? up_dq, str scale_format, "
    "bool with_h, str backend) -> Tensor[]",
    reference=_reference_swiglu_backward,
    cuda=_cuda_swiglu_backward,
    fake=_allocate_swiglu_backward,
)
