"""RoPE of compiled blocks in real numbers, against torchtitan's in complex ones."""

import sys
from functools import wraps

import pytest
import torch
from torchtitan.models.llama3.model.model import precompute_freqs_cis

from blockfp8_titan import rotary
from blockfp8_titan.numerics import sqnr

from .data import DEVICES
from .llama import model_of, recording, saved_bytes


@pytest.fixture
def replaced(monkeypatch):
    """torchtitan's function and what stands for it until the test ends."""

    def replace(name):
        model = model_of(name, layers=1)
        module = sys.modules[type(model).__module__]
        original = module.apply_rotary_emb
        monkeypatch.setattr(module, "apply_rotary_emb", original)
        rotary.rotate_in_real_numbers(model)
        return original, module.apply_rotary_emb

    return replace


def operands(dtype, device="cpu", positions=None):
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
@pytest.mark.parametrize("name", ["llama3", "llama4"])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torchtitans(replaced, device, name, dtype, positions):
    original, new = replaced(name)
    x = operands(dtype, device, positions)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(new, fullgraph=True, backend=backend)
    for y, truth in zip(results(compiled, x), results(original, x), strict=True):
        assert y.dtype == truth.dtype and y.shape == truth.shape
        # Products may be rounded, or fused with the sum: of bf16 results a few round the other way.
        assert sqnr(truth, y) > (60 if dtype == torch.bfloat16 else 130)


def test_eager_blocks_keep_torchtitans(replaced, monkeypatch):
    original, new = replaced("llama3")
    monkeypatch.setattr(rotary, "rotate", None)
    x = operands(torch.bfloat16)
    assert all(torch.equal(y, truth) for y, truth in zip(results(new, x), results(original, x), strict=True))


@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_no_activation_is_complex_and_none_is_kept(replaced, name):
    original, new = replaced(name)
    x = operands(torch.bfloat16)

    def complex_activations(function):
        graphs = []
        compiled = torch.compile(function, fullgraph=True, backend=recording(graphs))
        results(compiled, x)
        values = [node.meta["val"] for graph in graphs for node in graph.graph.nodes if "val" in node.meta]
        found = [v for v in values if isinstance(v, torch.Tensor) and v.is_complex() and v.numel() > 64 * 16]
        return found, saved_bytes(lambda: compiled(*x), without=x[:3])

    found, kept_in_complex = complex_activations(original)
    assert found
    assert complex_activations(new) == ([], kept_in_complex)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_rope_of_other_families_is_left_alone(replaced, name):
    original, new = replaced(name)
    assert new is original and not rotary.has_complex_rope(model_of(name, layers=1))


def test_what_somebody_else_has_put_there_is_left_alone(monkeypatch):
    model = model_of(layers=1)
    module = sys.modules[type(model).__module__]
    original = module.apply_rotary_emb

    def another(*args):
        return original(*args)

    for function in (another, wraps(original)(another)):
        monkeypatch.setattr(module, "apply_rotary_emb", function)
        rotary.rotate_in_real_numbers(model)
        assert module.apply_rotary_emb is function and not rotary.has_complex_rope(model)


def test_it_can_be_asked_for_twice_and_taken_back(replaced):
    original, new = replaced("llama3")
    model = model_of(layers=1)
    module = sys.modules[type(model).__module__]
    rotary.rotate_in_real_numbers(model)
    assert module.apply_rotary_emb is new and new.__wrapped__ is original and rotary.has_complex_rope(model)
    rotary.rotate_in_real_numbers(model, wanted=False)
    assert module.apply_rotary_emb is original
