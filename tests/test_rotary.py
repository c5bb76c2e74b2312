"""RoPE of compiled blocks in real numbers, against torchtitan's in complex ones."""

import sys

import pytest
import torch
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis
from torchtitan.protocols.train_spec import get_train_spec

from blockfp8_titan import rotary
from blockfp8_titan.numerics import sqnr

from .data import DEVICES
from .llama import recording


@pytest.fixture
def replaced(monkeypatch):
    """Replaces a family's RoPE, until the test ends."""

    def replace(name):
        module = sys.modules[get_train_spec(name).model_cls.__module__]
        original = module.apply_rotary_emb
        monkeypatch.setattr(module, "apply_rotary_emb", original)
        rotary.rotate_in_real_numbers(name)
        return original, module.apply_rotary_emb

    rotary.rotate_in_real_numbers.cache_clear()
    yield replace
    rotary.rotate_in_real_numbers.cache_clear()


def operands(dtype, device, positions=None):
    """Of 2 sequences of 40 tokens, 4 heads of q, 2 of k."""
    freqs_cis = precompute_freqs_cis(32, 64).to(device)
    xq, xk = (torch.randn(2, 40, heads, 32, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2))
    if positions is not None:
        positions = torch.randint(64, (positions, 40), device=device)
    return xq, xk, freqs_cis, positions


def results(function, operands):
    """Both outputs, and gradients of both inputs of dy that are the same at every call."""
    generator = torch.Generator(operands[0].device).manual_seed(1)
    outputs = function(*operands)
    dys = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, operands[:2], dys)


@pytest.mark.parametrize("positions", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torchtitans(replaced, device, dtype, positions):
    original, new = replaced("llama3")
    x = operands(dtype, device, positions)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(new, fullgraph=True, backend=backend)
    for y, truth in zip(results(compiled, x), results(original, x), strict=True):
        assert y.dtype == truth.dtype and y.shape == truth.shape
        # Products may be rounded, or fused with the sum: of bf16 results a few round the other way.
        assert sqnr(truth, y) > (60 if dtype == torch.bfloat16 else 130)
        assert (y != truth).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)


def test_eager_blocks_keep_torchtitans(replaced):
    original, new = replaced("llama3")
    x = operands(torch.bfloat16, "cpu")
    assert all(torch.equal(y, truth) for y, truth in zip(results(new, x), results(original, x), strict=True))


@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_no_activation_is_complex(replaced, name):
    original, new = replaced(name)
    x = operands(torch.bfloat16, "cpu")

    def complex_activations(function):
        graphs = []
        results(torch.compile(function, fullgraph=True, backend=recording(graphs)), x)
        values = [node.meta["val"] for graph in graphs for node in graph.graph.nodes if "val" in node.meta]
        return [v for v in values if isinstance(v, torch.Tensor) and v.is_complex() and v.numel() > 64 * 16]

    assert complex_activations(original) and not complex_activations(new)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_other_kinds_of_rope_are_left_alone(replaced, name):
    original, new = replaced(name)
    assert new is original and not rotary.has_complex_rotary_embedding(name)


def test_once_is_enough(replaced):
    _, new = replaced("llama3")
    assert new.__wrapped__ is apply_rotary_emb
    rotary.rotate_in_real_numbers("llama3")
    assert replaced("llama3")[1] is new
