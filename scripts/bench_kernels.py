"""Time our kernels and their peers in one process, on the Linears of Llama 3 and DeepSeek-V3.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --only gemm --shapes "70B w1" "8B wq" --seconds 60
    python scripts/bench_kernels.py --suite full --seconds 580 --name bench_kernels_full

Candidates take turns on the same random data, in a new order each round: a chip at its power limit slows down as it warms and
after a hungry neighbour, so times of separate runs do not compare. A sample is the mean of back-to-back launches that last about
3 ms together, between two CUDA events, after a write of 256 MB that empties L2; reported are the median of the samples and their
spread. Every candidate's result is checked. A peer that cannot be imported is named as absent.

Writes NAME.json and NAME.md to --out after every shape, and NAME.png at the end, which Ctrl-C brings forward. Exits with 2 where there
is no suitable GPU, with 1 when a result is wrong, with 130 when it was interrupted.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from measure import (
    FLUSH_BYTES,
    MAX_ROUNDS,
    MIN_ROUNDS,
    SAMPLE_US,
    CudaTimer,
    Pace,
    Timer,
    find_peers,
    fp8_gpu,
    host_us_per_call,
    interleave,
    peak_tflops,
    reason,
    spread,
    table,
)
from provenance import ROOT, provenance
from torch import Tensor

from blockfp8_titan import ops, reference
from blockfp8_titan.formats import BLOCK, E4M3_MAX, ceil_div
from blockfp8_titan.numerics import relative_error
from blockfp8_titan.ops import gemm as gemm_ops
from blockfp8_titan.ops import library

Item = TypeVar("Item")

# Shapes

FORWARD, WGRAD = "1x128_128x128", "1x128_1x128"  # y and dx; dw
Kind = Literal["1x128_128x128", "1x128_1x128"]


def llama(dim: int, hidden: int, tp: int = 1) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a block's Linears on one of tp ranks; wv is as wk, w3 as w1."""
    kv = 1024
    return {
        "wq": (dim // tp, dim),
        "wk": (kv // tp, dim),
        "wo": (dim, dim // tp),
        "w1": (hidden // tp, dim),
        "w2": (dim, hidden // tp),
    }


MODELS = {
    "8B": llama(4096, 14336),
    "70B": llama(8192, 28672),
    "405B": llama(16384, 53248),
    "70B/TP8": llama(8192, 28672, tp=8),
    "405B/TP8": llama(16384, 53248, tp=8),
    "DSv3": {
        "wq_a": (1536, 7168),
        "wq_b": (24576, 1536),
        "wkv_a": (576, 7168),
        "wkv_b": (32768, 512),
        "wo": (7168, 16384),
        "w1": (18432, 7168),
        "w2": (7168, 18432),
        "expert.w1": (2048, 7168),
        "expert.w2": (7168, 2048),
    },
}
SUITES = {
    "quick": (("8B", 16384), ("70B", 8192)),
    "full": tuple(itertools.product(MODELS, (4096, 8192, 16384))),
}


@dataclass(frozen=True)
class Shape:
    """One size to measure, and every place of the models that has it: uses, of which the first names it.

    A GEMM is a [M, K] times b [N, K] transposed, of a `Kind`. A tensor to quantise is [M, K] and an activation or gradient, "x",
    or a weight, "w"; its N is 0.
    """

    kind: Kind | Literal["x", "w"]
    M: int
    N: int
    K: int
    uses: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.uses[0]

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def size(self) -> str:
        return "x".join(str(n) for n in (self.M, self.N, self.K) if n)


def _merge(uses: Iterable[tuple[tuple[Any, int, int, int], str]]) -> list[Shape]:
    merged: dict[tuple[Any, int, int, int], list[str]] = {}
    for key, use in uses:
        merged.setdefault(key, []).append(use)
    return [Shape(*key, tuple(names)) for key, names in merged.items()]


def gemm_shapes(suite: Iterable[tuple[str, int]]) -> list[Shape]:
    """The three GEMMs of every Linear of these (model, tokens), each size once."""

    def uses() -> Iterator[tuple[tuple[Kind, int, int, int], str]]:
        for model, tokens in suite:
            for linear, (out, into) in MODELS[model].items():
                name = f"{model} {linear}.{{}} {tokens // 1024}k"
                yield (FORWARD, tokens, out, into), name.format("y")
                yield (FORWARD, tokens, into, out), name.format("dx")
                yield (WGRAD, out, into, tokens), name.format("dw")

    return _merge(uses())


def quantize_shapes(suite: Iterable[tuple[str, int]]) -> list[Shape]:
    """Input, output gradient and weight of every Linear of these (model, tokens), each size once."""

    def uses() -> Iterator[tuple[tuple[str, int, int, int], str]]:
        for model, tokens in suite:
            for linear, (out, into) in MODELS[model].items():
                name = f"{model} {linear}.{{}}"
                yield ("x", tokens, 0, into), f"{name.format('x')} {tokens // 1024}k"
                yield ("x", tokens, 0, out), f"{name.format('dy')} {tokens // 1024}k"
                yield ("w", out, 0, into), name.format("w")

    return _merge(uses())


def chosen(shapes: list[Shape], filters: Sequence[str]) -> list[Shape]:
    """Those with a use that contains one of the texts; all if there are no texts."""
    return [s for s in shapes if not filters or any(text in use for text in filters for use in s.uses)]


def spread_out(items: Sequence[Item]) -> list[Item]:
    """Reordered so that every beginning is spread evenly over the whole (van der Corput's sequence)."""
    bits = len(items).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]


# Time

TUNING_SHARE = 0.4
SHARES = {"gemm": 0.65, "quantize": 0.3, "host": 0.05}  # of the time, when all sections run
OURS, BASE = "ours", "cublas"


class Budget:
    """The seconds of a section, and the part of them that candidates which tune themselves for each shape may tune."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.tuning = TUNING_SHARE * seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


# Candidates


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


# Candidates: GEMMs

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


# Candidates: quantisation

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


# Measurement


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


def measure(
    contenders: Sequence[Contender],
    operands: Any,
    timer: Timer,
    budget: Budget,
    seconds: float,
    *,
    work: int | None,
    base: str,
    copy_gbps: float | None,
) -> dict[str, dict[str, Any]]:
    """Check all on these operands, then sample them in turn.

    Args:
        seconds: for this shape; at least `MIN_ROUNDS` are sampled however long they take.
        work: FLOPs of a launch, or None where the work is the bytes moved.
        base: the contender with which the others are compared, round by round.
        copy_gbps: of the run; None to compare with the base instead, which is then the copy of this shape.
    Returns:
        For each name us, spread, rounds, launches, bytes, gbps, percent_of_copy, ratio, error, wrong, and tflops with work;
        or failed, the reason.
    """
    began = time.monotonic()
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Candidate, Pace]] = {}
    for contender in contenders:
        if contender.tunes and budget.tuning <= 0:
            records[contender.name] = {"failed": "not measured: tuning for other shapes has used up its time"}
            continue
        start = time.monotonic()
        try:
            candidate = contender.prepare(operands)
            error, moved = check(candidate)
            ready[contender.name] = candidate, timer.pace(candidate.run)
        except Exception as failure:  # one that cannot run here must not end the run
            records[contender.name] = {"failed": reason(failure)}
        else:
            wrong = not error <= candidate.bound
            # JSON has no NaN.
            records[contender.name] = {"bytes": moved, "error": error if math.isfinite(error) else None, "wrong": wrong}
        if contender.tunes:
            budget.tuning -= time.monotonic() - start
    if isinstance(operands, GemmOperands):
        operands.forget()

    runs = {name: (candidate.run, pace) for name, (candidate, pace) in ready.items()}
    samples = interleave(runs, timer, began + seconds)
    for name, times in samples.items():
        record = records[name]
        us = statistics.median(times)
        record |= {"us": us, "spread": spread(times), "rounds": len(times), "launches": ready[name][1].launches}
        record["gbps"] = record["bytes"] / us / 1e3
        if work:
            record["tflops"] = work / us / 1e6
        record["ratio"] = None
        if base in samples:
            more = 1 if work else record["bytes"] / records[base]["bytes"]
            record["ratio"] = statistics.median(more * b / t for t, b in zip(times, samples[base], strict=True))
        record["percent_of_copy"] = 100 * record["gbps"] / copy_gbps if copy_gbps else None
        if copy_gbps is None and record["ratio"] is not None:
            record["percent_of_copy"] = 100 * record["ratio"]
    return records


@dataclass
class Bench:
    """One run: who takes part, who is absent, what was measured and what left out.

    after_shape: called whenever there is more in gemm, quantize or host_us.
    """

    device: torch.device
    timer: Timer
    absent: dict[str, str] = field(default_factory=dict)
    after_shape: Callable[[], None] = lambda: None
    dropped: dict[str, str] = field(default_factory=dict)
    gemm: list[dict[str, Any]] = field(default_factory=list)
    quantize: list[dict[str, Any]] = field(default_factory=list)
    host_us: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def contenders(self, among: Sequence[Contender], kind: str | None = None) -> list[Contender]:
        """Those that are here and, with kind, take part in it."""
        return [c for c in among if c.peer not in self.absent and (kind is None or kind in c.kinds)]

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def copy(self, rows: int = 16384, columns: int = 14336) -> dict[str, Any]:
        """The copy bandwidth of this run, that of a bf16 tensor far larger than L2."""
        x = torch.randn(rows, columns, device=self.device, dtype=torch.bfloat16)
        only = [c for c in QUANTIZERS if c.name == COPY]
        record = measure(only, x, self.timer, Budget(5), 5, work=None, base=COPY, copy_gbps=None)[COPY]
        if "failed" in record:
            raise RuntimeError(f"copying bf16 [{rows}, {columns}] failed: {record['failed']}")
        self.say(f"copy of bf16 [{rows}, {columns}]: {record['gbps']:,.0f} GB/s")
        return {"M": rows, "K": columns, **record}

    def section(
        self,
        records: list[dict[str, Any]],
        shapes: Sequence[Shape],
        seconds: float,
        one: Callable[[Shape, Budget, float], dict[str, Any]],
    ) -> None:
        """Measure shapes until the time is up, in an order that leaves out evenly; records are in the order of shapes."""
        budget = Budget(seconds)
        done: dict[Shape, dict[str, Any]] = {}
        for number, shape in enumerate(spread_out(shapes)):
            if budget.left <= 0:
                self.dropped[shape.name] = "time was up"
                continue
            try:
                candidates = one(shape, budget, budget.left / (len(shapes) - number))
            except Exception as failure:  # out of memory, say: what was measured must survive
                self.dropped[shape.name] = reason(failure)
                self.say(f"{shape.name}: {self.dropped[shape.name]}")
                continue
            done[shape] = candidates
            records[:] = [
                {
                    **{"shape": s.name, "kind": s.kind, "M": s.M, "K": s.K, "uses": s.uses},
                    **({"N": s.N, "flops": s.flops} if s.N else {}),
                    "candidates": done[s],
                }
                for s in shapes
                if s in done
            ]
            self.say(f"{shape.name} {shape.size}: {progress(candidates)}")
            self.after_shape()

    def measure_gemm(self, shapes: Sequence[Shape], seconds: float, copy_gbps: float) -> None:
        def one(shape: Shape, budget: Budget, seconds: float) -> dict[str, Any]:
            return measure(
                self.contenders(GEMMS, shape.kind),
                GemmOperands(shape, self.device),
                self.timer,
                budget,
                seconds,
                work=shape.flops,
                base=BASE,
                copy_gbps=copy_gbps,
            )

        self.section(self.gemm, shapes, seconds, one)

    def measure_quantize(self, shapes: Sequence[Shape], seconds: float) -> None:
        def one(shape: Shape, budget: Budget, seconds: float) -> dict[str, Any]:
            return measure(
                self.contenders(QUANTIZERS, shape.kind),
                torch.randn(shape.M, shape.K, device=self.device, dtype=torch.bfloat16),
                self.timer,
                budget,
                seconds,
                work=None,
                base=COPY,
                copy_gbps=None,
            )

        self.section(self.quantize, shapes, seconds, one)

    def measure_host(self, seconds: float, size: int = 256, calls: int = 300) -> None:
        """The host's µs for a call: the median of eager calls at a size where the GPU keeps up, not synchronised."""
        budget = Budget(seconds)
        found = self.host_us
        jobs = [(c, kind) for kind in (FORWARD, WGRAD) for c in self.contenders(GEMMS, kind)]
        jobs += [(c, "quantize") for c in self.contenders(QUANTIZERS)]
        # Those that tune come last: they alone may not get their turn.
        for contender, kind in sorted(jobs, key=lambda job: job[0].tunes):
            if contender.tunes and budget.left <= 0:
                self.dropped[f"host {contender.name} {kind}"] = "time was up"
                continue
            if kind == "quantize":
                operands: Any = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
            else:
                operands = GemmOperands(Shape(kind, size, size, size, ("host",)), self.device)
            try:
                run = contender.prepare(operands).run
                run()
                self.timer.synchronize()
                found.setdefault(kind, {})[contender.name] = host_us_per_call(run, calls)
                self.timer.synchronize()
            except Exception as failure:  # as in `measure`
                self.dropped[f"host {contender.name} {kind}"] = reason(failure)
        for kind, times in found.items():
            self.say(f"host µs, {kind}: " + ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
        self.after_shape()


def progress(candidates: dict[str, dict[str, Any]]) -> str:
    parts = []
    for name, record in candidates.items():
        if "failed" in record:
            parts.append(f"{name} —")
        elif "tflops" in record:
            parts.append(f"{name} {record['tflops']:.0f}" + " WRONG" * record["wrong"])
        else:
            parts.append(f"{name} {record['percent_of_copy'] or math.nan:.0f}%" + " WRONG" * record["wrong"])
    return ", ".join(parts)


# What became of it


def roofline(flops_per_byte: float, peak: float, gbps: float) -> float:
    """Attainable TFLOP/s at this intensity under a peak in TFLOP/s and a bandwidth in GB/s."""
    return min(peak, flops_per_byte * gbps / 1e3)


def ctas_per_multiprocessor(registers: int, shared: int, warps: int, limits: dict[str, int]) -> dict[str, int]:
    """How many programs fit a multiprocessor, by each resource; "fit" is the least.

    Args:
        registers: per thread; the hardware gives them to a warp in units of 256.
        shared: bytes per program; the system adds 1 KiB.
        limits: registers, shared bytes, warps and programs of a multiprocessor.
    """
    by = {
        "by_registers": limits["registers"] // (ceil_div(max(registers, 1) * 32, 256) * 256 * warps),
        "by_shared": limits["shared"] // (shared + 1024),
        "by_warps": min(limits["warps"] // warps, limits["programs"]),
    }
    return {**by, "fit": min(by.values())}


def multiprocessor_limits(device: torch.device) -> dict[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "registers": 65536,  # on every GPU that has e4m3
        "shared": properties.shared_memory_per_multiprocessor,
        "warps": properties.max_threads_per_multi_processor // 32,
        "programs": 24 if (properties.major, properties.minor) == (8, 9) else 32,
    }


def resources(compiled: Iterable[tuple[str, Any]], limits: dict[str, int]) -> list[dict[str, Any]]:
    """What our kernels occupy: one row for each (constants, CompiledKernel) that differs."""
    rows: list[dict[str, Any]] = []
    for constants, kernel in compiled:
        registers, shared, warps = kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps
        row = {
            "kernel": kernel.metadata.name,
            "constants": constants,
            "registers": registers,
            "spills": kernel.n_spills,
            "shared_bytes": shared,
            "warps": warps,
            "programs_per_multiprocessor": ctas_per_multiprocessor(registers, shared, warps, limits),
        }
        if row not in rows:
            rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["constants"]))


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind and candidate: shapes measured, geometric mean and worst of the ratio to the base, and wrong results."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        of_kind = [record for record in records if record["kind"] == kind]
        for name in dict.fromkeys(name for record in of_kind for name in record["candidates"]):
            measured = {r["shape"]: r["candidates"][name] for r in of_kind if "us" in r["candidates"].get(name, {})}
            row: dict[str, Any] = {"shapes": len(measured)}
            row["wrong"] = [shape for shape, record in measured.items() if record["wrong"]]
            if ratios := {s: record["ratio"] for s, record in measured.items() if record["ratio"] is not None}:
                worst = min(ratios, key=lambda shape: ratios[shape])
                row |= {"ratio": statistics.geometric_mean(ratios.values())}
                row |= {"worst_ratio": ratios[worst], "worst_shape": worst}
            summary.setdefault(kind, {})[name] = row
    return summary


KIND_TITLES = {
    FORWARD: "y and dx, 1x128 times 128x128",
    WGRAD: "dw, 1x128 times 1x128",
    "x": "activations and gradients",
    "w": "weights",
}


def summary_table(summary: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for kind, names in summary.items():
        for name, row in names.items():
            ratio, worst = "—", "—"
            if "ratio" in row:
                ratio, worst = f"{row['ratio']:.3f}", f"{row['worst_ratio']:.3f} ({row['worst_shape']})"
            rows.append((KIND_TITLES[kind], name, str(row["shapes"]), ratio, worst, str(len(row["wrong"]) or "")))
    header = ("kind", "candidate", "shapes", f"× {BASE} or copy, geometric mean", "worst shape", "wrong")
    return table(header, rows, left=2)


def matrix_table(records: Sequence[dict[str, Any]]) -> str:
    """Shapes against candidates of one kind: TFLOP/s, or the percentage of the copy's bandwidth."""
    names = list(dict.fromkeys(name for record in records for name in record["candidates"]))

    def cell(record: dict[str, Any] | None) -> str:
        if record is None or "failed" in record:
            return "—"
        text = f"{record['tflops']:.0f}" if "tflops" in record else f"{record['percent_of_copy'] or math.nan:.0f} %"
        return text + " WRONG" * record["wrong"]

    rows = []
    for record in records:
        size = f"{record['M']}x{record['N']}x{record['K']}" if "N" in record else f"{record['M']}x{record['K']}"
        rows.append((record["shape"], size, *(cell(record["candidates"].get(name)) for name in names)))
    size = "MxNxK" if "N" in records[0] else "MxK"
    return table(("shape", size, *names), rows, left=2)


def detail_table(records: Sequence[dict[str, Any]], base: str) -> str:
    """One line for each shape and candidate."""
    header = ("shape", "candidate", "µs", "spread", "TFLOP/s", "GB/s", "% of copy", f"× {base}", "relative error")
    rows = []
    for record in records:
        for name, c in record["candidates"].items():
            if "failed" in c:
                rows.append((record["shape"], name, *["—"] * 6, c["failed"].replace("|", "\\|")))
                continue
            error = "not finite" if c["error"] is None else f"{c['error']:.1e}"
            ratio = "—" if c["ratio"] is None else f"{c['ratio']:.3f}"
            copy = "—" if c["percent_of_copy"] is None else f"{c['percent_of_copy']:.0f}"
            numbers = (f"{c['us']:.1f}", f"{c['spread']:.1%}", f"{c['tflops']:.0f}" if "tflops" in c else "—")
            numbers += (f"{c['gbps']:,.0f}", copy, ratio, error + " WRONG" * c["wrong"])
            rows.append((record["shape"], name, *numbers))
    return table(header, rows, left=2)


def of_kinds(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for kind in KIND_TITLES:
        if of_kind := [record for record in records if record["kind"] == kind]:
            yield kind, of_kind


def overview(result: dict[str, Any]) -> str:
    """Summary and matrices, as Markdown."""
    parts = [summary_table(result["summary"])]
    for kind, records in of_kinds([*result["gemm"], *result["quantize"]]):
        unit = "TFLOP/s" if "N" in records[0] else "% of the bandwidth of copying the same tensor"
        parts += [f"### {KIND_TITLES[kind]}: {unit}", matrix_table(records)]
    return "\n\n".join(parts)


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    parts = [
        "# Kernels and their peers",
        f"{result['gpu']}; {versions}; {result['date']}, commit {result['commit']}. Suite {result['suite']}, "
        f"{result['seconds']:.0f} s. Copy bandwidth of this run: {result['copy']['gbps']:,.0f} GB/s "
        f"(bf16 [{result['copy']['M']}, {result['copy']['K']}], read and written).",
        "Medians of rounds in which the candidates take turns, L2 emptied before each sample; spread is (90th - 10th "
        "percentile) / median; × is the median over rounds of the ratio of speeds. GB/s count each operand and result once.",
        "\n".join(f"- {name}: {note}" for name, note in result["notes"].items()),
    ]
    if result["interrupted"]:
        parts.append("This run was not finished.")
    if result["absent"]:
        parts.append("Absent:\n" + "\n".join(f"- {name}: {why}" for name, why in result["absent"].items()))
    if result["dropped"]:
        parts.append("Not measured:\n" + "\n".join(f"- {name}: {why}" for name, why in result["dropped"].items()))
    parts += ["## Overview", overview(result)]
    if result["host_us"]:
        rows = [
            (KIND_TITLES.get(k, k), n, f"{us:.1f}") for k, times in result["host_us"].items() for n, us in times.items()
        ]
        parts += ["## Host µs per eager call", table(("kind", "candidate", "µs"), rows, left=2)]
    if result["kernels"]:
        header = ("kernel", "constants", "registers", "spills", "shared memory", "warps", "programs per multiprocessor")
        rows = [
            (
                *(row["kernel"], row["constants"], str(row["registers"]), str(row["spills"])),
                *(f"{row['shared_bytes'] / 1024:.0f} KiB", str(row["warps"])),
                str(row["programs_per_multiprocessor"]["fit"]),
            )
            for row in result["kernels"]
        ]
        parts += ["## Resources of our kernels", table(header, rows, left=2)]
    for kind, records in of_kinds([*result["gemm"], *result["quantize"]]):
        parts += [f"## Details: {KIND_TITLES[kind]}", detail_table(records, BASE if "N" in records[0] else COPY)]
    return "\n\n".join(parts) + "\n"


COLORS = {
    OURS: "#c2410c",
    "portable": "#fdba74",
    BASE: "#111827",
    "torchao": "#7c3aed",
    "deep_gemm": "#0891b2",
    "fbgemm": "#be185d",
    "bf16": "#9aa5b1",
    "tensorwise": "#1d4ed8",
    "rowwise": "#15803d",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """TFLOP/s of every shape by kind, the roofline, and quantisation as a percentage of the copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(of_kinds(result["gemm"]))
    quantizers = list(dict.fromkeys(n for r in result["quantize"] for n in r["candidates"] if n != COPY))
    heights = [0.24 * len(records) + 0.6 for _, records in kinds]
    heights += [4.0] if kinds else []
    heights += [0.24 * len(quantizers) + 0.6] if quantizers else []
    if not heights:
        return
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            len(heights), 1, figsize=(9, sum(heights) + 1), height_ratios=heights, layout="constrained", squeeze=False
        )
        axes = iter(grid[:, 0])
        for kind, records in kinds:
            _plot_shapes(next(axes), KIND_TITLES[kind], records)
        if kinds:
            _plot_roofline(next(axes), result)
        if quantizers:
            _plot_quantizers(next(axes), result["quantize"], quantizers)
        handles = {h.get_label(): h for axis in figure.axes[: len(kinds)] for h in axis.get_legend_handles_labels()[0]}
        if handles:
            figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
        top = figure.axes[0]
        top.set_title(f"{result['gpu']}: {top.get_title('left')}", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _measured(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(i, r["candidates"][name]) for i, r in enumerate(records) if "us" in r["candidates"].get(name, {})]


def _plot_shapes(axis: Any, title: str, records: Sequence[dict[str, Any]]) -> None:
    for name, color in COLORS.items():
        if found := _measured(records, name):
            axis.scatter(
                [c["tflops"] for _, c in found], [i for i, _ in found], s=26, color=color, label=name, zorder=3
            )
    axis.set_yticks(range(len(records)), [f"{r['shape']}   {r['M']}×{r['N']}×{r['K']}" for r in records], fontsize=8)
    axis.set_ylim(len(records) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("TFLOP/s")
    axis.set_title(title, loc="left", fontsize=10)


def _plot_roofline(axis: Any, result: dict[str, Any]) -> None:
    gbps, peaks = result["copy"]["gbps"], result["peak_tflops"]
    intensities = []
    for name, color in COLORS.items():
        points = []
        for record in result["gemm"]:
            c = record["candidates"].get(name, {})
            if "us" in c:
                points.append((record["flops"] / c["bytes"], c["tflops"]))
        if points:
            axis.scatter(*zip(*points, strict=True), s=14, color=color, alpha=0.8, zorder=3)
            intensities += [x for x, _ in points]
    if intensities:
        low, high = min(intensities) / 4, max(intensities) * 1.5
        grid = [low * (high / low) ** (i / 200) for i in range(201)]
        for label, peak in (peaks or {"bandwidth": math.inf}).items():
            text = f"{label} peak {peak:,.0f} TFLOP/s" if peaks else "bandwidth"
            roof = [roofline(x, peak, gbps) for x in grid]
            axis.plot(grid, roof, color="#4b5563", linewidth=1, linestyle="-" if label == "fp8" else "--", label=text)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte of operands and result")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"roofline: data-sheet peaks, {gbps:,.0f} GB/s as copied in this run", loc="left", fontsize=10)


def _plot_quantizers(axis: Any, records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for row, name in enumerate(names):
        found = [c["percent_of_copy"] for _, c in _measured(records, name) if c["percent_of_copy"] is not None]
        axis.scatter(found, [row] * len(found), s=26, color=COLORS.get(name.partition(" ")[0], COLORS[OURS]), zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the bandwidth of copying the same tensor; a dot is a shape")
    axis.set_title("quantisation", loc="left", fontsize=10)


def bench(
    timer: Timer,
    device: torch.device,
    *,
    suite: str,
    sections: Sequence[str],
    gemms: Sequence[Shape],
    quantized: Sequence[Shape],
    seconds: float,
    copied: tuple[int, int] = (16384, 14336),
    host_size: int = 256,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure and return the result, ready for JSON; kernels and peaks, which need a GPU, are empty.

    save: called with the result so far after every shape. An interrupt ends the run, not what was measured.
    """
    origin = provenance()
    present, absent = find_peers()
    run = Bench(device, timer, absent)
    for name, version in present.items():
        run.say(f"{name} {version}")
    for name, why in absent.items():
        run.say(f"absent: {name} ({why})")
    copy = run.copy(*copied)

    def share(section: str) -> float:
        """Of the time left, between this section and those after it."""
        left = seconds - (time.monotonic() - run.started)
        return max(left, 0.0) * SHARES[section] / sum(SHARES[name] for name in sections[sections.index(section) :])

    def result(interrupted: bool) -> dict[str, Any]:
        return {
            **origin,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "peak_tflops": None,
            "suite": suite,
            "seconds": time.monotonic() - run.started,
            "interrupted": interrupted,
            "sampling": {"flush_bytes": FLUSH_BYTES, "sample_us": SAMPLE_US, "rounds": [MIN_ROUNDS, MAX_ROUNDS]},
            "notes": {c.name: c.note for c in (*GEMMS, *QUANTIZERS) if c.note and c.peer not in absent},
            "peers": present,
            "absent": absent,
            "dropped": run.dropped,
            "copy": copy,
            "summary": summarise([*run.gemm, *run.quantize]),
            "gemm": run.gemm,
            "quantize": run.quantize,
            "host_us": run.host_us,
            "kernels": [],
        }

    # Until its end a run counts as interrupted: it may be killed at any time.
    run.after_shape = lambda: save(result(interrupted=True))
    try:
        if "gemm" in sections:
            run.measure_gemm(gemms, share("gemm"), copy["gbps"])
        if "quantize" in sections:
            run.measure_quantize(quantized, share("quantize"))
        if "host" in sections:
            run.measure_host(share("host"), host_size)
    except KeyboardInterrupt:
        run.say("interrupted")
        return result(interrupted=True)
    return result(interrupted=False)


def wrong_results(summary: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    return [f"{name}, {shape}" for kind in summary.values() for name, row in kind.items() for shape in row["wrong"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="quick", help="(default: %(default)s)")
    parser.add_argument("--only", choices=list(SHARES), help="one section of the three")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="TEXT", help='those whose use has it: "70B w1", ".dw"'
    )
    parser.add_argument(
        "--seconds", type=float, default=150, help="shapes not begun by then are dropped, evenly (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results")
    parser.add_argument("--name", default="bench_kernels", help="of the files written (default: %(default)s)")
    args = parser.parse_args(arguments)
    sections = [args.only] if args.only else list(SHARES)
    gemms = chosen(gemm_shapes(SUITES[args.suite]), args.shapes) if "gemm" in sections else []
    quantized = chosen(quantize_shapes(SUITES[args.suite]), args.shapes) if "quantize" in sections else []
    if args.shapes and not gemms and not quantized:
        parser.error(f"--shapes {' '.join(args.shapes)}: no shape of suite {args.suite} has any of these")
    if (device := fp8_gpu("bench_kernels.py")) is None:
        return 2

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # results are checked against true fp32
    from blockfp8_titan.kernels import gemm_hopper  # needs Triton

    args.out.mkdir(parents=True, exist_ok=True)

    def save(result: dict[str, Any]) -> None:
        compiled = [(str(key[2]), kernel) for key, kernel in library._compiled.items()]
        compiled += [(str(key[1:]), kernel) for key, kernel in gemm_hopper.compiled.items()]
        result["kernels"] = resources(compiled, multiprocessor_limits(device))
        result["peak_tflops"] = peak_tflops(result["gpu"])
        (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        (args.out / f"{args.name}.md").write_text(report(result))

    result = bench(
        CudaTimer(device),
        device,
        suite=args.suite,
        sections=sections,
        gemms=gemms,
        quantized=quantized,
        seconds=args.seconds,
        save=save,
    )
    save(result)
    print(f"\n{overview(result)}\n")
    plot(result, args.out / f"{args.name}.png")
    wrong = wrong_results(result["summary"])
    for name in wrong:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if wrong else 130 if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
