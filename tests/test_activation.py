"""blockfp8_titan.activation: linears that take an input that was quantised before."""

import pytest
import torch
import torch.nn as nn

from blockfp8_titan import BlockwiseFP8Linear, Recipe
from blockfp8_titan.activation import quantize_input

from .llama import gradients

FLOATS = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("wgrad", ["fp8", "fp8_block"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_quantised_input_gives_the_bits_of_the_tensor_it_was(dtype, wgrad):
    linear = BlockwiseFP8Linear(144, 64, recipe=Recipe(wgrad=wgrad), dtype=dtype)
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
    for recipe in (Recipe(scale_format="pow2"), Recipe(wgrad="bf16"), Recipe(wgrad="fp8_block")):
        with pytest.raises(ValueError, match=r"quantises for wgrad = 'fp8' and scale_format = 'fp32'.*fuse = \"off\""):
            BlockwiseFP8Linear(144, 64, recipe=recipe)(quantized)
    # Of an input unquantised for dw, a linear under wgrad = "bf16" would need the values, which a norm's has not.
    in_bf16 = Recipe(wgrad="bf16")
    with pytest.raises(ValueError, match="quantises for wgrad = 'bf16'"):
        BlockwiseFP8Linear(144, 64, recipe=in_bf16)(quantize_input(x, in_bf16, columns=False))
    with pytest.raises(RuntimeError, match=r"quantised without gradients"):
        BlockwiseFP8Linear(144, 64)(quantize_input(x, Recipe(), columns=False))
