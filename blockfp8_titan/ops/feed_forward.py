"""A gated feed-forward as one op, of those above.

Activation checkpointing decides op by op. Of several ops in a row, of which it keeps the last one's results, it would compute the
others again all the same, unless a compiler finds out that nobody needs them.
"""

import torch
from torch import Tensor

from ..recipe import GemmBackend, ScaleFormat
from .backend import QuantizeBackend
from .gemm import gemm_1x128_128x128
from .layouts import group_multipliers, row_major
from .library import define
from .producers import swiglu_quantize_1x128_with_inputs

Quantized = tuple[Tensor, Tensor]
"""Payload and multipliers."""


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
        ValueError: as the ops that it is made of; or the backend, and why it cannot run here.
    """
    y, *kept = torch.ops.blockfp8.gated_feed_forward.default(
        *(*x, *w1, *w3, *w2, out_dtype, scale_format, backend, down_backend, quantize_backend)
    )
    return y, tuple(kept[:2]), tuple(kept[2:])


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
