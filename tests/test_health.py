"""blockfp8_titan.health: what is observed of a step equals what the tensors themselves give; under FSDP2 in sharded_health.py."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from blockfp8_titan import BlockwiseFP8Linear, Recipe, convert_model, ops, prepare_for_checkpointing, reference
from blockfp8_titan.health import Observation, ObservationFailed
from blockfp8_titan.ops import library
from blockfp8_titan.quantization_error import TensorHealth, add, tallies_of
from blockfp8_titan.weight_cache import cache_weights

from .data import KINDS, draw
from .llama import model_of, step, tokens_for
from .measured import assert_alike, expected, in_blocks, in_rows, watch
from .sharded import outcomes_of


def model(fuse="off", layers=1, recipe=Recipe(), dtype=torch.float32, swiglu_inputs="bf16"):
    """And the conversion's report."""
    made = model_of(layers=layers, dtype=dtype)
    return made, convert_model(made, recipe=recipe, fuse=fuse, swiglu_inputs=swiglu_inputs)


def weights_of(model):
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, BlockwiseFP8Linear)}


def observed(model, run):
    """The observation of what runs."""
    observation = Observation(lambda: [model])
    observation.start()
    try:
        run()
    finally:
        observation.stop()
    return observation


def observe(model, run):
    return observed(model, run).collect()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 128), (7, 272), (127, 16), (129, 384)])
def test_tallies_are_what_the_tensors_say(kind, shape):
    for dtype in (torch.float32, torch.bfloat16):
        for scale_format in ("fp32", "pow2"):
            x = draw(kind, *shape, dtype)
            (tally,) = tallies_of(lambda rows, x=x: [x[rows]], [reference.quantize_1x128(x, scale_format)])
            found = {"": {"x": TensorHealth.of(tally.tolist())}}
            assert_alike(found, {"": {"x": in_rows(x, scale_format)}})


def test_large_tensors_are_measured_in_parts(monkeypatch):
    x = draw("outliers", 300, 144, torch.float32)
    quantized = [reference.quantize_1x128(x)]
    (whole,) = tallies_of(lambda rows: [x[rows]], quantized)
    asked = []
    monkeypatch.setattr("blockfp8_titan.quantization_error._ELEMENTS", 128 * 144)
    (parts,) = tallies_of(lambda rows: asked.append(rows) or [x[rows]], quantized)
    assert len(asked) == 3 and torch.allclose(parts, whole, rtol=1e-12)


def test_tallies_add_up():
    a, b = (draw("normal", 40, 144, torch.float32) * size for size in (1, 100))
    tallies = [tallies_of(lambda rows, x=x: [x[rows]], [reference.quantize_1x128(x)])[0] for x in (a, b)]
    assert_alike(
        {"": {"x": TensorHealth.of(add(*tallies).tolist())}}, {"": {"x": in_rows(torch.cat([a, b]))}}, rel=1e-6
    )


def test_a_tensor_of_zeros_has_no_sqnr():
    x = torch.zeros(4, 144)
    (tally,) = tallies_of(lambda rows: [x[rows]], [reference.quantize_1x128(x)])
    health = TensorHealth.of(tally.tolist())
    assert math.isnan(health.sqnr_db) and math.isnan(health.multiplier_min) and health.flushed == 0
    exact = torch.full((4, 128), 448.0)
    (tally,) = tallies_of(lambda rows: [exact[rows]], [reference.quantize_1x128(exact)])
    assert TensorHealth.of(tally.tolist()) == TensorHealth(math.inf, 0.0, 1.0, 1.0, 1.0, 0)


@pytest.mark.parametrize("wgrad", ["fp8", "bf16", "fp8_block"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_eager_step(wgrad, cached):
    scale_format = "pow2" if cached else "fp32"
    made, _ = model(recipe=Recipe(wgrad=wgrad, scale_format=scale_format))
    if cached:
        cache_weights(made)
        made(tokens_for(made))  # fills the cache before
    seen = watch(made)
    tokens = tokens_for(made)
    health = observe(made, lambda: step(made, tokens))
    assert [(len(kept["x"]), len(kept["dy"])) for kept in seen.values()] == [(1, 1)] * 7
    assert_alike(health, expected(seen, weights_of(made), scale_format))


def test_micro_batches_add_up_and_validation_does_not_count():
    made, _ = model()
    seen = watch(made)

    def run():
        with torch.no_grad():
            made.eval()(tokens_for(made))
        made.train()
        for _ in range(3):
            made(tokens_for(made)).square().mean().backward()

    health = observe(made, run)
    assert all(len(tensors["x"]) == len(tensors["dy"]) == 3 for tensors in seen.values())
    assert_alike(health, expected(seen, weights_of(made)))


def test_bf16_under_autocast():
    made, _ = model(dtype=torch.float32)
    seen = watch(made)
    tokens = tokens_for(made)
    with torch.autocast("cpu", torch.bfloat16):
        health = observe(made, lambda: step(made, tokens))
    assert_alike(health, expected(seen, weights_of(made)))


@pytest.mark.parametrize("wgrad", ["fp8", "fp8_block"])
def test_a_fused_step_is_as_an_unfused_one(wgrad):
    fused, _ = model("auto", recipe=Recipe(wgrad=wgrad))
    plain, _ = model(recipe=Recipe(wgrad=wgrad))
    seen = watch(plain)
    tokens = tokens_for(plain)
    step(plain, tokens)
    health = observe(fused, lambda: step(fused, tokens))
    # Where a last bit sends a value to the neighbouring e4m3 number.
    assert_alike(health, expected(seen, weights_of(plain)), rel=5e-3, shares=2e-3, least=False)


@pytest.mark.parametrize("kind", ["normal", "nonfinite", "zero_blocks"])
def test_producers_are_measured_by_what_they_never_write(kind):
    """Each producer's result multiplied by a linear's weight, and gradients by its transpose."""
    linear = BlockwiseFP8Linear(272, 144, bias=False)
    w = linear.weight.detach()
    gate, up, dh = (draw(kind, 129, 272, torch.bfloat16) for _ in range(3))
    norm_weight = torch.randn(272, dtype=torch.bfloat16)
    rstd = reference.rms_norm_rstd(gate, 1e-5)
    makes = {
        "rms_norm": (
            lambda: ops.rms_norm_quantize_1x128(gate, norm_weight, 1e-5, "both")[:2],
            reference.rms_norm(gate, rstd, norm_weight),
        ),
        "rms_norm, rstd given": (
            lambda: ops.rms_norm_quantize_1x128(gate, norm_weight, 1e-5, "rows", rstd=rstd)[:2],
            reference.rms_norm(gate, rstd, norm_weight),
        ),
        "swiglu, inputs kept": (lambda: ops.swiglu_quantize_1x128_with_inputs(gate, up)[0], reference.swiglu(gate, up)),
        "swiglu": (lambda: ops.swiglu_quantize_1x128(gate, up, "rows"), reference.swiglu(gate, up)),
    }
    for make, source in makes.values():
        health = observe(linear, lambda make=make: ops.gemm_1x128_128x128(*make(), *ops.quantize_128x128(w)))
        assert_alike(health, {"": {"w": in_blocks(w), "x": in_rows(source)}})
    back = BlockwiseFP8Linear(144, 272, bias=False)
    both = nn.ModuleDict({"gate": back, "up": copy.deepcopy(back)})

    _, (gate_q, gate_dq), (up_q, up_dq) = ops.swiglu_quantize_1x128_with_inputs(gate, up)
    kept = [reference.dequantize_1x128(q, dq) for q, dq in ((gate_q, gate_dq), (up_q, up_dq))]
    w_health = in_blocks(back.weight.detach())
    for inputs, options, values in (
        ((gate, up), {}, (gate, up)),
        ((gate_q, up_q), {"gate_dq": gate_dq, "up_dq": up_dq}, kept),
    ):

        def run(inputs=inputs, options=options):
            quantized = ops.swiglu_backward_quantize_1x128_both(dh, *inputs, **options)
            for linear, (q, dq, *_) in zip(both.values(), quantized, strict=True):
                _, w_dq, wt_q = ops.quantize_128x128_both(linear.weight.detach())
                ops.gemm_1x128_128x128(q, dq, wt_q, w_dq.t())

        gradients = dict(zip(both, reference.swiglu_backward(dh, *values), strict=True))
        assert_alike(observe(both, run), {n: {"w": w_health, "dy": in_rows(dy)} for n, dy in gradients.items()})


@pytest.mark.parametrize(
    "fuse, swiglu_inputs, ac_save, wgrad",
    [
        ("off", "bf16", "none", "fp8"),
        ("auto", "bf16", "none", "fp8"),
        ("auto", "fp8", "gemm", "fp8"),
        ("auto", "fp8", "gemm", "fp8_block"),
    ],
)
@pytest.mark.parametrize("mode", ["checkpointed", "compiled", "compiled and checkpointed"])
def test_compiled_and_recomputed_steps_are_as_eager_ones(fuse, swiglu_inputs, ac_save, wgrad, mode):
    torch._dynamo.reset()
    options = {"layers": 2, "swiglu_inputs": swiglu_inputs, "recipe": Recipe(wgrad=wgrad)}
    eager, _ = model(fuse, **options)
    tokens = tokens_for(eager)
    truth = observed(eager, lambda: step(eager, tokens))._tallies
    other, report = model(fuse, **options)
    prepare_for_checkpointing(other, report, ac_save, columns_apart=mode == "compiled and checkpointed")
    for name, block in list(other.layers.named_children()):
        if "checkpointed" in mode:
            block = checkpoint_wrapper(block, preserve_rng_state=False)
        if "compiled" in mode:
            block = torch.compile(block, fullgraph=True, backend="aot_eager")
        other.layers.register_module(name, block)
    step(other, tokens)
    # The second step runs what the first compiled: observed or not, it is the same code.
    with torch._dynamo.config.patch(error_on_recompile=True):
        tallies = observed(other, lambda: step(other, tokens))._tallies
        assert library._observer is None
        step(other, tokens)
    assert len(truth) == 14 * 3 and tallies.keys() == truth.keys()
    # Sums, not ratios: of these, what is counted twice shows.
    for key, tally in truth.items():
        assert torch.allclose(tallies[key], tally, rtol=1e-9, atol=0), key


def test_an_input_without_a_gradient_has_no_dy_and_frozen_weights_have_all():
    first, second = BlockwiseFP8Linear(144, 272), BlockwiseFP8Linear(272, 144)
    second.requires_grad_(False)
    both = nn.Sequential(first, second)
    health = observe(both, lambda: both(torch.randn(3, 5, 144)).sum().backward())
    assert {name: set(tensors) for name, tensors in health.items()} == {"0": {"x", "w"}, "1": {"x", "w", "dy"}}
    assert observe(both, lambda: both(torch.randn(0, 144)).sum().backward()).keys() == {"0", "1"}


def test_nothing_is_observed_afterwards_and_numbers_stay_what_they_were():
    made, _ = model("auto")
    tokens = tokens_for(made)
    truth = step(made, tokens)
    values = {}
    observe(made, lambda: values.update(step(made, tokens)))
    assert all(torch.equal(truth[name], values[name]) for name in truth)
    observation = Observation(lambda: [made])
    step(made, tokens)
    assert observation.collect() == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("layers.0")])
def test_a_step_goes_on_where_measuring_fails(monkeypatch, error):
    made, _ = model("auto")
    tokens = tokens_for(made)
    truth = step(made, tokens)

    def fail(*args):
        raise error

    monkeypatch.setattr("blockfp8_titan.health.tallies_of", fail)
    values = {}
    observation = observed(made, lambda: values.update(step(made, tokens)))
    assert all(torch.equal(truth[name], values[name]) for name in truth)
    with pytest.raises(ObservationFailed, match=f"because of rank 0: {type(error).__name__}: "):
        observation.collect()


def test_under_fsdp2():
    outcomes = outcomes_of("tests.sharded_health")
    errors = [f"{name}: {outcome['error']}" for name, outcome in outcomes.items() if "error" in outcome]
    assert len(outcomes) == 7 and not errors, "\n".join(errors)


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", ["off", "auto"])
def test_compiled_blocks_on_a_gpu(fuse):
    torch._dynamo.reset()
    eager = model_of(layers=2, device="cuda")
    convert_model(eager, fuse=fuse)
    tokens = tokens_for(eager)
    truth = observe(eager, lambda: step(eager, tokens))
    compiled = copy.deepcopy(eager)
    for name, block in compiled.layers.named_children():
        compiled.layers.register_module(name, torch.compile(block, fullgraph=True))
    health = observe(compiled, lambda: step(compiled, tokens))
    # Inductor keeps intermediate results in fp32 that eager rounds to bf16.
    assert len(truth) == 14 and all(len(tensors) == 3 for tensors in truth.values())
    assert_alike(health, truth, rel=0.05, shares=0.02, least=False)
    if fuse == "off":
        seen = watch(eager)
        health = observe(eager, lambda: step(eager, tokens))
        assert_alike(health, expected(seen, weights_of(eager)), rel=1e-3, shares=1e-6)
