"""blockfp8_titan.fusion: which modules quantise what they compute, which do not and why."""

import functools
import json

import pytest
import torch.nn as nn
from torchtitan.config import JobConfig

from blockfp8_titan import Rule, convert_model
from blockfp8_titan.conversion import plan_conversion
from blockfp8_titan.feed_forward import GatedFeedForward
from blockfp8_titan.norm import QuantizingRMSNorm
from blockfp8_titan.plan import build_on_meta


def debug_model(name="llama3"):
    job = JobConfig()
    job.model.name, job.model.flavor = name, "debugmodel"
    return build_on_meta(job)


def fused_names(report):
    return {fusion.fqn for fusion in report.fusions if fusion.fused}


def reasons(report):
    return {fusion.fqn: fusion.reason for fusion in report.fusions if not fusion.fused}


BLOCK = ("attention_norm", "ffn_norm", "feed_forward")
EXPERTS = ("attention_norm", "moe.shared_experts")
NO_FEED_FORWARD = "its block has no feed_forward"


@pytest.mark.parametrize(
    "name, dense, sparse",
    [
        ("llama3", range(6), ()),
        ("qwen3", range(8), ()),
        ("llama4", (0, 2, 4), (1, 3, 5)),
        ("deepseek_v3", (0,), (1, 2, 3, 4, 5)),
    ],
)
def test_torchtitans_models(name, dense, sparse):
    model = debug_model(name)
    before = list(model.state_dict())
    classes = {fqn: type(module) for fqn, module in model.named_modules()}
    report = convert_model(model)
    expected = {f"layers.{i}.{member}" for i in dense for member in BLOCK}
    expected |= {f"layers.{i}.{member}" for i in sparse for member in EXPERTS}
    assert fused_names(report) == expected
    assert reasons(report) == {f"layers.{i}.ffn_norm": NO_FEED_FORWARD for i in sparse}
    for fqn, module in model.named_modules():
        is_fused = isinstance(module, (QuantizingRMSNorm, GatedFeedForward))
        assert is_fused == (fqn in expected)
        assert isinstance(module, classes[fqn])
    assert list(model.state_dict()) == before
    by_name = {fusion.fqn: fusion.linears for fusion in report.fusions}
    queries = ("wq", "wkv_a") if name == "deepseek_v3" else ("wq", "wk", "wv")
    assert by_name["layers.0.attention_norm"] == tuple(f"layers.0.attention.{n}" for n in queries)
    assert by_name["layers.0.ffn_norm"] == ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3")


def test_a_plan_says_what_the_conversion_will_do_and_changes_nothing():
    model = debug_model()
    plan = plan_conversion(model)
    assert not any(isinstance(module, (QuantizingRMSNorm, GatedFeedForward)) for module in model.modules())
    assert convert_model(model) == plan


def test_off_fuses_nothing_and_a_bad_choice_is_refused():
    model = debug_model()
    report = convert_model(model, fuse="off")
    assert not fused_names(report) and set(reasons(report).values()) == {'fuse = "off"'}
    assert not any(isinstance(module, (QuantizingRMSNorm, GatedFeedForward)) for module in model.modules())
    with pytest.raises(ValueError, match=r"fuse = 'yes': must be one of 'auto', 'off'"):
        convert_model(debug_model(), fuse="yes")
    with pytest.raises(ValueError, match=r"swiglu_inputs = 'int8': must be one of 'bf16', 'fp8'"):
        convert_model(debug_model(), swiglu_inputs="int8")


@pytest.mark.parametrize(
    "rule, unfused",
    [
        (Rule("layers.0.attention.wv", "skip"), {"attention_norm": "wv is not in fp8"}),
        (Rule("layers.0.attention.wo", wgrad="bf16"), {}),
        (
            Rule("layers.0.attention.*", scale_format="pow2"),
            {},
        ),
        (
            Rule("layers.0.attention.wk", scale_format="pow2"),
            {"attention_norm": "wk wants its input quantised in another way than wq"},
        ),
        (
            Rule("layers.0.attention.wq", gemm_backend="reference"),
            {"attention_norm": "wk wants its input quantised in another way than wq"},
        ),
        (Rule("layers.0.feed_forward.w2", "skip"), {"feed_forward": "w2 is not in fp8"}),
        (Rule("layers.0.feed_forward.w2", wgrad="bf16"), {"feed_forward": "w2 has wgrad = 'bf16'"}),
        (
            Rule("layers.0.feed_forward.w1", wgrad="bf16"),
            {"ffn_norm": "w1 has wgrad = 'bf16'", "feed_forward": "w1 has wgrad = 'bf16'"},
        ),
        (Rule("layers.0.*", wgrad="fp8_block"), {}),
        (
            Rule("layers.0.feed_forward.w3", wgrad="fp8_block"),
            {
                "ffn_norm": "w3 wants its input quantised in another way than w1",
                "feed_forward": "w1 and w3 have different recipes",
            },
        ),
        (
            Rule("layers.0.feed_forward.w2", wgrad="fp8_block"),
            {"feed_forward": "w2 quantises in another way than w1 and w3"},
        ),
        (
            Rule("layers.0.feed_forward.w2", scale_format="pow2"),
            {"feed_forward": "w2 quantises in another way than w1 and w3"},
        ),
        (
            Rule("layers.0.feed_forward.w3", scale_format="pow2"),
            {
                "ffn_norm": "w3 wants its input quantised in another way than w1",
                "feed_forward": "w1 and w3 have different recipes",
            },
        ),
    ],
)
def test_rules_decide_what_can_be_fused(rule, unfused):
    report = convert_model(debug_model(), [rule])
    assert reasons(report) == {f"layers.0.{name}": reason for name, reason in unfused.items()}


def with_hook(module):
    module.register_forward_hook(lambda *args: None)


class OwnNorm(nn.RMSNorm):
    pass


def unusual(model, what):
    block = model.layers["0"]
    if what == "hook on a norm":
        with_hook(block.attention_norm)
    elif what == "hook on attention":
        with_hook(block.attention)
    elif what == "hook on w3":
        with_hook(block.feed_forward.w3)
    elif what == "hook on wq":
        with_hook(block.attention.wq)
    elif what == "own forward of w1":
        block.feed_forward.w1.forward = block.feed_forward.w1.forward
    elif what == "own norm":
        block.ffn_norm = OwnNorm(256, eps=1e-5)
    elif what == "no weight":
        block.attention_norm = nn.RMSNorm(256, eps=1e-5, elementwise_affine=False)
    elif what == "no eps":
        block.attention_norm = nn.RMSNorm(256)
    elif what == "shared norm":
        model.layers["1"].ffn_norm = block.attention_norm
    elif what == "frozen":
        for linear in (block.attention.wq, block.attention.wk, block.attention.wv):
            linear.weight.requires_grad_(False)
    elif what == "bias":
        block.feed_forward.w1 = nn.Linear(256, 768)
    elif what == "own forward":
        block.feed_forward.forward = block.feed_forward.forward
    elif what == "own block":
        block.forward = block.forward
    else:
        assert what == "own attention", what
        block.attention = type("Attention", (type(block.attention),), {})(model.model_args)


@pytest.mark.parametrize(
    "what, unfused",
    [
        ("hook on a norm", {"layers.0.attention_norm": "it has hooks"}),
        ("hook on attention", {"layers.0.attention_norm": "attention has hooks"}),
        ("hook on w3", dict.fromkeys(("layers.0.ffn_norm", "layers.0.feed_forward"), "w3 has hooks")),
        ("hook on wq", {"layers.0.attention_norm": "wq has hooks"}),
        (
            "own forward of w1",
            dict.fromkeys(("layers.0.ffn_norm", "layers.0.feed_forward"), "w1 has a forward of its own"),
        ),
        ("own norm", {"layers.0.ffn_norm": "a OwnNorm, not an nn.RMSNorm"}),
        ("no weight", {"layers.0.attention_norm": "it has no weight"}),
        ("no eps", {"layers.0.attention_norm": "its eps depends on its input's dtype"}),
        (
            "shared norm",
            dict.fromkeys(("layers.0.attention_norm", "layers.1.ffn_norm"), "the model holds it under two names"),
        ),
        ("frozen", {"layers.0.attention_norm": "wq, wk, wv are frozen"}),
        ("bias", {"layers.0.feed_forward": "w1 has a bias"}),
        (
            "own forward",
            {
                "layers.0.ffn_norm": "feed_forward has a forward of its own",
                "layers.0.feed_forward": "it has a forward of its own",
            },
        ),
        ("own attention", {"layers.0.attention_norm": "attention is an unknown Attention"}),
        (
            "own block",
            dict.fromkeys(("layers.0.attention_norm", "layers.0.ffn_norm"), "its block has a forward of its own"),
        ),
    ],
)
def test_what_is_unusual_is_left_alone(what, unfused):
    model = debug_model()
    unusual(model, what)
    report = convert_model(model)
    assert reasons(report) == unfused
    assert not any(isinstance(model.get_submodule(fqn), (QuantizingRMSNorm, GatedFeedForward)) for fqn in unfused)


@pytest.mark.parametrize(
    "member, unfused",
    [
        (
            "feed_forward",
            {"ffn_norm": "feed_forward has a forward of its own", "feed_forward": "it has a forward of its own"},
        ),
        ("attention", {"attention_norm": "attention has a forward of its own"}),
        ("", dict.fromkeys(("attention_norm", "ffn_norm"), "its block has a forward of its own")),
        ("attention_norm", dict.fromkeys(("attention_norm", "ffn_norm"), "it has a forward of its own")),
    ],
)
def test_a_forward_put_into_a_class_is_not_fused_away(member, unfused, monkeypatch):
    model = debug_model()
    changed = type(model.get_submodule(".".join(filter(None, ("layers.0", member)))))
    original = changed.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    monkeypatch.setattr(changed, "forward", forward)
    report = convert_model(model)
    assert reasons(report) == {f"layers.{i}.{name}": reason for i in range(6) for name, reason in unfused.items()}


def test_models_of_another_shape_convert_their_linears():
    report = convert_model(nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(32, 32) for _ in range(2))}))
    assert report.fusions == () and report.totals()["linears_in_fp8"] == 2


def test_the_report_says_it():
    report = plan_conversion(debug_model(), [Rule("layers.[45].feed_forward.w2", "skip")])
    lines = report.to_table().splitlines()
    assert max(map(len, lines)) <= 120
    assert "fused: layers.{0-5}.attention_norm quantises for wq, wk, wv" in lines
    assert "fused: layers.{0-5}.ffn_norm quantises for w1, w3" in lines
    assert any(line.startswith("fused: layers.{0-3}.feed_forward quantises silu(w1(x)) * w3(x)") for line in lines)
    assert "not fused: layers.{4-5}.feed_forward: w2 is not in fp8" in lines
    found = json.loads(report.to_json())["fusions"]
    assert len(found) == 18
    assert found[-1] == {
        "fqn": "layers.5.feed_forward",
        "kind": "feed_forward",
        "linears": [f"layers.5.feed_forward.{name}" for name in ("w1", "w3", "w2")],
        "fused": False,
        "reason": "w2 is not in fp8",
        "swiglu_inputs": None,
    }
    assert found[2]["swiglu_inputs"] == "bf16" and found[0]["swiglu_inputs"] is None
