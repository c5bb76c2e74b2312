"""What the fused kernels compute before they quantise it, by the same device functions: h of SwiGLU and the gradients of gate and up.

The hardware's exponential differs from PyTorch's in the last places, so that now and then a bf16 differs by one: of the fused
kernels it is demanded that they quantise this h bit for bit, and of this h that it is close to PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockfp8_titan.kernels import producers

DIFFERENT = 1e-3
"""The most that may differ from PyTorch's, of bf16 results that are one unit in the last place apart."""

FP32_ERROR = 1e-5
"""The most that fp32 results may be apart, relative to what they are sums of: an exponent of 87 has lost seven bits."""


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, h_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < size).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < size).to(tl.float32)
    tl.store(h_ptr + i, producers.swiglu(gate, up).to(h_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _swiglu_gradient_kernel(dh_ptr, gate_ptr, up_ptr, dx_ptr, size, of_gate, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + i, mask=i < size).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=i < size).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < size).to(tl.float32)
    dx = producers.gate_gradient(dh, gate, up) if of_gate != 0 else producers.up_gradient(dh, gate)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < size)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    h = torch.empty_like(gate)
    if gate.numel():
        _swiglu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, h, gate.numel(), BLOCK=1024)
    return h


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    if gate.numel():
        for of_gate, dx in ((1, dgate), (0, dup)):
            grid = (triton.cdiv(gate.numel(), 1024),)
            _swiglu_gradient_kernel[grid](dh, gate, up, dx, gate.numel(), of_gate, BLOCK=1024)
    return dgate, dup


def different(actual: Tensor, expected: Tensor, terms: Tensor | float = 0.0) -> float:
    """The share of bf16 results that differ by one unit in the last place; 0 for fp32.

    Args:
        terms: of magnitudes that cancelled in the results, if any did.
    Raises:
        AssertionError: a bf16 differs by more, fp32 results by more than `FP32_ERROR`, or one is NaN in one tensor alone.
    """
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = actual.isfinite() & expected.isfinite()
    if actual.dtype == torch.float32:
        assert torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num())
        bound = FP32_ERROR * (expected.abs() + terms) + 2.0**-126
        assert ((actual - expected).abs() <= bound)[finite].all()
        return 0.0
    # Numbered in order, so that neighbours differ by one: the two zeros are both 0, Inf follows the greatest finite number.
    codes = [x.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int16).int() for x in (actual, expected)]
    apart = torch.sub(*(torch.where(code < 0, -32768 - code, code) for code in codes)).abs()
    assert (apart <= 1).all()
    return apart.sum().item() / max(apart.numel(), 1)
