"""Runs the kernels, through their real launchers, in Triton's interpreter on the CPU and compares them with their twins.

Started by test_kernels.py with TRITON_INTERPRET=1. The interpreter's own fp8 cast loses a carry (127.8 -> 64 in Triton 3.6 and
3.9), its fma rounds twice, and it has no PTX: all three are mended here, in the test, so that what is compared is the kernel.
"""

import contextlib
import os
import types

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from blockfp8_titan import ops, reference
from blockfp8_titan.kernels import producers as producer_kernels
from blockfp8_titan.kernels import quantize as quantize_kernels
from blockfp8_titan.kernels import scaling, tiles
from blockfp8_titan.numerics import relative_error
from blockfp8_titan.ops import backend, library, shards
from blockfp8_titan.ops import gemm as gemm_ops
from blockfp8_titan.ops import quantize as quantize_ops
from blockfp8_titan.ops import rms_norm as rms_norm_ops
from blockfp8_titan.ops import swiglu as swiglu_ops

from . import elementwise
from .data import KINDS, bits, draw, padding, poisoned

assert os.environ["TRITON_INTERPRET"] == "1"

TORCH = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float16: torch.float16,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def convert_float(data, source, target, rounding_mode):
    x = torch.from_numpy(np.ascontiguousarray(data).view(UNSIGNED[data.itemsize])).view(TORCH[source]).float()
    if target == tl.float8e4nv:  # as the hardware does: saturate, NaN without a sign
        x = torch.where(x.isnan(), torch.nan, x.clamp(-448, 448))
    out = x.to(TORCH[target])
    return out.view(getattr(torch, f"uint{8 * out.element_size()}")).numpy().reshape(data.shape)


def fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """What kernels.scaling.amax_bits computes; its own reduction takes the interpreter minutes."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def pack_e4m3(a, b, c, d):
    """What kernels.convert.pack_e4m3 computes."""
    return _byte(a) | _byte(b) << 8 | _byte(c) << 16 | _byte(d) << 24


@triton.jit
def approximate_reciprocal(x):
    """What kernels.convert.approximate_reciprocal computes, or nearer."""
    return 1.0 / x


@triton.jit
def to_fp32(x):
    """What kernels.convert.to_fp32 computes."""
    return x.to(tl.float32)


@triton.jit
def round_to_bf16(x):
    """What kernels.convert.round_to_bf16 computes."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _byte(x):
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


def on_cpu():
    for name in ("new_empty", "new_empty_strided"):
        setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    for kernels in (quantize_kernels, producer_kernels, tiles):
        kernels.amax_bits = amax_bits
    tiles.pack_e4m3 = pack_e4m3
    scaling.approximate_reciprocal = approximate_reciprocal
    producer_kernels.to_fp32, producer_kernels.round_to_bf16 = to_fp32, round_to_bf16
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_fma = fma
    library.on_device_of = lambda x: contextlib.nullcontext()
    rms_norm_ops._WHOLE_ROWS = 256  # longer rows take two kernels
    backend.resolve_quantize_backend = lambda device: "triton"
    gemm_ops.resolve_gemm_backend = lambda backend, device, kind: "triton"
    gemm_ops.is_hopper = lambda device: False
    quantize_ops.suits_both_hopper = swiglu_ops.suits_both_hopper = lambda *args: False  # Gluon has no interpreter
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=2, major=9, minor=0)


H_LAYOUTS = {
    None: lambda h, scale_format: (),
    "columns": reference.quantize_1x128_columns,
    "blocks": reference.quantize_128x128_columns,
}


def check_quantize(kind, shape, dtype, scale_format):
    x = draw(kind, *shape, dtype)
    for run, twin in (
        (quantize_ops._cuda_1x128, reference.quantize_1x128),
        (quantize_ops._cuda_1x128_both, reference.quantize_1x128_both),
        (quantize_ops._cuda_1x128_columns, reference.quantize_1x128_columns),
        (quantize_ops._cuda_128x128, reference.quantize_128x128),
        (quantize_ops._cuda_128x128_both, reference.quantize_128x128_both),
        (quantize_ops._cuda_128x128_columns, reference.quantize_128x128_columns),
    ):
        case = (twin.__name__, kind, shape, dtype, scale_format)
        check_equal(run(x, scale_format, "auto"), twin(x, scale_format), *case)


def check_equal(outs, twins, *case):
    for i, (out, twin) in enumerate(zip(outs, twins, strict=True)):
        assert torch.equal(bits(out), bits(twin)), (i, *case)
        assert out.dtype != torch.float8_e4m3fn or not padding(out).any(), (i, *case)


def check_producers(kind, shape, dtype, scale_format):
    case = (kind, shape, dtype, scale_format)
    gate, up, dh = (draw(kind, *shape, dtype) for _ in range(3))
    weight = draw(kind, 1, shape[1], (torch.bfloat16, torch.float32)[dtype == torch.bfloat16])[0]
    h, (dgate, dup) = elementwise.swiglu(gate, up), elementwise.swiglu_backward(dh, gate, up)
    dup_terms = (dh.float() * up.float()).abs()
    for actual, expected, terms in (
        (h, reference.swiglu(gate, up), 0.0),
        (dgate, reference.swiglu_backward(dh, gate, up)[0], dup_terms),
        (dup, reference.swiglu_backward(dh, gate, up)[1], 0.0),
    ):
        assert elementwise.different(actual, expected, terms) < 1e-2, case
    for layout, quantize in (
        ("rows", reference.quantize_1x128),
        ("columns", reference.quantize_1x128_columns),
        ("both", reference.quantize_1x128_both),
        ("blocks", reference.quantize_128x128_columns),
    ):
        outs = swiglu_ops._cuda_swiglu(gate, up, layout, scale_format, "auto")
        check_equal(outs, quantize(h, scale_format), "swiglu", layout, *case)
        *outs, rstd = rms_norm_ops._cuda_rms_norm(gate, weight, 1e-5, layout, scale_format, None, "auto")
        torch.testing.assert_close(rstd, reference.rms_norm_rstd(gate, 1e-5), rtol=1e-6, atol=0, equal_nan=True)
        y = reference.rms_norm(gate, rstd, weight)
        check_equal(outs, quantize(y, scale_format), "rms_norm", layout, *case)
        outs = rms_norm_ops._cuda_rms_norm(gate, weight, 1e-5, layout, scale_format, rstd, "auto")
        check_equal(outs, quantize(y, scale_format), "rms_norm, given rstd", layout, *case)
    both = reference.quantize_1x128_both
    gradients = (*both(dgate, scale_format), *both(dup, scale_format))
    for layout, quantize in H_LAYOUTS.items():
        outs = swiglu_ops._cuda_swiglu_backward(dh, gate, None, up, None, scale_format, layout, "auto")
        check_equal(outs, (*gradients, *quantize(h, scale_format)), "swiglu_backward", layout, *case)
    outs = swiglu_ops._cuda_swiglu_with_inputs(gate, up, scale_format, "auto")
    rows = [reference.quantize_1x128(x, scale_format) for x in (h, gate, up)]
    check_equal(outs, [out for pair in rows for out in pair], "swiglu_with_inputs", *case)
    values = [reference.dequantize_1x128(*pair) for pair in rows[1:]]
    dgate, dup = elementwise.swiglu_backward(dh.float(), *values)
    h = elementwise.swiglu(*values).to(dtype)
    gradients = (*both(dgate.to(dtype), scale_format), *both(dup.to(dtype), scale_format))
    kept = [out for pair in rows[1:] for out in pair]
    for layout, quantize in H_LAYOUTS.items():
        outs = swiglu_ops._cuda_swiglu_backward(dh, *kept, scale_format, layout, "auto")
        check_equal(outs, (*gradients, *quantize(h, scale_format)), "swiglu_backward of payloads", layout, *case)


def check_shards(kind, whole, split):
    """Rows cut apart at `split`, quantised with one table: the kernels against their twins."""
    w = draw(kind, *whole, torch.float32)
    w_dq = reference.quantize_128x128(w)[1]
    table = torch.zeros_like(w_dq, dtype=torch.int32)
    for first_row, rows in ((0, w[:split]), (split, w[split:])):
        bits_of_rows = torch.zeros_like(table)
        shards._cuda_amax_128x128_([rows], [first_row], [bits_of_rows])
        table = torch.maximum(table, bits_of_rows)
        w_q = shards._cuda_rows(rows, w_dq, first_row, "auto")
        assert torch.equal(bits(w_q), bits(reference.quantize_rows(rows, w_dq, first_row))), (kind, whole, split)
    amax = reference.amax_128x128(w)
    assert torch.equal(table, amax.view(torch.int32) & 0x7FFFFFFF), (kind, whole, split)


def check_transpose(shape):
    w_q = torch.randint(256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = quantize_ops._cuda_transpose(w_q)
    assert torch.equal(bits(out), bits(w_q.t())), shape
    assert not padding(out).any(), shape


def check_gemm(M, N, K):
    a = ops.quantize_1x128(torch.randn(M, K))
    per_block, per_row = ops.quantize_128x128(torch.randn(N, K)), ops.quantize_1x128(torch.randn(N, K))
    for run, twin, b in (
        (gemm_ops._cuda_1x128_128x128, reference.gemm_1x128_128x128, per_block),
        (gemm_ops._cuda_1x128_1x128, reference.gemm_1x128_1x128, per_row),
    ):
        for out_dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
            out = run(*a, *b, out_dtype, "triton")
            assert relative_error(twin(*a, *b, torch.float32), out) < bound, (twin.__name__, M, N, K, out_dtype)


if __name__ == "__main__":
    torch.manual_seed(0)
    on_cpu()
    for number, kind in enumerate(KINDS):
        for dtype in (torch.bfloat16, torch.float32):
            check_quantize(kind, (130, 144), dtype, ("fp32", "pow2")[number % 2])
            check_quantize(kind, (7, 272), dtype, ("pow2", "fp32")[number % 2])
        check_producers(
            kind, (130, 144), (torch.bfloat16, torch.float32)[number % 2], ("fp32", "pow2")[number // 2 % 2]
        )
        check_producers(kind, (7, 272), (torch.float32, torch.bfloat16)[number % 2], ("pow2", "fp32")[number // 2 % 2])
    # Two rows of three tiles: in the multipliers of blocks a row is not a column.
    check_quantize("outliers", (130, 272), torch.float32, "pow2")
    check_producers("normal", (130, 272), torch.bfloat16, "fp32")
    for kind, whole, split in (("outliers", (130, 144), 1), ("nonfinite", (256, 16), 128), ("normal", (300, 272), 200)):
        check_shards(kind, whole, split)
    for shape in ((1, 16), (7, 144), (129, 272)):
        check_transpose(shape)
    for shape in ((1, 16, 16), (7, 144, 272), (129, 272, 256), (300, 16, 128)):
        check_gemm(*shape)
    print("all equal")
