"""Runs every kernel through the ops on a GPU, on small hostile shapes: what scripts/sanitize.sh has compute-sanitizer watch.

    python -m tests.sanitized [--few]

Results are compared with the twins on the CPU, and a kernel of the package that no op has launched is an error, so that a clean
report means something. Without PyTorch's cache of memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1) an access past an operand is seen.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from blockfp8_titan import kernels, ops, reference
from blockfp8_titan.kernels import both_hopper, gemm_hopper, gemm_hopper_launch
from blockfp8_titan.numerics import GEMM_RELATIVE_ERROR, relative_error
from blockfp8_titan.ops import gemm as gemm_ops
from blockfp8_titan.ops import library
from blockfp8_titan.ops.backend import is_hopper

from . import elementwise
from .data import bits, draw

MATRICES = [(1, 16), (128, 256), (144, 272), (131, 208)]
GEMMS = [(1, 16, 16), (384, 256, 1040), (131, 272, 400)]
PROGRAMS = 2  # so that each has several tiles, and comes back to every stage of shared memory


def check_equal(name: str, outs: tuple[torch.Tensor, ...], twins: tuple[torch.Tensor, ...]) -> None:
    for i, (out, twin) in enumerate(zip(outs, twins, strict=True)):
        assert torch.equal(bits(out), bits(twin)), f"result {i} of {name} at {tuple(twin.shape)}"


def quantize(M: int, K: int, dtype: torch.dtype) -> None:
    x = draw("outliers", M, K, dtype)
    on_gpu = x.cuda()
    for op in (
        ops.quantize_1x128,
        ops.quantize_1x128_both,
        ops.quantize_1x128_columns,
        ops.quantize_128x128,
        ops.quantize_128x128_both,
        ops.quantize_128x128_columns,
    ):
        check_equal(op.__name__, op(on_gpu), op(x))
    q, dq = ops.quantize_128x128(x)
    check_equal("quantize_rows", (ops.quantize_rows(on_gpu, dq.cuda(), 0),), (q,))
    check_equal("transpose_fp8", (ops.transpose_fp8(q.cuda()),), (ops.transpose_fp8(q),))
    table = torch.zeros_like(dq, dtype=torch.int32)
    on_gpu_table = table.cuda()
    ops.amax_128x128_([x], [0], [table])
    ops.amax_128x128_([on_gpu], [0], [on_gpu_table])
    check_equal("amax_128x128_", (on_gpu_table,), (table,))


def produce(M: int, K: int, dtype: torch.dtype) -> None:
    dh, gate, up = (draw("outliers", M, K, dtype).cuda() for _ in range(3))
    weight = torch.randn(K, device="cuda")
    h, (dgate, dup) = elementwise.swiglu(gate, up).cpu(), elementwise.swiglu_backward(dh, gate, up)
    for layout, quantize in (
        ("rows", ops.quantize_1x128),
        ("columns", ops.quantize_1x128_columns),
        ("both", ops.quantize_1x128_both),
        ("blocks", ops.quantize_128x128_columns),
    ):
        check_equal("swiglu_quantize_1x128", ops.swiglu_quantize_1x128(gate, up, layout), quantize(h))
        *outs, rstd = ops.rms_norm_quantize_1x128(gate, weight, 1e-5, layout)
        y = reference.rms_norm(*(x.cpu() for x in (gate, rstd, weight)))
        check_equal("rms_norm_quantize_1x128", outs, quantize(y))
        *outs, _ = ops.rms_norm_quantize_1x128(gate, weight, 1e-5, layout, rstd=rstd)
        check_equal("rms_norm_quantize_1x128, rstd given", outs, quantize(y))
    twins = tuple(map(ops.quantize_1x128_both, (dgate.cpu(), dup.cpu())))
    of_h = {None: (), "columns": (ops.quantize_1x128_columns(h),), "blocks": (ops.quantize_128x128_columns(h),)}
    for layout, twin_of_h in of_h.items():
        results = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, h=layout)
        for outs, twin in zip(results, twins + twin_of_h, strict=True):
            check_equal("swiglu_backward_quantize_1x128_both", outs, twin)
    kept = ops.swiglu_quantize_1x128_with_inputs(gate, up)
    for outs, values in zip(kept, (h, gate.cpu(), up.cpu()), strict=True):
        check_equal("swiglu_quantize_1x128_with_inputs", outs, ops.quantize_1x128(values))
    values = [reference.dequantize_1x128(*pair) for pair in kept[1:]]
    twins = [
        x.to(dtype).cpu() for x in (*elementwise.swiglu_backward(dh.float(), *values), elementwise.swiglu(*values))
    ]
    (gate_q, gate_dq), (up_q, up_dq) = kept[1:]
    for layout, quantize_h in (("columns", ops.quantize_1x128_columns), ("blocks", ops.quantize_128x128_columns)):
        results = ops.swiglu_backward_quantize_1x128_both(dh, gate_q, up_q, gate_dq=gate_dq, up_dq=up_dq, h=layout)
        quantizers = (ops.quantize_1x128_both, ops.quantize_1x128_both, quantize_h)
        for outs, twin, quantize in zip(results, twins, quantizers, strict=True):
            check_equal("swiglu_backward_quantize_1x128_both, of payloads", outs, quantize(twin))


def with_tiles_of(tiling: gemm_hopper.Tiling) -> Callable[..., torch.Tensor]:
    def run(*args: object) -> torch.Tensor:
        gemm_hopper_launch._launches.clear()
        with (
            patch.object(gemm_hopper_launch, "tiling_of", lambda *sizes: tiling),
            patch.object(gemm_ops, "multiprocessors", lambda device: PROGRAMS),
        ):
            return gemm_ops._triton(*args)

    return run


def gemm(M: int, N: int, K: int, dtypes: tuple[torch.dtype, ...]) -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    a_q, a_dq = ops.quantize_1x128(a)
    for per_row, quantize_b, twin in (
        (False, ops.quantize_128x128, reference.gemm_1x128_128x128),
        (True, ops.quantize_1x128, reference.gemm_1x128_1x128),
    ):
        args = a_q, a_dq, *quantize_b(b)
        on_gpu = [x.cuda() for x in args]
        for dtype in dtypes:
            expected = twin(*args, torch.float32)
            runs = [gemm_ops._portable, with_tiles_of(gemm_hopper.HIGH)]
            if not per_row:
                runs.append(with_tiles_of(gemm_hopper.LOW))
            for run in runs:
                error = relative_error(expected, run(*on_gpu, per_row, dtype).cpu())
                assert error < GEMM_RELATIVE_ERROR, (run.__name__, per_row, dtype, M, N, K, error)


def never_launched() -> list[str]:
    launched = {key[0] for key in library._compiled}
    if gemm_hopper_launch.compiled:
        launched.add(gemm_hopper._gemm_hopper_kernel.fn)
        assert {rows for *_, rows in gemm_hopper_launch.compiled} == {gemm_hopper.LOW.rows, gemm_hopper.HIGH.rows}
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(value, JITFunction):
                found[value.fn] = name
    if not is_hopper(torch.device("cuda", torch.cuda.current_device())):
        found = {
            fn: name for fn, name in found.items() if fn.__module__ not in (gemm_hopper.__name__, both_hopper.__name__)
        }
    return sorted(name for fn, name in found.items() if fn not in launched)


if __name__ == "__main__":
    few = sys.argv[1:] == ["--few"]
    assert few or not sys.argv[1:], f"unknown arguments {sys.argv[1:]}: --few or none"
    torch.manual_seed(0)
    dtypes = (torch.bfloat16,) if few else (torch.bfloat16, torch.float32)
    for shape in MATRICES[-2:] if few else MATRICES:
        for dtype in dtypes:
            quantize(*shape, dtype)
            produce(*shape, dtype)
    for shape in GEMMS[-1:] if few else GEMMS:
        gemm(*shape, dtypes)
    torch.cuda.synchronize()
    assert not (missing := never_launched()), f"never launched: {', '.join(missing)}; add calls to tests/sanitized.py"
    print("every kernel has run")
