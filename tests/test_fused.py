"""Whole blocks of torchtitan's whose modules quantise what they compute."""

import copy

import pytest
import torch

from blockfp8_titan import Recipe, convert_model, norm
from blockfp8_titan.feed_forward import GatedFeedForward
from blockfp8_titan.norm import QuantizingRMSNorm
from blockfp8_titan.numerics import sqnr
from blockfp8_titan.weight_cache import cache_weights

from .data import DEVICES
from .llama import CountOps, compile_blocks, graph_calls, model_of, names_as_eager, saved_bytes, step, tokens_for, worst


def pair(device="cpu", dtype=torch.float32, layers=1, swiglu_inputs="bf16", wgrad="fp8", **sizes):
    """A model converted with fusions and one without."""
    models = [model_of(dtype=dtype, device=device, layers=layers, **sizes) for _ in range(2)]
    for model, fuse in zip(models, ("auto", "off"), strict=True):
        report = convert_model(model, recipe=Recipe(wgrad=wgrad), fuse=fuse, swiglu_inputs=swiglu_inputs)
        assert all(fusion.fused == (fuse == "auto") for fusion in report.fusions) and report.fusions
    return models


@pytest.mark.parametrize(
    "name, layers, dtype, least, wgrad",
    [
        # In fp32 they differ where a last bit sends a value to the neighbouring e4m3 number; what follows differs more with each.
        ("llama3", 1, torch.float32, 35, "fp8"),
        ("qwen3", 1, torch.float32, 35, "fp8"),
        ("llama4", 1, torch.float32, 35, "fp8"),
        ("deepseek_v3", 1, torch.float32, 35, "fp8"),
        ("llama3", 2, torch.bfloat16, 25, "fp8"),
        ("llama3", 1, torch.float32, 35, "fp8_block"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_fused_models_compute_what_unfused_ones_do(device, name, layers, dtype, least, wgrad):
    fused, plain = pair(device, dtype, layers, name=name, wgrad=wgrad)
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


BLOCK_CALLS = {
    "rms_norm_quantize_1x128": 4,  # rows, and blocks for dw
    "swiglu_quantize_1x128": 1,
    "swiglu_backward_quantize_1x128_both": 1,
    "quantize_1x128": 1,  # what wo multiplies
    "quantize_128x128_columns": 1,  # the same for dw
    "quantize_1x128_both": 5,
    "gemm_1x128_1x128": 0,
    "gemm_1x128_128x128": 21,
}


@pytest.mark.parametrize("device", DEVICES)
def test_launches_of_a_block_whose_inputs_are_in_blocks_for_dw(device):
    fused, _ = pair(device, layers=2, wgrad="fp8_block")
    with CountOps() as count:
        step(fused, tokens_for(fused))
    assert {name: count.calls[name] for name in BLOCK_CALLS} == {name: 2 * n for name, n in BLOCK_CALLS.items()}
    assert count.quantisations == 2 * 13


def test_recipes_changed_later_on_all_modules_are_respected():
    """A norm's quantised result has no values, which dw in bf16 is computed of."""
    changed, _ = pair()
    plain = model_of(dtype=torch.float32, layers=1)
    convert_model(plain, recipe=Recipe(wgrad="bf16"))
    for module in changed.modules():
        if hasattr(module, "recipe"):
            module.recipe = Recipe(wgrad="bf16")
    tokens = tokens_for(changed)
    truth, values = step(plain, tokens), step(changed, tokens)
    assert worst(truth, values) > 200


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
    # Without FSDP or a cache, weights are quantised for forward and backward at once.
    assert {name: both[name] for name in both if "128x128" in name and "gemm" not in name} == {
        "quantize_128x128_both": 7
    }


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bytes_kept_for_backward(mode):
    """Of a block, against bf16: what linears keep of their inputs is one byte an element, of w2's nothing, and nothing twice."""
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
    # Compiled, the fp8 block keeps each weight's transpose in fp8 too: 4 K x K and 3 N x K of them, and their multipliers.
    weights = (4 * K * K + 3 * N * K) * (1 + 4 / 128**2) if mode == "compiled" else 0
    spared = kept[False] - kept[True] - others + 2 * tokens * K + weights
    assert spared >= linears - 1.05 * tokens * 3 * K, (spared, linears)


@pytest.mark.parametrize("swiglu_inputs, wgrad", [("bf16", "fp8"), ("fp8", "fp8"), ("fp8", "fp8_block")])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_compute_what_eager_ones_do(device, backend, swiglu_inputs, wgrad, monkeypatch):
    torch._dynamo.reset()
    if backend == "aot_eager":  # else the two round RMSNorm's gradients differently on a GPU
        monkeypatch.setattr(norm, "fused_gradients_run", lambda dy: False)
    # On a GPU as it trains; on a CPU bf16 is slow.
    options = {"dtype": torch.bfloat16, "layers": 2} if device == "cuda" else {}
    fused, _ = pair(device, swiglu_inputs=swiglu_inputs, wgrad=wgrad, **options)
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


@pytest.mark.parametrize("swiglu_inputs", ["bf16", "fp8"])
def test_autocast_with_fp32_weights(swiglu_inputs):
    fused, plain = pair(swiglu_inputs=swiglu_inputs)
    tokens = tokens_for(fused)
    with torch.autocast("cpu", torch.bfloat16):
        truth, values = step(plain, tokens), step(fused, tokens)
    assert worst(truth, values) > 25
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="autocast's dtype is torch.float16"):
        fused(tokens)


@pytest.mark.parametrize("swiglu_inputs", ["bf16", "fp8"])
def test_cached_weights_are_quantised_once(swiglu_inputs):
    fused, _ = pair(swiglu_inputs=swiglu_inputs)
    tokens = tokens_for(fused)
    truth = step(fused, tokens)
    cache_weights(fused)
    first = step(fused, tokens)
    with CountOps() as count:
        second = step(fused, tokens)
    assert all(torch.equal(truth[name], first[name]) and torch.equal(truth[name], second[name]) for name in truth)
    assert not any("128x128" in name and "quantize" in name for name in count.calls)
