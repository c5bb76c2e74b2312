"""SwiGLU and its gradients, quantised in the kernels that compute them: checks, allocation, launch. See `producers`."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..formats import BLOCK, ceil_div
from ..recipe import ScaleFormat
from .backend import QuantizeBackend, suits_both_hopper, use_reference
from .layouts import E4M3, column_major, contiguous_rows, tiles
from .library import check_choice, check_matrix, define, kernels, launch
from .producers import LAYOUTS, Layout, allocate, launch_tiles, quantize
from .quantize import check_quantizable

HLayout = Literal["columns", "blocks"]
"""The `Layout` of h beside its gradients."""

_FEW_ROWS = 32
"""Of a program that quantises along rows alone."""


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
        layout: along which of its dimensions h is quantised, or in blocks; see `Layout`.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
    Returns:
        h_q, h_dq:   with "rows" and "both", as `quantize_1x128(h)`.
        ht_q, ht_dq: with "columns" and "both", as `quantize_1x128_columns(h)`; with "blocks", as `quantize_128x128_columns(h)`.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, gate=gate, up=up)
    check_choice("layout", layout, LAYOUTS)
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
    h: HLayout | None = None,
    backend: QuantizeBackend = "auto",
) -> tuple[tuple[Tensor, ...], ...]:
    """Quantise the gradients of gate and up in h = silu(gate) * up: fp32 inside, both rounded once to dh's dtype.

    dup = dh silu(gate);  dgate = dh up (s + silu(gate) (1 - s)) with s = sigmoid(gate)

    Args:
        dh: [M, K] bf16 or fp32; K % 16 == 0.
        gate, up: [M, K] in dh's dtype; or float8_e4m3fn with row-major rows, both, and then with gate_dq and up_dq.
        gate_dq, up_dq: [M, ceil(K/128)] fp32, M-contiguous: as `swiglu_quantize_1x128_with_inputs` returns them.
        scale_format: "fp32", or "pow2" to round multipliers up to powers of two.
        h: h too, "columns" or "blocks" as `Layout` says: what the gradient of the weight that it is multiplied with is computed from.
    Returns:
        dgate, dup: each as `quantize_1x128_both` of it.
        h: where asked for, as `swiglu_quantize_1x128(gate, up, h)`, h rounded once to dh's dtype.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    check_quantizable(scale_format, backend, dh=dh)
    check_choice("h", h, (None, *get_args(HLayout)))
    if gate_dq is None and up_dq is None:
        check_quantizable(scale_format, backend, gate=gate, up=up)
        _check_alike("gate", gate, dh=dh, up=up)
    else:
        for name, x, x_dq in (("gate", gate, gate_dq), ("up", up, up_dq)):
            _check_payload(name, x, x_dq, dh)
    op = torch.ops.blockfp8.swiglu_backward_quantize_1x128_both.default
    outs = tuple(op(dh, gate, gate_dq, up, up_dq, scale_format, h, backend))
    return (outs[:4], outs[4:8], outs[8:]) if h else (outs[:4], outs[4:])


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


def _allocate_swiglu(gate: Tensor, up: Tensor, layout: Layout, scale_format: str, backend: str) -> list[Tensor]:
    return allocate(gate, layout)


def _allocate_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: str, backend: str) -> list[Tensor]:
    return [out for _ in range(3) for out in allocate(gate, "rows")]


def _allocate_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: str,
    h: HLayout | None,
    backend: str,
) -> list[Tensor]:
    return allocate(dh, "both") + allocate(dh, "both") + (allocate(dh, h) if h else [])


# Reference


def _reference_swiglu(
    gate: Tensor, up: Tensor, layout: Layout, scale_format: ScaleFormat, backend: str
) -> list[Tensor]:
    return quantize(reference.swiglu(gate, up), layout, scale_format)


def _reference_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    return [out for x in (reference.swiglu(gate, up), gate, up) for out in quantize(x, "rows", scale_format)]


def _reference_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: ScaleFormat,
    h: HLayout | None,
    backend: str,
) -> list[Tensor]:
    if gate_dq is not None:
        gate, up = reference.dequantize_1x128(gate, gate_dq), reference.dequantize_1x128(up, up_dq)
    dgate, dup = reference.swiglu_backward(dh, gate, up)
    of_h = quantize(reference.swiglu(gate, up).to(dh.dtype), h, scale_format) if h else []
    return quantize(dgate, "both", scale_format) + quantize(dup, "both", scale_format) + of_h


# CUDA


def _cuda_swiglu(gate: Tensor, up: Tensor, layout: Layout, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    if use_reference(gate, backend):
        return _reference_swiglu(gate, up, layout, scale_format, backend)
    outs = allocate(gate, layout)
    gate, up = contiguous_rows(gate), contiguous_rows(up)
    if gate.shape[0] and layout == "rows":
        _launch_rows(gate, up, outs, scale_format)
    elif gate.shape[0]:
        strides = (gate.stride(0), up.stride(0))
        launch_tiles(
            kernels("producers")._quantize_swiglu_kernel, (gate, up), layout, outs, gate.shape, strides, scale_format
        )
    return outs


def _cuda_swiglu_with_inputs(gate: Tensor, up: Tensor, scale_format: ScaleFormat, backend: str) -> list[Tensor]:
    if use_reference(gate, backend):
        return _reference_swiglu_with_inputs(gate, up, scale_format, backend)
    outs = _allocate_swiglu_with_inputs(gate, up, scale_format, backend)
    gate, up = contiguous_rows(gate), contiguous_rows(up)
    if gate.shape[0]:
        _launch_rows(gate, up, outs, scale_format)
    return outs


def _launch_rows(gate: Tensor, up: Tensor, outs: Sequence[Tensor], scale_format: ScaleFormat) -> None:
    """outs: h's rows, and those of gate and up where they are wanted."""
    M, K = gate.shape
    with_inputs = len(outs) > 2
    pointers = outs if with_inputs else (*outs, *outs, *outs)  # those that the kernel does not use have to be something
    launch(
        kernels("producers")._quantize_swiglu_rows_kernel,
        (ceil_div(M, _FEW_ROWS) * ceil_div(K, BLOCK), 1, 1),
        (gate, up, *pointers, M, K, gate.stride(0), up.stride(0)),
        (with_inputs, _FEW_ROWS, scale_format == "pow2"),
        num_warps=8,
    )


def _cuda_swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    gate_dq: Tensor | None,
    up: Tensor,
    up_dq: Tensor | None,
    scale_format: ScaleFormat,
    h: HLayout | None,
    backend: str,
) -> list[Tensor]:
    if use_reference(dh, backend):
        return _reference_swiglu_backward(dh, gate, gate_dq, up, up_dq, scale_format, h, backend)
    outs = _allocate_swiglu_backward(dh, gate, gate_dq, up, up_dq, scale_format, h, backend)
    dh, gate, up = map(contiguous_rows, (dh, gate, up))
    M, K = dh.shape
    if M:
        # Those that the kernel does not use have to be something.
        multipliers = [outs[1] if dq is None else column_major(dq) for dq in (gate_dq, up_dq)]
        pointers = outs if h else [*outs, *outs[:2]]
        operands = (
            dh,
            gate,
            multipliers[0],
            up,
            multipliers[1],
            *pointers,
            M,
            K,
            dh.stride(0),
            gate.stride(0),
            up.stride(0),
        )
        padded = outs[2].stride(0) != M
        pow2, square = scale_format == "pow2", h == "blocks"
        if suits_both_hopper(padded, dh, gate, up):
            kernel = kernels("both_hopper")._quantize_swiglu_gradients_kernel
            launch(kernel, tiles(M, K), operands, (h is not None, pow2, square), num_warps=8)
        else:
            kernel = kernels("producers")._quantize_swiglu_gradients_kernel
            columns, rows, _ = tiles(M, K)
            grid = ((3 if h else 2) * columns, rows, 1)
            launch(kernel, grid, (*operands, outs[2].stride(0)), (h is not None, 4, padded, pow2, square), num_warps=8)
    return outs


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
    "str? h, str backend) -> Tensor[]",
    reference=_reference_swiglu_backward,
    cuda=_cuda_swiglu_backward,
    fake=_allocate_swiglu_backward,
)
