"""Modules that quantise what they compute: QuantizingRMSNorm, GatedFeedForward, and the linears that take a QuantizedInput."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from blockfp8_titan import BlockwiseFP8Linear, Recipe, convert_model
from blockfp8_titan.activation import QuantizedInput, quantize_input
from blockfp8_titan.feed_forward import GatedFeedForward, fuse_feed_forward
from blockfp8_titan.norm import QuantizingRMSNorm, quantize_output_of
from blockfp8_titan.numerics import SQNR_FLOOR_DB, sqnr
from blockfp8_titan.recomputation import Recomputation
from blockfp8_titan.weight_cache import cache_weights

from .llama import CountOps, compile_blocks, graph_calls, model_of, names_as_eager, saved_bytes, step, tokens_for

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


def quantizing_norm(K, recipe=Recipe(), dtype=torch.float32, device="cpu"):
    norm = nn.RMSNorm(K, eps=1e-5, device=device, dtype=dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    quantize_output_of(norm, recipe)
    return norm


def plain_norm(norm):
    twin = copy.deepcopy(norm)
    twin.__class__ = nn.RMSNorm
    return twin


def gradients(module, x, dy):
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def worst(truth, values):
    assert truth.keys() == values.keys()
    return min(sqnr(truth[name], values[name]) for name in truth)


# The norm


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_and_its_linear_are_as_exact_as_a_linear(device, dtype, scale_format):
    recipe = Recipe(scale_format=scale_format)
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
    for name, floor in (("y", "y"), ("dx", "dx"), ("1.weight", "dw")):
        assert sqnr(truth[name], values[name]) >= SQNR_FLOOR_DB["pow2" if scale_format == "pow2" else floor], name


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


def test_rows_and_columns_apart_are_those_made_together():
    norm = quantizing_norm(144)
    together = norm(torch.randn(5, 27, 144, generator=torch.Generator().manual_seed(0)))
    norm.recomputation = Recomputation(columns_apart=True)
    apart = norm(torch.randn(5, 27, 144, generator=torch.Generator().manual_seed(0)))
    for a, b in zip((*together.rows, *together.columns), (*apart.rows, *apart.columns), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("change", ["hook", "dtype"])
def test_a_norm_that_cannot_quantise_is_what_it_was(change):
    norm = quantizing_norm(64)
    seen = []
    if change == "hook":
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(3, 64, dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    y = norm(x)
    assert torch.equal(y, plain_norm(norm)(x)) and (change == "dtype" or torch.equal(seen[0], y))


# Linears that take it


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
    with pytest.raises(ValueError, match=r"last dimension must be in_features = 128"):
        BlockwiseFP8Linear(128, 64)(quantized)
    for recipe in (Recipe(scale_format="pow2"), Recipe(wgrad="bf16")):
        with pytest.raises(ValueError, match=r"quantises for wgrad = 'fp8' and scale_format = 'fp32'.*fuse = \"off\""):
            BlockwiseFP8Linear(144, 64, recipe=recipe)(quantized)
    with pytest.raises(RuntimeError, match=r"quantised without gradients"):
        BlockwiseFP8Linear(144, 64)(quantize_input(x, Recipe(), columns=False))


# The feed-forward


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
    normed = quantizing_norm(144)(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(normed.carrier, x, torch.ones(4, 144), create_graph=True)


# Whole blocks


def pair(device="cpu", dtype=torch.float32, layers=1, **sizes):
    """A model converted with fusions and one without."""
    models = [model_of(dtype=dtype, device=device, layers=layers, **sizes) for _ in range(2)]
    for model, fuse in zip(models, ("auto", "off"), strict=True):
        report = convert_model(model, fuse=fuse)
        assert all(fusion.fused == (fuse == "auto") for fusion in report.fusions) and report.fusions
    return models


@pytest.mark.parametrize(
    "name, layers, dtype, least",
    [
        # In fp32 they differ where a last bit sends a value to the neighbouring e4m3 number; what follows differs more with each.
        ("llama3", 1, torch.float32, 35),
        ("qwen3", 1, torch.float32, 35),
        ("llama4", 1, torch.float32, 35),
        ("deepseek_v3", 1, torch.float32, 35),
        ("llama3", 2, torch.bfloat16, 25),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_fused_models_compute_what_unfused_ones_do(device, name, layers, dtype, least):
    fused, plain = pair(device, dtype, layers, name=name)
    tokens = tokens_for(fused)
    truth, values = step(plain, tokens), step(fused, tokens)
    assert all(value.isfinite().all() for value in values.values())
    assert worst(truth, values) > least


def test_a_fused_model_is_as_near_to_bf16_as_an_unfused_one():
    exact = model_of(dtype=torch.float32, layers=1)
    tokens = tokens_for(exact)
    truth, after, before = step(exact, tokens), *(step(model, tokens) for model in pair())
    for name, value in truth.items():
        assert sqnr(value, after[name]) > max(20, sqnr(value, before[name]) - 0.5), name


FUSED_CALLS = {
    "rms_norm_quantize_1x128": 2,
    "swiglu_quantize_1x128": 1,
    "swiglu_backward_quantize_1x128_both": 1,
    "quantize_1x128_both": 6,  # what wo multiplies, and the gradients of wq, wk, wv, wo and w2
}


@pytest.mark.parametrize("device", DEVICES)
def test_launches_of_a_block(device):
    fused, plain = pair(device, layers=2)
    tokens = tokens_for(fused)
    with CountOps() as before:
        step(plain, tokens)
    with CountOps() as after:
        step(fused, tokens)
    assert before.quantisations == 2 * 14 and after.quantisations == 2 * 10
    assert {name: after.calls[name] for name in FUSED_CALLS} == {name: 2 * n for name, n in FUSED_CALLS.items()}
    assert before.gemms == after.gemms == 2 * 21 + 3  # and those of the output, in bf16


def test_launches_of_a_compiled_block():
    fused, _ = pair(dtype=torch.bfloat16)
    graphs = compile_blocks(fused)
    step(fused, tokens_for(fused))
    forward, backward = map(graph_calls, graphs)
    both = forward.calls + backward.calls
    assert {name: both[name] for name in FUSED_CALLS} == FUSED_CALLS
    assert (forward.gemms, backward.gemms) == (7, 14)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bytes_kept_for_backward(mode):
    """Of a block, against bf16: what the seven linears keep of their inputs is one byte an element, and nothing twice."""
    tokens, K, N = 512, 256, 768
    kept = {}
    for converted in (False, True):
        model = model_of(layers=1)
        if converted:
            convert_model(model)
        block = model.layers["0"]
        if mode == "compiled":
            compile_blocks(model)
            block = model.layers["0"]
        x = torch.randn(1, tokens, K, dtype=torch.bfloat16, requires_grad=True)
        own = [x, model.freqs_cis, *model.parameters()]
        kept[converted] = saved_bytes(lambda: block(x, model.freqs_cis, None), without=own)  # noqa: B023
    # What linears keep in bf16: two norms' results, and the inputs of wo and w2, at two bytes.
    linears = 2 * tokens * (3 * K + N)
    # Eager bf16 keeps silu(gate) too, which the fused block has not; wo's input is attention's output, which both keep for attention.
    others = 2 * tokens * N if mode == "eager" else 0
    spared = kept[False] - kept[True] - others + 2 * tokens * K
    assert spared >= (1 - 0.55) * linears, (spared, linears)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_compute_what_eager_ones_do(device, backend):
    torch._dynamo.reset()
    # On a GPU as it trains; on a CPU bf16 is slow.
    fused, _ = pair(device, torch.bfloat16, layers=2) if device == "cuda" else pair(device)
    compiled = copy.deepcopy(fused)
    for name, block in compiled.layers.named_children():
        compiled.layers.register_module(name, torch.compile(block, fullgraph=True, backend=backend))
    for length in (24, 17):  # the second compiles again, with dynamic shapes
        tokens = tokens_for(fused, length=length)
        truth, values = step(fused, tokens), step(compiled, tokens)
        values = names_as_eager(values)
        assert all(value.isfinite().all() for value in values.values())
        assert worst(truth, values) > (200 if backend == "aot_eager" else 25)


def test_members_compiled_one_by_one():
    """As torchtitan compiles a block with experts: the quantised input leaves one graph and enters the next."""
    torch._dynamo.reset()
    fused, _ = pair()
    compiled = copy.deepcopy(fused)
    block = compiled.layers["0"]
    for name, member in list(block.named_children()):
        setattr(block, name, torch.compile(member, fullgraph=True, backend="aot_eager"))
    tokens = tokens_for(fused)
    truth, values = step(fused, tokens), step(compiled, tokens)
    assert worst(truth, names_as_eager(values)) > 200


def test_copies_and_state_dicts():
    fused, plain = pair()
    assert isinstance(fused.layers["0"].ffn_norm, QuantizingRMSNorm)
    assert list(fused.state_dict()) == list(plain.state_dict()) == list(model_of(layers=1).state_dict())
    copied = copy.deepcopy(fused)
    assert isinstance(copied.layers["0"].feed_forward, GatedFeedForward)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.load_state_dict(fused.state_dict())
    tokens = tokens_for(fused)
    truth, values = step(fused, tokens), step(copied, tokens)
    assert all(torch.equal(truth[name], values[name]) for name in truth)


def test_eval_and_no_grad_give_the_same_output_and_quantise_rows_alone():
    fused, _ = pair()
    tokens = tokens_for(fused)
    y = fused(tokens)
    with torch.no_grad(), CountOps() as count:
        assert torch.equal(fused(tokens), y) and torch.equal(fused.eval()(tokens), y)
    assert not count.calls["quantize_1x128_both"] and count.quantisations == 2 * 4


def test_autocast_with_fp32_weights():
    fused, plain = pair()
    tokens = tokens_for(fused)
    with torch.autocast("cpu", torch.bfloat16):
        truth, values = step(plain, tokens), step(fused, tokens)
    assert worst(truth, values) > 25
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="autocast's dtype is torch.float16"):
        fused(tokens)


def test_cached_weights_are_quantised_once():
    fused, _ = pair()
    tokens = tokens_for(fused)
    truth = step(fused, tokens)
    cache_weights(fused)
    first = step(fused, tokens)
    with CountOps() as count:
        second = step(fused, tokens)
    assert all(torch.equal(truth[name], first[name]) and torch.equal(truth[name], second[name]) for name in truth)
    assert not any("128x128" in name and "quantize" in name for name in count.calls)
