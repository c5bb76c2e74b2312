"""Time the fused producers against the ops that they fuse, on the tensors of Llama 3: do bytes saved show as time saved?

    python scripts/bench_producers.py
    python scripts/bench_producers.py --ops swiglu --seconds 60

For each op and shape the candidates take turns, as in bench_kernels.py: "fused"; "pair", the computation compiled by inductor and
then our quantising op; "eager", the same uncompiled. An intermediate tensor counts twice, once written and once read. The time of
fused over that of pair should be at most 1.15 times the same ratio of bytes.

Writes NAME.json and NAME.md to --out. Exits with 2 where there is no suitable GPU, with 1 when a result is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from bench_kernels import Bench, Budget, measure
from candidates import QUANTIZE_BOUND, Candidate, Contender
from kernel_tables import multiprocessor_limits, resources
from measure import CudaTimer, Timer, duration, fp8_gpu, table
from provenance import provenance
from result_files import add_out, write_json, write_text
from shapes import MODELS, SUITES, Shape
from torch import Tensor

from blockfp8_titan import ops, reference
from blockfp8_titan.numerics import relative_error
from blockfp8_titan.ops import library

FUSED, PAIR, EAGER = "fused", "pair", "eager"
EPS = 1e-5
GOAL = 1.15
Tensors = tuple[Tensor, ...]

# What is quantised how


@dataclass(frozen=True)
class Quantizer:
    """quantize: [M, K] -> payload and multipliers for each of transposed, which says of which the transpose is quantised.

    rereads: it reads the first payload again.
    """

    quantize: Callable[[Tensor], Tensors]
    transposed: tuple[bool, ...]
    rereads: bool = False
    dequantize: Callable[[Tensor, Tensor], Tensor] = reference.dequantize_1x128


def _quantize_and_transpose(w: Tensor) -> Tensors:
    w_q, w_dq = ops.quantize_128x128(w)
    return w_q, w_dq, ops.transpose_fp8(w_q)


ROWS = Quantizer(ops.quantize_1x128, (False,))
COLUMNS = Quantizer(ops.quantize_1x128_columns, (True,))
BOTH = Quantizer(ops.quantize_1x128_both, (False, True))
BLOCKS = Quantizer(_quantize_and_transpose, (False,), True, reference.dequantize_128x128)
SQUARE_COLUMNS = Quantizer(ops.quantize_128x128_columns, (True,), dequantize=reference.dequantize_128x128)
LAYOUTS: dict[ops.Layout, Quantizer] = {"rows": ROWS, "columns": COLUMNS, "both": BOTH, "blocks": SQUARE_COLUMNS}

# What is computed before


def _identity(x: Tensor) -> Tensors:
    return (x,)


def _norm(x: Tensor, weight: Tensor, rstd: Tensor | None = None) -> Tensors:
    return (F.rms_norm(x, x.shape[1:], weight, EPS),)


def _swiglu(gate: Tensor, up: Tensor) -> Tensors:
    return (F.silu(gate) * up,)


def _swiglu_gradients(dh: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    return torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)


def _swiglu_gradients_and_h(dh: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    return *_swiglu_gradients(dh, gate, up), *_swiglu(gate, up)


def _swiglu_and_inputs(gate: Tensor, up: Tensor) -> Tensors:
    return *_swiglu(gate, up), gate, up


def _swiglu_gradients_and_h_of_payloads(
    dh: Tensor, gate_q: Tensor, gate_dq: Tensor, up_q: Tensor, up_dq: Tensor
) -> Tensors:
    gate, up = reference.dequantize_1x128(gate_q, gate_dq), reference.dequantize_1x128(up_q, up_dq)
    return tuple(x.to(dh.dtype) for x in _swiglu_gradients_and_h(dh, gate, up))


def _matrices(count: int) -> Callable[[int, int, torch.device], Tensors]:
    def draw(m: int, k: int, device: torch.device) -> Tensors:
        return tuple(torch.randn(m, k, device=device, dtype=torch.bfloat16) for _ in range(count))

    return draw


def _norm_inputs(m: int, k: int, device: torch.device) -> Tensors:
    return *_matrices(1)(m, k, device), torch.rand(k, device=device, dtype=torch.bfloat16) + 0.5


def _norm_inputs_and_rstd(m: int, k: int, device: torch.device) -> Tensors:
    x, weight = _norm_inputs(m, k, device)
    return x, weight, reference.rms_norm_rstd(x, EPS)


def _gradient_and_payloads(m: int, k: int, device: torch.device) -> Tensors:
    dh, gate, up = _matrices(3)(m, k, device)
    return dh, *ops.quantize_1x128(gate), *ops.quantize_1x128(up)


# The fused ops


def _fused_norm(layout: ops.Layout) -> Callable[..., Tensors]:
    return lambda x, weight: ops.rms_norm_quantize_1x128(x, weight, EPS, layout)


def _fused_norm_with_rstd(layout: ops.Layout) -> Callable[..., Tensors]:
    return lambda x, weight, rstd: ops.rms_norm_quantize_1x128(x, weight, EPS, layout, rstd=rstd)[:-1]


def _fused_swiglu(layout: ops.Layout) -> Callable[..., Tensors]:
    return lambda gate, up: ops.swiglu_quantize_1x128(gate, up, layout)


def _fused_swiglu_gradients(dh: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    dgate, dup = ops.swiglu_backward_quantize_1x128_both(dh, gate, up)
    return *dgate, *dup


def _fused_swiglu_gradients_and_h(dh: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    dgate, dup, h = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, h="columns")
    return *dgate, *dup, *h


def _fused_swiglu_and_inputs(gate: Tensor, up: Tensor) -> Tensors:
    return tuple(out for pair in ops.swiglu_quantize_1x128_with_inputs(gate, up) for out in pair)


def _fused_swiglu_gradients_and_h_of_payloads(layout: ops.HLayout) -> Callable[..., Tensors]:
    def run(dh: Tensor, gate_q: Tensor, gate_dq: Tensor, up_q: Tensor, up_dq: Tensor) -> Tensors:
        results = ops.swiglu_backward_quantize_1x128_both(dh, gate_q, up_q, gate_dq=gate_dq, up_dq=up_dq, h=layout)
        return tuple(out for result in results for out in result)

    return run


@dataclass(frozen=True)
class Subject:
    """A fused op, and the computation and quantisation that it stands for.

    of: which tensors of a model, "dim" and "hidden" with a row for each token or "weight". quantizers: of each of the results that
    are computed. reads: how often fused reads its first input.
    """

    of: str
    inputs: Callable[[int, int, torch.device], Tensors]
    fused: Callable[..., Tensors]
    compute: Callable[..., Tensors]
    quantizers: tuple[Quantizer, ...]
    reads: int = 1


SUBJECTS = {
    "rms_norm rows": Subject("dim", _norm_inputs, _fused_norm("rows"), _norm, (ROWS,)),
    **{
        f"rms_norm {layout}, rstd given": Subject(
            "dim", _norm_inputs_and_rstd, _fused_norm_with_rstd(layout), _norm, (LAYOUTS[layout],)
        )
        for layout in ("columns", "blocks")
    },
    "rms_norm both": Subject("dim", _norm_inputs, _fused_norm("both"), _norm, (BOTH,), reads=2),
    **{
        f"swiglu {layout}": Subject("hidden", _matrices(2), _fused_swiglu(layout), _swiglu, (quantizer,))
        for layout, quantizer in LAYOUTS.items()
    },
    "swiglu_backward both": Subject("hidden", _matrices(3), _fused_swiglu_gradients, _swiglu_gradients, (BOTH, BOTH)),
    "swiglu_backward both, h columns": Subject(
        "hidden", _matrices(3), _fused_swiglu_gradients_and_h, _swiglu_gradients_and_h, (BOTH, BOTH, COLUMNS)
    ),
    "swiglu rows, inputs in fp8": Subject(
        "hidden", _matrices(2), _fused_swiglu_and_inputs, _swiglu_and_inputs, (ROWS, ROWS, ROWS)
    ),
    **{
        f"swiglu_backward both, h {layout}, of inputs in fp8": Subject(
            "hidden",
            _gradient_and_payloads,
            _fused_swiglu_gradients_and_h_of_payloads(layout),
            _swiglu_gradients_and_h_of_payloads,
            (BOTH, BOTH, LAYOUTS[layout]),
        )
        for layout in get_args(ops.HLayout)
    },
    "quantize_128x128_both": Subject("weight", _matrices(1), ops.quantize_128x128_both, _identity, (BLOCKS,)),
}


def shapes(suite: Sequence[tuple[str, int]]) -> list[Shape]:
    """For each subject, as their kind, the tensors of these (model, tokens), each size once."""
    merged: dict[tuple[str, int, int], list[str]] = {}
    for model, tokens in suite:
        hidden, dim = MODELS[model]["w1"]
        sizes = {"dim": (tokens, dim), "hidden": (tokens, hidden), "weight": (hidden, dim)}
        for name, subject in SUBJECTS.items():
            where = model if subject.of == "weight" else f"{model} {tokens // 1024}k"
            merged.setdefault((name, *sizes[subject.of]), []).append(f"{name}, {where}")
    return [Shape(name, m, 0, k, tuple(uses)) for (name, m, k), uses in merged.items()]


def contenders(subject: Subject) -> list[Contender]:
    def error(inputs: Tensors) -> Callable[[Tensors], float]:
        """The greatest relative error of the tensors that are quantised, in each of their layouts."""

        def of(outs: Tensors) -> float:
            errors = []
            exacts = subject.compute(*(x.float() if x.dtype == torch.bfloat16 else x for x in inputs))
            for exact, quantizer in zip(exacts, subject.quantizers, strict=True):
                for i, transposed in enumerate(quantizer.transposed):
                    q, dq = outs[2 * i : 2 * i + 2]
                    errors.append(relative_error(exact.t() if transposed else exact, quantizer.dequantize(q, dq)))
                outs = outs[len(quantizer.quantize(inputs[0][:16])) :]
            return max(errors)

        return of

    def fused(inputs: Tensors) -> Candidate:
        read = (*inputs, *inputs[:1] * (subject.reads - 1))
        return Candidate(lambda: subject.fused(*inputs), read, error(inputs), QUANTIZE_BOUND)

    def pair(compute: Callable[..., Tensors]) -> Callable[[Tensors], Candidate]:
        def prepare(inputs: Tensors) -> Candidate:
            def run() -> Tensors:
                computed = zip(compute(*inputs), subject.quantizers, strict=True)
                return tuple(out for x, quantizer in computed for out in quantizer.quantize(x))

            # What is computed is written and read, an input that is quantised besides only read.
            own = {x.data_ptr() for x in inputs}
            computed = () if subject.compute is _identity else compute(*inputs)
            between = (*computed, *(x for x in computed if x.data_ptr() not in own))
            again = run()[:1] if subject.quantizers[0].rereads else ()
            return Candidate(run, (*inputs, *between, *again), error(inputs), QUANTIZE_BOUND)

        return prepare

    if subject.compute is _identity:
        return [Contender(FUSED, fused), Contender(PAIR, pair(_identity))]
    torch.compiler.reset()  # a function may be recompiled eight times
    compiled = torch.compile(subject.compute, dynamic=False, fullgraph=True)
    return [Contender(FUSED, fused), Contender(PAIR, pair(compiled)), Contender(EAGER, pair(subject.compute))]


def bench(
    timer: Timer,
    device: torch.device,
    measured: Sequence[Shape],
    seconds: float,
    copied: tuple[int, int] = (16384, 14336),
) -> dict[str, Any]:
    """Measure and return the result, ready for JSON; kernels, which need a GPU, are empty."""
    run = Bench(device, timer)
    copy = run.copy(*copied)

    def one(shape: Shape, budget: Budget, seconds: float) -> dict[str, Any]:
        subject = SUBJECTS[shape.kind]
        inputs = subject.inputs(shape.M, shape.K, device)
        return measure(
            contenders(subject), inputs, timer, budget, seconds, work=None, base=PAIR, copy_gbps=copy["gbps"]
        )

    records: list[dict[str, Any]] = []
    run.section(records, measured, seconds, one)
    return {
        **provenance(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "copy": copy,
        "dropped": run.dropped,
        "records": [record | savings(record["candidates"]) for record in records],
        "kernels": [],
    }


def savings(candidates: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Fused over pair in bytes and in time, and the second over the first; nothing where one failed."""
    fused, pair = candidates[FUSED], candidates[PAIR]
    if "us" not in fused or "us" not in pair:
        return {}
    # Ratios of time are medians over rounds: those of speed, as bytes per second, hold the bytes as well.
    bytes_ratio, excess = fused["bytes"] / pair["bytes"], 1 / fused["ratio"]
    return {"bytes_ratio": bytes_ratio, "time_ratio": bytes_ratio * excess, "time_per_bytes_ratio": excess}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    rows = []
    for record in result["records"]:
        candidates = record["candidates"]
        times = [f"{c['us']:.1f}" if "us" in (c := candidates.get(n, {})) else "—" for n in (FUSED, PAIR, EAGER)]
        fused = candidates[FUSED]
        speed = (f"{fused['gbps']:,.0f}", f"{fused['percent_of_copy']:.0f}") if "us" in fused else ("—", "—")
        ratios = [f"{record[n]:.3f}" if n in record else "—" for n in ("bytes_ratio", "time_ratio")]
        excess = record.get("time_per_bytes_ratio")
        verdict = "—" if excess is None else f"{excess:.3f}" + " above the goal" * (excess > GOAL)
        wrong = ", ".join(name for name, c in candidates.items() if c.get("wrong"))
        failed = "; ".join(f"{name}: {c['failed']}" for name, c in candidates.items() if "failed" in c)
        notes = "; ".join(filter(None, (f"WRONG: {wrong}" if wrong else "", failed.replace("|", "\\|"))))
        rows.append((record["shape"], f"{record['M']}x{record['K']}", *times, *speed, *ratios, verdict, notes))
    header = ("op, tensor", "MxK", "fused µs", "pair µs", "eager µs", "fused GB/s", "% of copy")
    header += ("bytes fused / pair", "time fused / pair", f"the second over the first (goal: {GOAL})", "")
    parts = [
        "# Fused producers against what they fuse",
        f"{result['gpu']}; {versions}; {result['date']}, commit {result['commit']}. Copy bandwidth of this run: "
        f"{result['copy']['gbps']:,.0f} GB/s (bf16 [{result['copy']['M']}, {result['copy']['K']}], read and written).",
        "Medians of rounds in which the candidates take turns, L2 emptied before each sample. Pair is the computation compiled by "
        "inductor and then our quantising op, eager the same uncompiled; their intermediate tensors count as written and read.",
        table(header, rows, left=2),
    ]
    if result["dropped"]:
        parts.append("Not measured:\n" + "\n".join(f"- {name}: {why}" for name, why in result["dropped"].items()))
    if result["kernels"]:
        occupied = [
            (
                *(k["kernel"], k["constants"], str(k["registers"]), str(k["spills"]), str(k["warps"])),
                str(k["programs_per_multiprocessor"]["fit"]),
            )
            for k in result["kernels"]
        ]
        header = ("kernel", "constants", "registers", "spills", "warps", "programs per multiprocessor")
        parts.append("## Resources of our kernels\n\n" + table(header, occupied, left=2))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="quick", help="(default: %(default)s)")
    parser.add_argument("--ops", nargs="+", default=[""], metavar="TEXT", help='those whose name has it: "swiglu"')
    parser.add_argument(
        "--seconds",
        type=duration,
        default=150,
        help="shapes not begun by then are dropped, evenly (default: %(default)s)",
    )
    add_out(parser)
    parser.add_argument("--name", default="bench_producers", help="of the files written (default: %(default)s)")
    args = parser.parse_args(arguments)
    measured = [shape for shape in shapes(SUITES[args.suite]) if any(text in shape.kind for text in args.ops)]
    if not measured:
        parser.error(f"--ops {' '.join(args.ops)}: none of {', '.join(SUBJECTS)} has any of these")
    if (device := fp8_gpu("bench_producers.py")) is None:
        return 2

    torch.manual_seed(0)
    result = bench(CudaTimer(device), device, measured, args.seconds)
    compiled = [(str(key[2]), kernel) for key, kernel in library._compiled.items()]
    result["kernels"] = resources(compiled, multiprocessor_limits(device))
    write_json(args.out / f"{args.name}.json", result)
    write_text(args.out / f"{args.name}.md", report(result))
    print(f"\n{report(result)}\nwritten to {args.out}: {args.name}.json, .md")
    wrong = [
        f"{name}, {record['shape']}"
        for record in result["records"]
        for name, candidate in record["candidates"].items()
        if candidate.get("wrong")
    ]
    for name in wrong:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
