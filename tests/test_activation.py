"""blockfp8_titan.activation: linears that take an input that was quantised before."""

import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from blockfp8_titan import BlockwiseFP8Linear, Recipe
from blockfp8_titan.activation import quantize_input

from .llama import CountOps, gradients

FLOATS = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_quantised_input_gives_the_bits_of_the_tensor_it_was(dtype):
    linear = BlockwiseFP8Linear(144, 64, dtype=dtype)
    x, dy = torch.randn(3, 43, 144, dtype=dtype), torch.randn(3, 43, 64, dtype=dtype)
    truth = gradients(linear, x, dy)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(quantize_input(x, linear.recipe, columns=True))

    values = gradients(Shared(), x, dy)
    for name in ("y", "dx"):
        assert torch.equal(truth[name], values[name])
    assert torch.equal(truth["weight"], values["linear.weight"])


def test_a_quantised_input_that_does_not_fit_is_refused():
    x = torch.randn(4, 144)
    quantized = quantize_input(x, Recipe(), columns=True)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 128\], its last dimension in_features"):
        BlockwiseFP8Linear(128, 64)(quantized)
    for recipe in (Recipe(scale_format="pow2"), Recipe(wgrad="bf16")):
        with pytest.raises(ValueError, match=r"quantises for wgrad = 'fp8' and scale_format = 'fp32'.*fuse = \"off\""):
            BlockwiseFP8Linear(144, 64, recipe=recipe)(quantized)
    with pytest.raises(RuntimeError, match=r"quantised without gradients"):
        BlockwiseFP8Linear(144, 64)(quantize_input(x, Recipe(), columns=False))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def linears_of(recipe=Recipe(), device="cpu"):
    return nn.ModuleList(BlockwiseFP8Linear(144, n, recipe=recipe, device=device) for n in (64, 128, 272))


def activation(device="cpu"):
    return torch.randn(129, 144, device=device, requires_grad=True).sin()


def counted(linears, *inputs):
    """Calls of our ops in forward, and the outputs."""
    with CountOps() as count:
        outputs = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
    return count.calls, outputs


@pytest.mark.parametrize("wgrad", ["fp8", "fp8_block", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_linears_quantise_the_input_that_they_share_once(device, wgrad):
    linears = linears_of(Recipe(wgrad=wgrad), device)
    x = activation(device)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        calls, outputs = counted(linears, x, x, x)
    assert sum(calls[name] for name in ("quantize_1x128", "quantize_1x128_both")) == 1
    assert calls["quantize_128x128_both"] == (wgrad == "fp8_block")  # weights are quantised without a transpose here
    weights = sum(linear.weight.nbytes for linear in linears)
    x_bytes = x.nbytes if wgrad == "bf16" else x.numel()
    assert x_bytes <= sum(kept.values()) - weights <= 1.2 * x_bytes
    of_clones = [linear(x.clone()) for linear in linears]
    inputs = [x, *linears.parameters()]
    found, truth = (
        torch.autograd.grad([y.square().sum() for y in ys], inputs, retain_graph=True) for ys in (outputs, of_clones)
    )
    for a, b in zip((*outputs, *found[1:]), (*of_clones, *truth[1:]), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[0], truth[0])  # a sum in another order


@pytest.mark.parametrize("device", DEVICES)
def test_what_has_changed_is_quantised_again(device):
    linears = linears_of(device=device)
    x = activation(device)
    linears[0](x)
    x.mul_(3)
    calls, (y,) = counted(linears[:1], x)
    assert calls["quantize_1x128_both"] == 1 and torch.equal(y, linears[0](x.clone()))


def test_what_differs_is_quantised_for_each():
    linears = linears_of()
    x, other = activation(), activation()
    assert counted(linears, x, other, x)[0]["quantize_1x128_both"] == 3  # the last one alone is kept
    leaf = x.detach().requires_grad_()
    assert counted(linears, leaf, leaf, leaf)[0]["quantize_1x128_both"] == 3
    linears[1].recipe = Recipe(scale_format="pow2")
    linears[2].weight.requires_grad_(False)
    x = activation()
    calls, outputs = counted(linears, x, x, x)
    assert (calls["quantize_1x128_both"], calls["quantize_1x128"]) == (2, 1)
    for linear, y in zip(linears, outputs, strict=True):
        assert torch.equal(y, linear(x.clone()))


def test_what_was_quantised_goes_with_its_tensor():
    x = activation()
    rows = weakref.ref(quantize_input(x, Recipe(), columns=True).rows[0])
    assert rows() is not None
    del x
    assert rows() is None


@pytest.mark.parametrize("device", DEVICES)
def test_linears_share_an_input_under_checkpointing(device):
    linears = linears_of(device=device)

    def forward(x):
        return torch.cat([linear(x) for linear in linears], -1)

    leaf = torch.randn(129, 144, device=device, requires_grad=True)
    inputs = [leaf, *linears.parameters()]
    for inside in (False, True):  # what they share is made in the checkpoint, or outside
        plain = forward(leaf.sin())
        with CountOps() as count:
            if inside:
                y = checkpoint(lambda x: forward(x.sin()), leaf, use_reentrant=False)
            else:
                y = checkpoint(forward, leaf.sin(), use_reentrant=False)
            found = torch.autograd.grad(y.square().sum(), inputs)
        assert count.calls["quantize_1x128_both"] in (
            4,
            5,
        )  # dy of each, and x, again where it was not at hand any more
        for a, b in zip((y, *found), (plain, *torch.autograd.grad(plain.square().sum(), inputs)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_another_stream_and_a_graph_quantise_for_themselves():
    linears = linears_of(device="cuda")
    x = activation("cuda")
    linears[0](x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert counted(linears[:1], x)[0]["quantize_1x128_both"] == 1
    torch.cuda.current_stream().wait_stream(stream)
    linears[0](x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linears[0](x)
    x.data.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, linears[0](x.clone()))
