"""TEMPORARY: compositions in plain PyTorch behind the signatures of the fused producers of branch `producers`, which replaces this file."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..recipe import ScaleFormat
from .library import define
from .quantize import (
    QuantizeBackend,
    _aligned_rows,
    _allocate_1x128,
    _allocate_128x128,
    _column_major,
    _fill,
    quantize_1x128,
    quantize_1x128_both,
)

Layout = Literal["rows", "columns", "both"]


def _columns(x: Tensor, scale_format: str, backend: str) -> list[Tensor]:
    return list(torch.ops.blockfp8.quantize_1x128_both(x, scale_format, backend)[2:])


def _quantized(x: Tensor, layout: str, scale_format: str, backend: str) -> list[Tensor]:
    if layout == "rows":
        return list(quantize_1x128(x, scale_format, backend=backend))
    if layout == "columns":
        return _columns(x, scale_format, backend)
    return list(quantize_1x128_both(x, scale_format, backend=backend))


def _allocate(x: Tensor, layout: str) -> list[Tensor]:
    M, K = x.shape
    rows = list(_allocate_1x128(x, "", "")) if layout != "columns" else []
    columns = [_aligned_rows(x, K, M), _column_major(x, K, M)] if layout != "rows" else []
    return rows + columns


def _impl_columns(x, scale_format, backend):
    with torch.no_grad():
        return tuple(_columns(x.contiguous(), scale_format, backend))


def _impl_norm(x, weight, eps, layout, scale_format, rstd, backend):
    if rstd is None:
        rstd = (x.float().square().mean(-1) + eps).rsqrt()
    y = (x.float() * rstd[:, None] * weight.float()).to(x.dtype)
    return [*_quantized(y, layout, scale_format, backend), rstd.clone()]


def _impl_swiglu(gate, up, layout, scale_format, backend):
    h = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    return _quantized(h, layout, scale_format, backend)


def _impl_swiglu_backward(dh, gate, up, scale_format, backend):
    dh32, g, u = dh.float(), gate.float(), up.float()
    s = g.sigmoid()
    dgate = (dh32 * u * (s + g * s * (1 - s))).to(gate.dtype)
    dup = (dh32 * g * s).to(gate.dtype)
    return _quantized(dgate, "both", scale_format, backend) + _quantized(dup, "both", scale_format, backend)


def _impl_weight(w, scale_format, backend):
    w_q, w_dq = torch.ops.blockfp8.quantize_128x128(w, scale_format, backend)
    return w_q, w_dq, _fill(_aligned_rows(w, w.shape[1], w.shape[0]), reference.transpose_fp8(w_q))


for _schema, _impl, _fake in (
    (
        "quantize_1x128_columns(Tensor x, str scale_format, str backend) -> (Tensor, Tensor)",
        _impl_columns,
        lambda x, scale_format, backend: tuple(_allocate(x, "columns")),
    ),
    (
        "rms_norm_quantize_1x128(Tensor x, Tensor weight, float eps, str layout, str scale_format, Tensor? rstd, str backend) -> Tensor[]",
        _impl_norm,
        lambda x, weight, eps, layout, scale_format, rstd, backend: [
            *_allocate(x, layout),
            x.new_empty(x.shape[0], dtype=torch.float32),
        ],
    ),
    (
        "swiglu_quantize_1x128(Tensor gate, Tensor up, str layout, str scale_format, str backend) -> Tensor[]",
        _impl_swiglu,
        lambda gate, up, layout, scale_format, backend: _allocate(gate, layout),
    ),
    (
        "swiglu_backward_quantize_1x128_both(Tensor dh, Tensor gate, Tensor up, str scale_format, str backend) -> Tensor[]",
        _impl_swiglu_backward,
        lambda dh, gate, up, scale_format, backend: _allocate(gate, "both") + _allocate(gate, "both"),
    ),
    (
        "quantize_128x128_both(Tensor w, str scale_format, str backend) -> (Tensor, Tensor, Tensor)",
        _impl_weight,
        lambda w, scale_format, backend: (*_allocate_128x128(w, "", ""), _aligned_rows(w, w.shape[1], w.shape[0])),
    ),
):
    define(_schema, reference=_impl, cuda=_impl, fake=_fake)


def quantize_1x128_columns(x: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"):
    return torch.ops.blockfp8.quantize_1x128_columns(x, scale_format, backend)


def rms_norm_quantize_1x128(x, weight, eps, layout="both", scale_format="fp32", *, rstd=None, backend="auto"):
    return tuple(torch.ops.blockfp8.rms_norm_quantize_1x128(x, weight, eps, layout, scale_format, rstd, backend))


def swiglu_quantize_1x128(gate, up, layout="both", scale_format="fp32", *, backend="auto"):
    return tuple(torch.ops.blockfp8.swiglu_quantize_1x128(gate, up, layout, scale_format, backend))


def swiglu_backward_quantize_1x128_both(dh, gate, up, scale_format="fp32", *, backend="auto"):
    out = torch.ops.blockfp8.swiglu_backward_quantize_1x128_both(dh, gate, up, scale_format, backend)
    return tuple(out[:4]), tuple(out[4:])


def quantize_128x128_both(w: Tensor, scale_format: ScaleFormat = "fp32", *, backend: QuantizeBackend = "auto"):
    return torch.ops.blockfp8.quantize_128x128_both(w, scale_format, backend)
