"""Input data that kernels meet or should fear, by name; every call draws fresh numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# torch.library.opcheck without "test_schema", which multiplies fp8 tensors and cannot: that ops leave their inputs alone
# has a test of its own.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = ("normal", "outliers", "uniform", "denormal", "huge", "zero_blocks", "nonfinite", "ties")


def draw(kind: str, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """An [m, k] CPU tensor of this kind."""
    x = torch.randn(m, k)
    if kind == "outliers":
        x = x.exp() * torch.randn(m, k).sign()
        x[:, torch.rand(k) < 0.02] *= 100
    elif kind == "uniform":
        x = torch.rand(m, k) * 2 - 1
    elif kind == "denormal":
        x *= 10.0 ** torch.empty(m, 1).uniform_(-45, -36)
    elif kind == "huge":
        x = x.sign() * torch.empty(m, k).uniform_(1e37, 3.3e38)
    elif kind == "zero_blocks":
        x[:128, :128] = 0
        x[torch.rand(m) < 0.3] = 0
    elif kind == "nonfinite":
        poison = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
        where = torch.rand(m, k) < 1 / 500
        x[where] = poison[torch.randint(4, (int(where.sum()),))]
    elif kind == "ties":
        # Exact midpoints of neighbouring e4m3 numbers, under multipliers that are powers of two (amax = 448 * 2^e) or are not.
        codes = torch.randint(0, 0x7D, (m, k), dtype=torch.uint8)
        lower, upper = codes.view(torch.float8_e4m3fn).float(), (codes + 1).view(torch.float8_e4m3fn).float()
        x = (lower + upper) / 2 * x.sign()
        x[:, ::64] = 448.0
        x[::64] = 448.0
        x *= torch.tensor([2.0**-9, 1.0, 0.75, 2.0**30])[torch.randint(4, (m, 1))]
    else:
        assert kind == "normal", kind
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """x's bits, on the CPU, for comparisons that tell NaN from NaN and 0 from -0."""
    x = x.detach().cpu().contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.Tensor.new_empty or new_empty_strided, of memory that holds NaN, so that an element left unwritten shows."""

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = allocate(self, *args, **kwargs)
        if not isinstance(out, torch._subclasses.FakeTensor):
            out.untyped_storage().fill_(0xFF)
        return out

    return new_empty


def padding(q: Tensor) -> Tensor:
    """The bytes that lie between the rows of a payload."""
    if not q.numel():
        return torch.empty(0, dtype=torch.uint8)
    return q.as_strided((q.shape[0], q.stride(0)), q.stride())[:, q.shape[1] :].contiguous().view(torch.uint8)
