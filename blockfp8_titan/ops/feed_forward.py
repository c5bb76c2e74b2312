"""A gated feed-forward as one op, of those above.

Activation checkpointing decides op by op. Of several ops in a row, of which it keeps the last one's results, it would compute the
others again all the same, unless a compiler finds out that nobody needs them.
"""

from typing import get_args

import torch
from torch import Tensor

from ..formats import BLOCK, ceil_div
from ..recipe import GemmBackend, ScaleFormat
from .backend import QuantizeBackend
from .gemm import gemm_1x128_128x128
from .layouts import E4M3, Quantized, group_multipliers, row_major
from .library import FLOATS, check_choice, check_matrix, define
from .swiglu import swiglu_quantize_1x128_with_inputs


def gated_feed_forward(
    x: Quantized,
    w1: Quantized,
    w3: Quantized,
    w2: Quantized,
    out_dtype: torch.dtype = torch.bfloat16,
    scale_format: ScaleFormat = "fp32",
    *,
    backend: GemmBackend = "auto",
    down_backend: GemmBackend = "auto",
    quantize_backend: QuantizeBackend = "auto",
) -> tuple[Tensor, Quantized, Quantized]:
    """y = (silu(gate) * up) w2^T with gate = x w1^T and up = x w3^T, and gate and up in fp8 for backward.

    Args:
        x: as `quantize_1x128` of [M, K].
        w1, w3, w2: as `quantize_128x128` of [F, K], [F, K] and [N, F].
        out_dtype: of y, and what gate, up and their product are rounded to before they are quantised: bf16 or fp32.
        scale_format: of what is quantised.
        backend, down_backend: who multiplies by w1 and w3, and by w2; see `Recipe.gemm_backend`.
        quantize_backend: who quantises.
    Returns:
        y: [M, N] in out_dtype.
        gate, up: as `quantize_1x128` of [M, F].
    Raises:
        ValueError: names the argument, its value and the requirement; or the backend, and why it cannot run here.
    """
    _, K = _check_pair("x", x, x[0], None, group_rows=True)
    F, _ = _check_pair("w1", w1, x[0], K)
    if _check_pair("w3", w3, x[0], K)[0] != F:
        raise ValueError(f"w3 has shape {tuple(w3[0].shape)}: must have the rows of w1, {F}")
    _check_pair("w2", w2, x[0], F)
    check_choice("out_dtype", out_dtype, FLOATS)
    check_choice("scale_format", scale_format, get_args(ScaleFormat))
    check_choice("quantize_backend", quantize_backend, get_args(QuantizeBackend))
    y, *kept = torch.ops.blockfp8.gated_feed_forward.default(
        *(*x, *w1, *w3, *w2, out_dtype, scale_format, backend, down_backend, quantize_backend)
    )
    return y, tuple(kept[:2]), tuple(kept[2:])


def _check_pair(
    name: str, pair: Quantized, like: Tensor, columns: int | None, *, group_rows: bool = False
) -> tuple[int, int]:
    """The shape of a payload. Raises ValueError unless it has so many columns and its multipliers fit."""
    q, dq = pair
    check_matrix(f"{name}'s payload", q, (E4M3,))
    check_matrix(f"{name}'s multipliers", dq, (torch.float32,))
    rows, K = q.shape
    if columns is not None and columns != K:
        raise ValueError(f"{name} has shape {tuple(q.shape)}: its second dimension must be {columns}")
    expected = (rows if group_rows else ceil_div(rows, BLOCK), ceil_div(K, BLOCK))
    if dq.shape != expected:
        raise ValueError(f"{name}'s multipliers have shape {tuple(dq.shape)}: must be {expected} for its payload")
    for tensor in pair:
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {like.device}: must be on one device")
    return rows, K


def _compute(
    x_q: Tensor,
    x_dq: Tensor,
    w1_q: Tensor,
    w1_dq: Tensor,
    w3_q: Tensor,
    w3_dq: Tensor,
    w2_q: Tensor,
    w2_dq: Tensor,
    out_dtype: torch.dtype,
    scale_format: ScaleFormat,
    backend: GemmBackend,
    down_backend: GemmBackend,
    quantize_backend: QuantizeBackend,
) -> list[Tensor]:
    gate = gemm_1x128_128x128(x_q, x_dq, w1_q, w1_dq, out_dtype, backend=backend)
    up = gemm_1x128_128x128(x_q, x_dq, w3_q, w3_dq, out_dtype, backend=backend)
    h, *kept = swiglu_quantize_1x128_with_inputs(gate, up, scale_format, backend=quantize_backend)
    del gate, up  # memory: w2's GEMM needs neither
    y = gemm_1x128_128x128(*h, w2_q, w2_dq, out_dtype, backend=down_backend)
    return [y, *kept[0], *kept[1]]


def _fake(
    x_q: Tensor,
    x_dq: Tensor,
    w1_q: Tensor,
    w1_dq: Tensor,
    w3_q: Tensor,
    w3_dq: Tensor,
    w2_q: Tensor,
    w2_dq: Tensor,
    out_dtype: torch.dtype,
    scale_format: str,
    backend: str,
    down_backend: str,
    quantize_backend: str,
) -> list[Tensor]:
    M, F, N = x_q.shape[0], w1_q.shape[0], w2_q.shape[0]
    kept = [allocate(x_q, M, F) for _ in range(2) for allocate in (row_major, group_multipliers)]
    return [x_q.new_empty((M, N), dtype=out_dtype), *kept]


define(
    "gated_feed_forward(Tensor x_q, Tensor x_dq, Tensor w1_q, Tensor w1_dq, Tensor w3_q, Tensor w3_dq, Tensor w2_q, Tensor w2_dq, "
    "ScalarType out_dtype, str scale_format, str backend, str down_backend, str quantize_backend) -> Tensor[]",
    reference=_compute,
    cuda=_compute,
    fake=_fake,
)
