"""blockfp8_titan.feed_forward: a gated feed-forward that quantises its intermediate results."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blockfp8_titan import BlockwiseFP8Linear, Recipe
from blockfp8_titan.feed_forward import GatedFeedForward, fuse_feed_forward
from blockfp8_titan.numerics import sqnr

from .llama import CountOps, gradients, worst

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
FLOATS = [torch.bfloat16, torch.float32]


class FeedForward(nn.Module):
    def __init__(self, K, N, recipe=Recipe()):
        super().__init__()
        self.w1, self.w3 = (BlockwiseFP8Linear(K, N, bias=False, recipe=recipe) for _ in range(2))
        self.w2 = BlockwiseFP8Linear(N, K, bias=False, recipe=recipe)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def feed_forwards(K=144, N=272, recipe=Recipe(), dtype=torch.float32, device="cpu"):
    """One that is fused and one that is not, with the same weights."""
    plain = FeedForward(K, N, recipe).to(device, dtype)
    fused = copy.deepcopy(plain)
    fuse_feed_forward(fused)
    assert isinstance(fused, GatedFeedForward) and isinstance(fused, FeedForward)
    return fused, plain


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (129,), (3, 127)])
@pytest.mark.parametrize("dtype, least", [(torch.float32, 45), (torch.bfloat16, 28)])
@pytest.mark.parametrize("device", DEVICES)
def test_fused_feed_forwards_compute_what_unfused_ones_do(device, dtype, least, shape):
    fused, plain = feed_forwards(dtype=dtype, device=device)
    x, dy = (torch.randn(*shape, 144, device=device, dtype=dtype) for _ in range(2))
    truth, values = gradients(plain, x, dy), gradients(fused, x, dy)
    if x.numel() == 0:
        assert all(values[name].shape == truth[name].shape and not values[name].any() for name in truth)
        return
    # Unfused, silu is rounded before it is multiplied: some values round to the neighbouring e4m3 number.
    assert worst(truth, values) > (least if x.numel() > 2000 else 24)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_fusing_costs_no_accuracy(scale_format):
    fused, plain = feed_forwards(recipe=Recipe(scale_format=scale_format))
    x, dy = torch.randn(400, 144), torch.randn(400, 144)
    w1, w2, w3 = (getattr(plain, name).weight.detach().clone().requires_grad_() for name in ("w1", "w2", "w3"))
    x_exact = x.clone().requires_grad_()
    y = (F.silu(x_exact @ w1.t()) * (x_exact @ w3.t())) @ w2.t()
    y.backward(dy)
    truth = {"y": y, "dx": x_exact.grad, "w1.weight": w1.grad, "w2.weight": w2.grad, "w3.weight": w3.grad}
    before, after = gradients(plain, x, dy), gradients(fused, x, dy)
    for name, exact in truth.items():
        assert sqnr(exact, after[name]) > max(23, sqnr(exact, before[name]) - 0.3), name


def gemms(module, x, backward=True):
    module.zero_grad()
    with CountOps() as count:
        y = module(x)
        if backward:
            y.sum().backward()
    return count


@pytest.mark.parametrize("device", DEVICES)
def test_what_needs_no_gradient_costs_no_gemm(device):
    fused, _ = feed_forwards(device=device)
    x = torch.randn(32, 144, device=device)
    assert gemms(fused, x.clone().requires_grad_()).gemms == 9
    assert gemms(fused, x).gemms == 7
    fused.w1.weight.requires_grad_(False)
    assert gemms(fused, x.clone().requires_grad_()).gemms == 8
    assert fused.w1.weight.grad is None and fused.w3.weight.grad is not None
    for linear in (fused.w2, fused.w3):
        linear.weight.requires_grad_(False)
    frozen = gemms(fused, x.clone().requires_grad_())
    assert frozen.gemms == 6 and frozen.calls["quantize_1x128"] == 2  # x; and dy for dx
    with torch.no_grad():
        assert gemms(fused, x, backward=False).gemms == 3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_choice_of_what_is_trained_has_its_gradients(checkpointed):
    fused, plain = feed_forwards()
    for module in (fused, plain):
        module.w2.bias = nn.Parameter(torch.ones(144))
    tensors = ("x", "w1.weight", "w2.weight", "w3.weight", "w2.bias")
    for wanted in itertools.product([False, True], repeat=len(tensors)):
        if not any(wanted):
            continue
        x, dy = torch.randn(40, 144), torch.randn(40, 144)
        found = []
        for module in (fused, plain):
            inputs = {"x": x.clone(), **dict(module.named_parameters())}
            for name, wants in zip(tensors, wanted, strict=True):
                inputs[name].requires_grad_(wants).grad = None
            run = partial(checkpoint, module, use_reentrant=False) if checkpointed else module
            run(inputs["x"]).backward(dy)
            found.append({name: inputs[name].grad for name in tensors})
        for name, wants in zip(tensors, wanted, strict=True):
            after, before = (gradients[name] for gradients in found)
            assert (after is not None) == (before is not None) == wants, (name, wanted)
            # Unfused, silu is rounded before it is multiplied.
            assert not wants or torch.equal(after, before) or sqnr(before, after) > 24, (name, wanted)


def test_the_feed_forward_quantises_once():
    fused, plain = feed_forwards()
    x = torch.randn(32, 144, requires_grad=True)
    assert gemms(plain, x).quantisations == 6
    count = gemms(fused, x)
    assert count.quantisations == 4
    assert count.calls["swiglu_quantize_1x128"] == count.calls["swiglu_backward_quantize_1x128_both"] == 1


def test_hooks_on_a_member_see_what_they_saw():
    fused, plain = feed_forwards()
    seen = []
    fused.w3.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x, dy = torch.randn(9, 144), torch.randn(9, 144)
    truth, values = gradients(plain, x, dy), gradients(fused, x, dy)
    assert seen == [(9, 272)] and all(torch.equal(truth[name], values[name]) for name in truth)


@pytest.mark.parametrize("member, recipe", [("w2", Recipe(scale_format="pow2")), ("w1", Recipe(wgrad="bf16"))])
def test_a_recipe_changed_later_is_respected(member, recipe):
    fused, plain = feed_forwards()
    for module in (fused, plain):
        getattr(module, member).recipe = recipe
    x, dy = torch.randn(9, 144), torch.randn(9, 144)
    truth, values = gradients(plain, x, dy), gradients(fused, x, dy)
    assert all(torch.equal(truth[name], values[name]) for name in truth)


def test_double_backward_is_refused():
    fused, _ = feed_forwards()
    x = torch.randn(4, 144, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)


def test_a_forward_put_on_a_member_is_called():
    fused, _ = feed_forwards()
    own, calls = fused.w1.forward, []
    fused.w1.forward = lambda x: calls.append(x) or own(x) * 0
    assert not fused(torch.randn(3, 144)).any() and len(calls) == 1


def test_a_fused_feed_forward_is_pickled():
    fused, _ = feed_forwards()
    x = torch.randn(3, 144)
    again = pickle.loads(pickle.dumps(fused))
    assert type(again) is type(fused) and torch.equal(again(x), fused(x))
