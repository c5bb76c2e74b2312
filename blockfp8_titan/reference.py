"""PyTorch twin of every op: the CPU path and the tests' oracle.

The twins say what the ops mean and allocate freely; `ops` gives their results the promised memory layouts.
Names and shapes: x [M,K], w [N,K]; `_q` is a float8_e4m3fn payload, `_dq` the fp32 multiplier that dequantises it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import BLOCK, E4M3_MAX, EPS, ceil_div
from .recipe import ScaleFormat


def block_multiplier(amax: Tensor, scale_format: ScaleFormat) -> Tensor:
    """The dequantisation multiplier of blocks whose largest magnitudes are `amax`.

    dq = max(amax, EPS) / 448, under "pow2" rounded up to a power of two; NaN where amax is NaN or Inf, so that a block that
    held either dequantises to NaN and never to a finite number.

    Args:
        amax: fp32, any shape, >= 0 or NaN.
    Returns:
        fp32, amax's shape.
    """
    # A tensor as divisor: CUDA turns division by a Python number into multiplication by its rounded reciprocal.
    dq = amax.clamp_min(EPS) / torch.full_like(amax, E4M3_MAX)
    if scale_format == "pow2":
        # dq is a normal fp32: carrying any mantissa bit into the exponent and clearing the mantissa rounds up.
        dq = ((dq.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), dq, torch.nan)


def _quantize_blocks(blocks: Tensor, dims: int | tuple[int, ...], scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Payload of blocks, fp32 in any shape, that share a multiplier along `dims`; and the multipliers, without `dims`."""
    dq = block_multiplier(blocks.abs().amax(dims, keepdim=True), scale_format)
    return _payload(blocks, dq), dq.squeeze(dims)


def _payload(blocks: Tensor, dq: Tensor) -> Tensor:
    """e4m3(blocks / dq), shapes broadcast."""
    payload = (blocks / dq).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if dq.isnan().any():
        # The cast of a negative NaN keeps its sign on CPUs and loses it on GPUs; ours is always 0x7F.
        codes = payload.view(torch.uint8)
        codes.masked_fill_(codes == 0xFF, 0x7F)
    return payload


def _to_fp32(q: Tensor) -> Tensor:
    """float8_e4m3fn -> fp32, exact; on CPUs seven times faster than PyTorch's cast."""
    codes = q.view(torch.int8)
    if q.is_cuda or not q.numel() or (codes & 0x7F).max() == 0x7F:  # 0x7F is NaN, which below would be 480
        return q.float()
    # Sign, exponent and mantissa in their places in an fp16, whose exponent has a bias larger by 8.
    halves = (codes.to(torch.int16) << 7) & ~0x4000
    return halves.view(torch.float16).float().mul_(2.0**8)


def quantize_1x128(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Quantise the rows of x in groups of 128: x ~= x_q * x_dq[:, k // 128].

    Args:
        x: [M, K] bf16 or fp32.
    Returns:
        x_q: [M, K] float8_e4m3fn.
        x_dq: [M, ceil(K/128)] fp32.
    """
    M, K = x.shape
    groups = F.pad(x.float(), (0, -K % BLOCK)).view(M, ceil_div(K, BLOCK), BLOCK)
    x_q, x_dq = _quantize_blocks(groups, -1, scale_format)
    return x_q.flatten(1)[:, :K], x_dq


def quantize_1x128_columns(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Quantise the transpose of x along its rows.

    Args:
        x: [M, K] bf16 or fp32.
    Returns:
        xt_q, xt_dq: as `quantize_1x128(x.t())`: [K, M] float8_e4m3fn and [K, ceil(M/128)] fp32.
    """
    M, K = x.shape
    # Transposed as bytes, after the cast.
    columns = F.pad(x.float(), (0, 0, 0, -M % BLOCK)).view(ceil_div(M, BLOCK), BLOCK, K)
    xt_q, xt_dq = _quantize_blocks(columns, 1, scale_format)
    return xt_q.flatten(0, 1)[:M].t(), xt_dq.t()


def quantize_128x128_columns(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Quantise the transpose of x in square blocks.

    Args:
        x: [M, K] bf16 or fp32.
    Returns:
        xt_q, xt_dq: as `quantize_128x128(x.t())`: [K, M] float8_e4m3fn and [ceil(K/128), ceil(M/128)] fp32.
    """
    x_q, x_dq = quantize_128x128(x, scale_format)
    return x_q.t(), x_dq.t()


def quantize_1x128_both(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_1x128` and `quantize_1x128_columns` of x [M, K]: x_q, x_dq, xt_q, xt_dq."""
    return *quantize_1x128(x, scale_format), *quantize_1x128_columns(x, scale_format)


def _blocks(w: Tensor, first_row: int) -> Tensor:
    """Rows first_row to first_row + M of a matrix, as the 128x128 blocks of that matrix which they touch; zeros elsewhere.

    Args:
        w: [M, K] bf16 or fp32.
    Returns:
        [blocks of rows, 128, blocks of columns, 128] fp32.
    """
    M, K = w.shape
    above = first_row % BLOCK if M else 0
    padded = F.pad(w.float(), (0, -K % BLOCK, above, -(above + M) % BLOCK))
    return padded.view(ceil_div(above + M, BLOCK), BLOCK, ceil_div(K, BLOCK), BLOCK)


def _rows(blocks: Tensor, first_row: int, M: int, K: int) -> Tensor:
    """The inverse of `_blocks`."""
    above = first_row % BLOCK
    return blocks.flatten(2).flatten(0, 1)[above : above + M, :K]


def quantize_128x128(w: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Quantise w in square blocks: w ~= w_q * w_dq[n // 128, k // 128].

    Args:
        w: [N, K] bf16 or fp32.
    Returns:
        w_q: [N, K] float8_e4m3fn.
        w_dq: [ceil(N/128), ceil(K/128)] fp32.
    """
    w_q, w_dq = _quantize_blocks(_blocks(w, 0), (1, 3), scale_format)
    return _rows(w_q, 0, *w.shape), w_dq


def amax_128x128(w: Tensor, first_row: int = 0) -> Tensor:
    """max |w| over each 128x128 block of a matrix of which rows first_row to first_row + M are here.

    Args:
        w: [M, K] bf16 or fp32.
    Returns:
        [blocks of rows touched, ceil(K/128)] fp32; NaN where a block holds NaN.
    """
    return _blocks(w, first_row).abs().amax((1, 3))


def quantize_rows(w: Tensor, w_dq: Tensor, first_row: int = 0) -> Tensor:
    """Quantise rows first_row to first_row + M of a matrix with the multipliers of all its 128x128 blocks.

    Args:
        w: [M, K] bf16 or fp32.
        w_dq: [ceil(N/128), ceil(K/128)] fp32, of the whole matrix.
    Returns:
        [M, K] float8_e4m3fn: the rows of `quantize_128x128` of the whole matrix.
    """
    blocks = _blocks(w, first_row)
    first_block = first_row // BLOCK
    w_dq = w_dq[first_block : first_block + blocks.shape[0]]
    return _rows(_payload(blocks, w_dq[:, None, :, None]), first_row, *w.shape)


def transpose_fp8(w_q: Tensor) -> Tensor:
    """[N, K] float8_e4m3fn -> [K, N], row-major."""
    return w_q.t().contiguous()


def quantize_128x128_both(w: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_128x128` of w [N, K], and `transpose_fp8` of its payload: w_q, w_dq, wt_q."""
    w_q, w_dq = quantize_128x128(w, scale_format)
    return w_q, w_dq, transpose_fp8(w_q)


def rms_norm_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row of x [M, K]: [M] fp32."""
    return torch.rsqrt(x.float().square().mean(1) + eps)


def rms_norm(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x * rstd * weight in fp32, rounded once to x's dtype.

    Args:
        x: [M, K] bf16 or fp32.
        rstd: [M] fp32.
        weight: [K] bf16 or fp32.
    """
    return (x.float() * rstd[:, None] * weight.float()).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, rounded once to gate's dtype; any shape."""
    return (gate.float() * torch.sigmoid(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up in fp32, rounded once to dh's dtype; any shape."""
    dtype = dh.dtype
    dh, gate, up = dh.float(), gate.float(), up.float()
    s = torch.sigmoid(gate)
    silu = gate * s
    return (dh * (up * (s + silu * (1 - s)))).to(dtype), (dh * silu).to(dtype)


def dequantize_1x128(q: Tensor, dq: Tensor) -> Tensor:
    """[M, K] float8_e4m3fn and [M, ceil(K/128)] fp32 -> [M, K] fp32."""
    return _to_fp32(q) * _repeat_each(dq)[:, : q.shape[1]]


def dequantize_128x128(q: Tensor, dq: Tensor) -> Tensor:
    """[N, K] float8_e4m3fn and [ceil(N/128), ceil(K/128)] fp32 -> [N, K] fp32."""
    return dequantize_1x128(q, _repeat_each(dq.t()).t()[: q.shape[0]])


def _repeat_each(dq: Tensor) -> Tensor:
    """[M, blocks] -> [M, 128 blocks]: the multiplier of each element of a row."""
    return dq[..., None].expand(*dq.shape, BLOCK).flatten(1)


def gemm_1x128_128x128(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a b^T in fp32 of the dequantised operands.

    Args:
        a_q, a_dq: a [M, K] in groups of 1x128.
        b_q, b_dq: b [N, K] in blocks of 128x128.
    Returns:
        [M, N] in out_dtype.
    """
    return _product(dequantize_1x128(a_q, a_dq), dequantize_128x128(b_q, b_dq)).to(out_dtype)


def gemm_1x128_1x128(a_q: Tensor, a_dq: Tensor, b_q: Tensor, b_dq: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a b^T in fp32 of the dequantised operands.

    Args:
        a_q, a_dq: a [M, K] in groups of 1x128.
        b_q, b_dq: b [N, K] in groups of 1x128.
    Returns:
        [M, N] in out_dtype.
    """
    return _product(dequantize_1x128(a_q, a_dq), dequantize_1x128(b_q, b_dq)).to(out_dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in fp32, whatever autocast is set to where the op is called."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.t()
