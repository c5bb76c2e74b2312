"""Activation checkpointing of converted models: what is recomputed, what is kept, and which op quantises where."""

import pytest
import torch
from torchtitan.config import JobConfig
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from blockfp8_titan import BlockwiseFP8Linear, Recipe, Rule, convert_model, ops
from blockfp8_titan.checkpointing import checkpointing_note, prepare_for_checkpointing, recomputed_outputs
from blockfp8_titan.conversion import plan_conversion
from blockfp8_titan.plan import build_on_meta
from blockfp8_titan.weight import GatheredFP8Weight

from .data import DEVICES
from .llama import (
    CountOps,
    compile_blocks,
    graph_calls,
    graph_outputs,
    model_of,
    names_as_eager,
    saved_bytes,
    step,
    tokens_for,
)

SAVED = (
    _op_sac_save_list
    | {torch.ops.blockfp8.gemm_1x128_128x128.default, torch.ops.blockfp8.gated_feed_forward.default}
    # The CPU's attention, which torchtitan's list does not know.
    | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
)
KEEPING = "gemm_1x128_128x128"
RECOMPUTED = "gemm_1x128_128x128.recomputed"


def converted(
    ac_save="gemm",
    *,
    mode="op",
    columns_apart=False,
    layers=1,
    dtype=torch.float32,
    swiglu_inputs="bf16",
    wgrad="fp8",
    device="cpu",
):
    """A converted model under torchtitan's checkpointing."""
    model = model_of(layers=layers, dtype=dtype, device=device)
    report = convert_model(model, recipe=Recipe(wgrad=wgrad), swiglu_inputs=swiglu_inputs)
    prepare_for_checkpointing(model, report, ac_save, columns_apart=columns_apart)
    checkpoint(model, mode)
    return model


def checkpoint(model, mode):
    """Torchtitan's checkpointing: "op", "full", "none", or "1", of every layer as if of every second."""
    if mode != "none":
        options = {"mode": "full"} if mode == "full" else {"mode": "selective", "selective_ac_option": mode}
        apply_ac(model, ActivationCheckpoint(**options, early_stop=True), op_sac_save_list=SAVED)


def plan(flavor="8B", name="llama3", rules=(), swiglu_inputs="bf16"):
    job = JobConfig()
    job.model.name, job.model.flavor = name, flavor
    return plan_conversion(build_on_meta(job), rules, swiglu_inputs=swiglu_inputs)


def names(rows, block="layers.0."):
    return [row.fqn.split(".")[-1] for row in rows if row.fqn.startswith(block)]


# Which


@pytest.mark.parametrize("swiglu_inputs", ["bf16", "fp8"])
def test_balanced_keeps_fewer_bytes_than_every_second_product_in_bf16(swiglu_inputs):
    report = plan(swiglu_inputs=swiglu_inputs)
    recomputed = names(recomputed_outputs(report, "balanced"))
    assert recomputed == {"bf16": ["wq", "wo", "w1"], "fp8": ["wq", "wo"]}[swiglu_inputs]
    features = {row.fqn.split(".")[-1]: row.shape[0] for row in report.rows[:7]}
    in_order = ["wq", "wk", "wv", "wo", "w1", "w3", "w2"]  # as they are called; torchtitan keeps the first, third, ...
    of_bf16 = sum(2 * features[n] for n in in_order[::2])
    kept = sum(2 * features[n] for n in in_order if n not in recomputed)
    if swiglu_inputs == "fp8":
        kept -= (features["w1"] + features["w3"]) * (1 - 4 / 128)
    assert 0.8 * of_bf16 < kept < 0.95 * of_bf16
    assert len(recomputed_outputs(report, "balanced")) == len(recomputed) * 32


def test_what_is_not_fused_keeps_no_inputs_of_swiglu_in_fp8():
    report = plan(swiglu_inputs="fp8")
    assert recomputed_outputs(report, "gemm") == [] and len(recomputed_outputs(report, "none")) == 224
    unfused = plan(swiglu_inputs="fp8", rules=(Rule("*.w2", "skip"),))
    assert names(recomputed_outputs(unfused, "balanced")) == ["wq", "wo", "w1"]


def test_what_a_feed_forward_keeps_in_fp8_is_kept_where_attention_stays_in_bf16():
    report = plan(swiglu_inputs="fp8", rules=(Rule("*.attention.*", "skip"),))
    assert recomputed_outputs(report, "balanced") == []


def test_all_and_none():
    report = plan()
    assert recomputed_outputs(report, "gemm") == []
    assert len(recomputed_outputs(report, "none")) == 224


@pytest.mark.parametrize(
    "name, flavor, rules",
    [
        ("qwen3", "0.6B", ()),
        ("llama4", "debugmodel", ()),
        ("deepseek_v3", "debugmodel", ()),
        ("llama3", "8B", (Rule("*.w[kv]", "skip"),)),
        ("llama3", "8B", (Rule("*.feed_forward.*", "skip"),)),
        ("llama3", "70B", ()),
    ],
)
def test_balanced_keeps_at_most_seven_sixteenths_and_nearly_that(name, flavor, rules):
    report = plan(flavor, name, rules)
    recomputed = recomputed_outputs(report, "balanced")
    down = {fusion.linears[-1] for fusion in report.fusions if fusion.kind == "feed_forward"}
    for block in {row.fqn.split(".")[1] for row in report.rows if row.in_fp8}:
        inside = f"layers.{block}."
        counted = [row for row in report.rows if row.in_fp8 and row.fqn.startswith(inside) and row.fqn not in down]
        everything = sum(row.shape[0] for row in counted)
        again = sum(row.shape[0] for row in recomputed if row.fqn.startswith(inside))
        assert everything * 9 / 16 <= again <= everything * 0.75
    assert not any(row.fqn in down for row in recomputed)


def test_linears_outside_of_blocks_and_weights_outside_of_fp8_are_left_alone():
    report = plan(rules=(Rule("output"), Rule("*.w3", "skip")))
    recomputed = recomputed_outputs(report, "balanced")
    assert names(recomputed) == ["w1"]
    assert "output" not in {row.fqn for row in recomputed}


def test_the_note_says_it():
    assert checkpointing_note(plan(), "balanced") == (
        'ac_save = "balanced": of the Linears in fp8, selective checkpointing recomputes the outputs of '
        "layers.{0-31}.attention.wq, layers.{0-31}.attention.wo, layers.{0-31}.feed_forward.w1"
    )
    assert checkpointing_note(plan(), "gemm").endswith("recomputes the outputs of none")


def test_a_copy_of_a_prepared_model_and_its_linears_agree():
    model = converted("balanced", mode="none")
    outputs = {
        fqn.split(".")[-1]: module.recomputation.output
        for fqn, module in model.named_modules()
        if isinstance(module, BlockwiseFP8Linear)
    }
    assert sum(outputs.values()) == 4 and outputs["w1"] and not outputs["w3"] and not outputs["w2"]


# Eager


@pytest.mark.parametrize(
    "mode, ac_save, again", [("op", "gemm", 0), ("op", "balanced", 4), ("op", "none", 7), ("full", "gemm", 7)]
)
def test_eager(mode, ac_save, again):
    """Recomputation changes no number, and multiplies again what ac_save says; w2 too, whose output nobody needs again."""
    model = converted(ac_save, mode=mode)
    tokens = tokens_for(model)
    truth = step(converted(mode="none"), tokens)
    with CountOps() as count:
        values = step(model, tokens)
    values = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in values.items()}
    assert all(torch.equal(truth[name], values[name]) for name in truth)
    assert count.gemms == 21 + 3 + again  # 3 of the output, in bf16
    assert bool(count.calls[RECOMPUTED]) == (ac_save != "gemm")


@pytest.mark.parametrize("ac_save, again", [("gemm", 0), ("balanced", 3), ("none", 7)])
def test_eager_with_inputs_of_swiglu_in_fp8(ac_save, again):
    """The feed-forward is one op, which is not called again; where nothing is kept, nothing is rounded to be kept."""
    model = converted(ac_save, swiglu_inputs="fp8")
    tokens = tokens_for(model)
    truth = step(converted(mode="none", swiglu_inputs="bf16" if ac_save == "none" else "fp8"), tokens)
    with CountOps() as count:
        values = step(model, tokens)
    values = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in values.items()}
    assert all(torch.equal(truth[name], values[name]) for name in truth)
    assert count.calls["gated_feed_forward"] == (ac_save != "none")
    assert count.gemms + 3 * count.calls["gated_feed_forward"] == 21 + 3 + again


# Compiled


def compiled_step(*args, **options):
    model = converted(*args, dtype=torch.bfloat16, **options)
    graphs = compile_blocks(model)
    tokens = tokens_for(model, sequences=1, length=256)
    values = names_as_eager(step(model, tokens))
    assert all(value.isfinite().all() for value in values.values())
    return graphs


QUANTISING = ("rms_norm_quantize_1x128", "swiglu_quantize_1x128", "quantize_1x128")


@pytest.mark.parametrize(
    "wgrad, columns", [("fp8", "quantize_1x128_columns"), ("fp8_block", "quantize_128x128_columns")]
)
def test_a_compiled_checkpoint_quantises_rows_in_forward_and_columns_in_backward(wgrad, columns):
    forward, backward = map(graph_calls, compiled_step("gemm", columns_apart=True, wgrad=wgrad))
    quantising = (*QUANTISING, columns)
    assert [forward.calls[name] for name in quantising] == [2, 1, 1, 0]
    assert [backward.calls[name] for name in quantising] == [2, 0, 0, 1]  # h's columns come with SwiGLU's gradients
    assert (forward.gemms, backward.gemms) == (7, 14)


def test_without_that_each_would_make_both():
    forward, backward = map(graph_calls, compiled_step("gemm"))
    assert forward.calls["quantize_1x128_both"] == 1
    assert backward.calls["quantize_1x128_both"] == 1 + 5  # of wo's input, and of five gradients


def test_a_compiled_block_without_checkpoint_quantises_once_into_both():
    forward, backward = map(graph_calls, compiled_step("gemm", mode="none"))
    assert [forward.calls[name] for name in QUANTISING] == [2, 1, 0] and forward.calls["quantize_1x128_both"] == 1
    assert [backward.calls[name] for name in QUANTISING] == [0, 0, 0] and backward.calls["quantize_1x128_both"] == 5


@pytest.mark.parametrize("ac_save, again", [("gemm", 0), ("balanced", 4), ("none", 6)])
def test_what_a_compiled_checkpoint_keeps(ac_save, again):
    forward, backward = compiled_step(ac_save, columns_apart=True)
    calls = graph_calls(backward)
    assert calls.gemms == 14 + again
    # Columns of both norms, and rows of those whose linears are recomputed.
    assert calls.calls["rms_norm_quantize_1x128"] == (2 if ac_save == "gemm" else 4)
    M, K, N = 256, 256, 768
    # The block's result; attention's result and its log-sum-exp; and outputs of GEMMs: all but w2's are 4 K + 2 N.
    outputs = graph_outputs(forward)
    kept = sum(value.nbytes for value in outputs if value.dtype == torch.bfloat16) - 2 * 2 * M * K
    assert kept == {"gemm": 2 * M * (4 * K + 2 * N), "balanced": 2 * M * (K + N), "none": 0}[ac_save]
    assert not any(value.dtype == torch.float8_e4m3fn for value in outputs)


@pytest.mark.parametrize("ac_save, again", [("gemm", 0), ("balanced", 3), ("none", 6)])
def test_what_a_compiled_checkpoint_keeps_with_inputs_of_swiglu_in_fp8(ac_save, again):
    forward, backward = compiled_step(ac_save, columns_apart=True, swiglu_inputs="fp8")
    calls = graph_calls(backward)
    assert calls.gemms == 14 + again
    assert (
        graph_calls(forward).calls["gated_feed_forward"] == (ac_save != "none")
        and not calls.calls["gated_feed_forward"]
    )
    M, K, N = 256, 256, 768
    outputs = graph_outputs(forward)
    kept = sum(value.nbytes for value in outputs if value.dtype == torch.bfloat16) - 2 * 2 * M * K
    assert kept == {"gemm": 2 * M * 4 * K, "balanced": 2 * M * K, "none": 0}[ac_save]
    payloads = [value.nbytes for value in outputs if value.dtype == torch.float8_e4m3fn]
    assert payloads == ([] if ac_save == "none" else [M * N] * 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode, wgrad", [("full", "fp8"), ("full", "fp8_block"), ("full", "bf16"), ("1", "fp8")])
def test_a_compiled_checkpoint_of_a_whole_block_keeps_its_input_alone(device, mode, wgrad):
    ac_save = "none" if mode == "full" else "gemm"
    model = converted(ac_save, mode=mode, columns_apart=True, dtype=torch.bfloat16, wgrad=wgrad, device=device)
    compile_blocks(model)
    M, K = 512, 256
    x = torch.randn(1, M, K, dtype=torch.bfloat16, device=device, requires_grad=True)
    own = [x, model.freqs_cis, *model.parameters()]
    kept = saved_bytes(lambda: model.layers["0"](x, model.freqs_cis, None), without=own)
    assert kept < M * K / 4  # the state of a random number generator; the least activation in fp8, a key, is M K / 2


@pytest.mark.parametrize("mode", ["op", "full", "none"])
def test_weights_gathered_in_fp8_are_transposed_in_backward(mode):
    """FSDP2 frees what it gathered after forward; a transpose that forward makes for backward would stay, a byte per element."""
    # Of these sizes, the partitioner took two of the seven transposes into forward.
    model = model_of(layers=1, dtype=torch.bfloat16, dim=1024, n_heads=8, n_kv_heads=2)
    report = convert_model(model)
    prepare_for_checkpointing(model, report, "none" if mode == "full" else "balanced", columns_apart=mode != "none")
    for linear in model.modules():
        if isinstance(linear, BlockwiseFP8Linear):
            w_q, w_dq = ops.quantize_128x128(linear.weight.detach())
            linear.weight = torch.nn.Parameter(GatheredFP8Weight(w_q, w_dq, torch.bfloat16))
    checkpoint(model, mode)
    graphs = compile_blocks(model)
    step(model, tokens_for(model, sequences=1, length=256))
    forward, backward = map(graph_calls, graphs)
    assert (forward.calls["transpose_fp8"], backward.calls["transpose_fp8"]) == (0, 7)


def test_another_choice_is_refused():
    model = model_of()
    report = convert_model(model)
    with pytest.raises(ValueError, match="ac_save = 'all': must be one of 'gemm', 'balanced', 'none'"):
        prepare_for_checkpointing(model, report, "all")
