"""blockfp8_titan.norm: an RMSNorm that quantises its result."""

import copy

import pytest
import torch
import torch.nn as nn

from blockfp8_titan import BlockwiseFP8Linear, Recipe, reference
from blockfp8_titan.activation import QuantizedInput
from blockfp8_titan.norm import quantize_output_of
from blockfp8_titan.numerics import SQNR_FLOOR_DB, sqnr
from blockfp8_titan.recomputation import Recomputation

from .data import DEVICES
from .llama import gradients

FLOATS = [torch.bfloat16, torch.float32]


def quantizing_norm(K, recipe=Recipe(), dtype=torch.float32, device="cpu"):
    norm = nn.RMSNorm(K, eps=1e-5, device=device, dtype=dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    quantize_output_of(norm, recipe)
    return norm


def plain_norm(norm):
    twin = copy.deepcopy(norm)
    twin.__class__ = nn.RMSNorm
    return twin


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(scale_format="pow2"), Recipe(wgrad="fp8_block")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_and_its_linear_are_as_exact_as_a_linear(device, dtype, recipe):
    fused = nn.Sequential(
        quantizing_norm(528, recipe, dtype, device),
        BlockwiseFP8Linear(528, 400, bias=False, recipe=recipe, device=device, dtype=dtype),
    )
    exact = nn.Sequential(nn.RMSNorm(528, eps=1e-5), nn.Linear(528, 400, bias=False)).to(device)
    exact.load_state_dict(fused.state_dict())
    x, dy = torch.randn(3, 129, 528, device=device) * 3, torch.randn(3, 129, 400, device=device)
    truth, values = gradients(exact, x.to(dtype).float(), dy.to(dtype).float()), gradients(fused, x.to(dtype), dy)
    assert all(value.dtype == dtype for value in values.values())
    assert sqnr(truth["0.weight"], values["0.weight"]) > 26  # few values: a wider spread than the floors allow for
    dw = "dw_fp8_block" if recipe.wgrad == "fp8_block" else "dw"
    for name, floor in (("y", "y"), ("dx", "dx"), ("1.weight", dw)):
        floor = "pow2" if recipe.scale_format == "pow2" else floor
        assert sqnr(truth[name], values[name]) >= SQNR_FLOOR_DB[floor], name


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (129,), (2, 0), (2, 3, 5)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_norms_gradients_are_those_of_torchs(device, dtype, shape, apart):
    norm = quantizing_norm(272, dtype=dtype, device=device)
    norm.recomputation = Recomputation(columns_apart=apart)
    x = (torch.randn(*shape, 272, device=device) * 3).to(dtype)
    dy = torch.randn(*shape, 272, device=device).to(dtype)
    truth = gradients(plain_norm(norm).float(), x.float(), dy)
    x = x.requires_grad_()
    normed = norm(x)
    assert isinstance(normed, QuantizedInput)
    assert normed.shape == normed.size() == x.shape and normed.dtype == dtype and normed.size(-1) == 272
    assert normed.carrier.untyped_storage().nbytes() == x.element_size() and normed.carrier.isnan().all()
    normed.carrier.backward(dy)
    for name, value in (("dx", x.grad), ("weight", norm.weight.grad)):
        assert value.dtype == dtype and value.shape == truth[name].shape
        assert torch.allclose(value.float(), truth[name], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-3), (
            name
        )


@pytest.mark.parametrize("wgrad", ["fp8", "fp8_block"])
def test_rows_and_columns_apart_are_those_made_together(wgrad):
    norm = quantizing_norm(144, Recipe(wgrad=wgrad))
    x = torch.randn(5, 27, 144)
    together = norm(x)
    y = plain_norm(norm)(x).detach().view(-1, 144)
    quantize = {"fp8": reference.quantize_1x128_columns, "fp8_block": reference.quantize_128x128_columns}[wgrad]
    assert all(sqnr(exact, part) > 45 for exact, part in zip(quantize(y), together.columns, strict=True))
    assert together.wgrad == wgrad
    for output in (False, True):
        norm.recomputation = Recomputation(columns_apart=True, output=output)
        apart = norm(x)
        for a, b in zip((*together.rows, *together.columns), (*apart.rows, *apart.columns), strict=True):
            assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("change", ["hook", "dtype", "recipe"])
def test_a_norm_that_cannot_quantise_is_what_it_was(change):
    norm = quantizing_norm(64)
    seen = []
    if change == "recipe":
        norm.recipe = Recipe(wgrad="bf16")
    if change == "hook":
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(3, 64, dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    y = norm(x)
    assert torch.equal(y, plain_norm(norm)(x)) and (change != "hook" or torch.equal(seen[0], y))


def test_double_backward_is_refused():
    x = torch.randn(4, 144, requires_grad=True)
    normed = quantizing_norm(144)(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(normed.carrier, x, torch.ones(4, 144), create_graph=True)
