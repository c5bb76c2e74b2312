"""Who competes in bench_kernels.py: our kernels and their peers, each with its check against fp32."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from shapes import FORWARD, WGRAD, Shape
from torch import Tensor

from blockfp8_titan import ops, reference
from blockfp8_titan.formats import BLOCK, E4M3_MAX, ceil_div
from blockfp8_titan.numerics import relative_error
from blockfp8_titan.ops import gemm as gemm_ops

OURS, BASE = "ours", "cublas"


@dataclass(frozen=True)
class Candidate:
    """A contender made ready for one shape."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    reads: tuple[Tensor, ...]
    error: Callable[[Any], float]
    """A result's relative error against fp32; NaN where the result holds NaN."""
    bound: float
    """A greater error is wrong."""
    accumulates: bool = False
    """run adds to its result."""


@dataclass(frozen=True)
class Contender:
    """Who competes, in which kinds of shape.

    peer: the module of `PEERS` that it needs. tunes: the first launch for a shape tries configurations, for seconds.
    """

    name: str
    prepare: Callable[[Any], Candidate]
    kinds: tuple[str, ...] = (FORWARD, WGRAD)
    peer: str | None = None
    tunes: bool = False
    note: str = ""


# GEMMs

GEMM_BOUND = 1e-2
CHECKED_ROWS = 2048


class GemmOperands:
    """Random operands of one GEMM, quantised when first asked for.

    Results are checked on evenly spaced rows, at most `CHECKED_ROWS`, which cross every tile.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.kind = shape.kind
        self.a = torch.randn(shape.M, shape.K, device=device, dtype=torch.bfloat16)
        self.b = torch.randn(shape.N, shape.K, device=device, dtype=torch.bfloat16)
        self.step = ceil_div(shape.M, CHECKED_ROWS)

    @cached_property
    def blockwise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a_q, a_dq, b_q, b_dq of this kind."""
        quantize_b = ops.quantize_128x128 if self.kind == FORWARD else ops.quantize_1x128
        return *ops.quantize_1x128(self.a), *quantize_b(self.b)

    @cached_property
    def blockwise_exact(self) -> Tensor:
        a_q, a_dq, b_q, b_dq = self.blockwise
        dequantize_b = reference.dequantize_128x128 if self.kind == FORWARD else reference.dequantize_1x128
        return reference.dequantize_1x128(a_q[:: self.step], a_dq[:: self.step]) @ dequantize_b(b_q, b_dq).t()

    def error(self, out: Tensor, exact: Tensor) -> float:
        """exact holds the checked rows alone."""
        return relative_error(exact, out[:: self.step]) if out.isfinite().all() else math.nan

    def blockwise_candidate(self, run: Callable[[], Tensor], accumulates: bool = False) -> Candidate:
        def error(out: Tensor) -> float:
            return self.error(out, self.blockwise_exact)

        return Candidate(run, self.blockwise, error, GEMM_BOUND, accumulates)

    def forget(self) -> None:
        """Free what only checks need."""
        self.__dict__.pop("blockwise_exact", None)


def _ours(o: GemmOperands) -> Candidate:
    multiply = ops.gemm_1x128_128x128 if o.kind == FORWARD else ops.gemm_1x128_1x128
    return o.blockwise_candidate(lambda: multiply(*o.blockwise, backend="triton"))


def _portable(o: GemmOperands) -> Candidate:
    return o.blockwise_candidate(lambda: gemm_ops._portable(*o.blockwise, o.kind == WGRAD, torch.bfloat16))


def _cublas(o: GemmOperands) -> Candidate:
    multiply = ops.gemm_1x128_128x128 if o.kind == FORWARD else ops.gemm_1x128_1x128
    return o.blockwise_candidate(lambda: multiply(*o.blockwise, backend="cublas"))


def _torchao(o: GemmOperands) -> Candidate:
    from torchao.prototype.blockwise_fp8_training import kernels

    a_q, a_dq, b_q, b_dq = o.blockwise
    if a_q.shape[1] % BLOCK:
        raise ValueError(f"K = {a_q.shape[1]}: torchao's kernels take multiples of {BLOCK}")
    multiply = kernels.triton_fp8_gemm_1x128_128x128 if o.kind == FORWARD else kernels.triton_fp8_gemm_1x128_128x1
    return o.blockwise_candidate(lambda: multiply(a_q, b_q.t(), a_dq, b_dq.t(), out_dtype=torch.bfloat16))


def _deep_gemm(o: GemmOperands) -> Candidate:
    import deep_gemm

    a_q, a_dq, b_q, b_dq = o.blockwise
    size = (a_q.shape[0], b_q.shape[0])
    options: dict[str, Any] = {}
    if o.kind == FORWARD:
        multiply = getattr(deep_gemm, "fp8_gemm_nt", None) or deep_gemm.gemm_fp8_fp8_bf16_nt  # as it was called before
        out = a_q.new_empty(size, dtype=torch.bfloat16)
    else:
        # On Hopper the kernel for 1x128 on both sides writes fp32 and adds to what is there.
        out = a_q.new_zeros(size, dtype=torch.float32)
        if hasattr(deep_gemm, "fp8_gemm_nt"):
            multiply, options = deep_gemm.fp8_gemm_nt, {"c": out, "recipe": (1, 1, 128)}
        else:
            multiply = deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt

    def run() -> Tensor:
        # Multipliers as ours lie: M-contiguous with M a multiple of 4, what its Hopper kernels load as they are.
        multiply((a_q, a_dq), (b_q, b_dq), out, **options)
        return out

    return o.blockwise_candidate(run, accumulates=o.kind == WGRAD)


def _fbgemm(o: GemmOperands) -> Candidate:
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_block

    (a_q, a_dq), (b_q, b_dq) = quantize_fp8_block(o.a, 128, 128), quantize_fp8_block(o.b, 128, 128)

    def error(out: Tensor) -> float:
        a = reference.dequantize_128x128(a_q, a_dq)[:: o.step]
        return o.error(out, a @ reference.dequantize_128x128(b_q, b_dq).t())

    return Candidate(
        lambda: torch.ops.fbgemm.f8f8bf16_blockwise(a_q, b_q, a_dq, b_dq, 128, 128, 128),
        (a_q, a_dq, b_q, b_dq),
        error,
        GEMM_BOUND,
    )


def _bf16(o: GemmOperands) -> Candidate:
    # As autograd multiplies: the operands of dw are dy and x, transposed views of a and b.
    a, b = (o.a, o.b.t()) if o.kind == FORWARD else (o.a.t().contiguous().t(), o.b.t().contiguous())
    return Candidate(
        lambda: torch.mm(a, b),
        (a, b),
        lambda out: o.error(out, a[:: o.step].float() @ b.float()),
        GEMM_BOUND,
    )


def _scaled(o: GemmOperands, dim: tuple[int, ...]) -> Candidate:
    """torch._scaled_mm with one multiplier for what lies along dim."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        dq = x.abs().amax(dim, keepdim=True).float() / E4M3_MAX
        return (x / dq).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), dq

    (a_q, a_dq), (b_q, b_dq) = quantize(o.a), quantize(o.b)
    fast = o.kind == FORWARD  # fast accumulation as torchao's recipes have it for y, none for dw

    def error(out: Tensor) -> float:
        return o.error(out, (a_q.float() * a_dq)[:: o.step] @ (b_q.float() * b_dq).t())

    def run() -> Tensor:
        return torch._scaled_mm(a_q, b_q.t(), a_dq, b_dq.t(), out_dtype=torch.bfloat16, use_fast_accum=fast)

    # Fast accumulation keeps about 14 bits: its error is reported and not judged.
    return Candidate(run, (a_q, a_dq, b_q, b_dq), error, math.inf if fast else GEMM_BOUND)


GEMMS = (
    Contender(OURS, _ours, note='gemm_backend = "triton"'),
    Contender("portable", _portable, note="ours for GPUs other than Hopper"),
    Contender(BASE, _cublas, note="cuBLASLt's blockwise GEMM, torch.nn.functional.scaled_mm"),
    Contender("torchao", _torchao, peer="torchao", tunes=True, note="Triton, prototype.blockwise_fp8_training"),
    Contender("deep_gemm", _deep_gemm, peer="deep_gemm", note="fp8_gemm_nt; dw is added to fp32"),
    Contender("fbgemm", _fbgemm, (FORWARD,), peer="fbgemm", note="f8f8bf16_blockwise; 128x128 on both sides"),
    Contender("bf16", _bf16, note="torch.mm"),
    Contender("tensorwise", lambda o: _scaled(o, (0, 1)), note="torch._scaled_mm; fast accumulation except in dw"),
    Contender("rowwise", lambda o: _scaled(o, (1,)), note="torch._scaled_mm; fast accumulation except in dw"),
)


# Quantisation

QUANTIZE_BOUND = 4e-2  # rounding to e4m3 costs 2.7e-2 of normal data


def _quantizer(quantize: Callable[[Tensor], Any], decode: Callable[..., Tensor]) -> Callable[[Tensor], Candidate]:
    """decode: what quantize returned -> an fp32 approximation of x."""

    def prepare(x: Tensor) -> Candidate:
        return Candidate(lambda: quantize(x), (x,), lambda out: relative_error(x, decode(*out)), QUANTIZE_BOUND)

    return prepare


def _copy(x: Tensor) -> Candidate:
    out = torch.empty_like(x)
    return Candidate(lambda: out.copy_(x), (x,), lambda out: relative_error(x, out), 0.0)


def _both(x: Tensor) -> Candidate:
    def error(out: tuple[Tensor, ...]) -> float:
        rows = relative_error(x, reference.dequantize_1x128(*out[:2]))
        columns = relative_error(x.t(), reference.dequantize_1x128(*out[2:]))
        return math.hypot(rows, columns) / math.sqrt(2)

    return Candidate(lambda: ops.quantize_1x128_both(x), (x,), error, QUANTIZE_BOUND)


def _transpose(x: Tensor) -> Candidate:
    w_q, _ = ops.quantize_128x128(x)

    def error(out: Tensor) -> float:
        return relative_error(w_q.float(), out.t().float())

    return Candidate(lambda: ops.transpose_fp8(w_q), (w_q,), error, 0.0)


def _torchao_quantizer(name: str, decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Candidate]:
    def prepare(x: Tensor) -> Candidate:
        from torchao.prototype.blockwise_fp8_training import kernels

        return _quantizer(getattr(kernels, f"triton_fp8_blockwise_{name}"), decode)(x)

    return prepare


def _fbgemm_quantize_block(x: Tensor) -> Candidate:
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_block

    return _quantizer(lambda x: quantize_fp8_block(x, 128, 128), reference.dequantize_128x128)(x)


_rows, _blocks = reference.dequantize_1x128, reference.dequantize_128x128
_TORCHAO = {"peer": "torchao", "tunes": True}
COPY = "copy"
QUANTIZERS = (
    Contender(COPY, _copy, ("x", "w"), note="Tensor.copy_, bf16"),
    Contender("quantize_1x128", _quantizer(ops.quantize_1x128, _rows), ("x",)),
    Contender("quantize_1x128_both", _both, ("x",)),
    Contender("quantize_128x128", _quantizer(ops.quantize_128x128, _blocks), ("w",)),
    Contender("transpose_fp8", _transpose, ("w",)),
    Contender("torchao act_quant_lhs", _torchao_quantizer("act_quant_lhs", _rows), ("x",), **_TORCHAO),
    Contender(
        "torchao act_quant_transposed_lhs",
        _torchao_quantizer("act_quant_transposed_lhs", lambda q, dq: _rows(q, dq).t()),
        ("x",),
        **_TORCHAO,
    ),
    Contender(
        "torchao act_quant_rhs",
        _torchao_quantizer("act_quant_rhs", lambda q, dq: _rows(q.t(), dq.t()).t()),
        ("x",),
        **_TORCHAO,
    ),
    Contender("torchao weight_quant_rhs", _torchao_quantizer("weight_quant_rhs", _blocks), ("w",), **_TORCHAO),
    Contender(
        "torchao weight_quant_transposed_rhs",
        _torchao_quantizer("weight_quant_transposed_rhs", lambda q, dq: _blocks(q, dq).t()),
        ("w",),
        **_TORCHAO,
    ),
    Contender("fbgemm quantize_fp8_block", _fbgemm_quantize_block, ("w",), peer="fbgemm"),
)


def tensors(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def check(candidate: Candidate) -> tuple[float, int]:
    """The relative error of a result written over NaN, and the bytes read and written."""
    for x in tensors(candidate.run()):
        # The next run gets this memory again.
        if candidate.accumulates:
            x.zero_()
        elif x.dtype == torch.float8_e4m3fn:
            x.view(torch.uint8).fill_(0x7F)
        else:
            x.fill_(math.nan)
        del x
    out = candidate.run()
    return candidate.error(out), sum(x.nbytes for x in (*candidate.reads, *tensors(out)))
