"""blockfp8_titan.conversion: the swap and its report, on plain modules."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune

from blockfp8_titan.conversion import ConversionReport, convert_model, gather_weights_in_fp8, plan_conversion
from blockfp8_titan.linear import BlockwiseFP8Linear
from blockfp8_titan.recipe import Recipe
from blockfp8_titan.rules import Rule

REFERENCE = Recipe(gemm_backend="reference")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(32, 64, bias=False)
        self.wo = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.wo(nn.functional.gelu(self.wq(x)))


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.output = nn.Linear(32, 48, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def fp8_names(model):
    return [fqn for fqn, module in model.named_modules() if isinstance(module, BlockwiseFP8Linear)]


def test_the_blocks_are_converted_and_nothing_else(model):
    before = dict(model.named_parameters())
    report = convert_model(model, recipe=REFERENCE)
    assert fp8_names(model) == [f"layers.{i}.{name}" for i in range(3) for name in ("wq", "wo")]
    assert [row.fqn for row in report.rows if row.action == "convert"] == fp8_names(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert all(model.get_submodule(name).recipe == REFERENCE for name in fp8_names(model))


def test_the_converted_model_computes_nearly_the_same_and_trains(model):
    tokens = torch.arange(48).view(2, 24)
    twin = copy.deepcopy(model)
    convert_model(model, recipe=REFERENCE)
    with torch.no_grad():
        exact, quantised = twin(tokens), model(tokens)
    error = (exact - quantised).norm() / exact.norm()
    assert 0 < error < 0.05
    model(tokens).square().mean().backward()
    twin(tokens).square().mean().backward()
    for name, parameter in model.named_parameters():
        exact_gradient = twin.get_parameter(name).grad
        assert (parameter.grad - exact_gradient).norm() < 0.1 * exact_gradient.norm(), name


def test_rules_as_dicts_choose_layers_and_recipes(model):
    rules = [
        {"match": "layers.0.*", "action": "skip", "reason": "first layer"},
        Rule("*.wo", wgrad="bf16"),
        {"match": "output"},
    ]
    report = convert_model(model, rules, recipe=REFERENCE)
    assert fp8_names(model) == ["layers.1.wq", "layers.1.wo", "layers.2.wq", "layers.2.wo", "output"]
    assert model.layers[1].wo.recipe == Recipe("reference", "bf16")
    assert model.layers[1].wq.recipe == REFERENCE
    rows = {row.fqn: row for row in report.rows}
    assert (rows["layers.0.wo"].rule, rows["layers.0.wo"].reason) == ("rule 1", "first layer")
    assert rows["layers.1.wo"].rule == "rule 2"
    assert rows["layers.1.wq"].rule == "default"
    assert rows["output"].rule == "rule 3"


def test_a_plan_changes_nothing_and_says_what_conversion_will_do(model):
    plan = plan_conversion(model, [{"match": "*.wq"}])
    assert fp8_names(model) == []
    assert convert_model(model, [{"match": "*.wq"}]) == plan


def test_shares_and_totals(model):
    report = plan_conversion(model)
    linear = 3 * 2 * 32 * 64 + 32 * 48
    parameters = linear + 3 * 32 + 48 * 32
    assert report.rows[1].parameters == 32 * 64 + 32
    assert report.rows[1].parameter_share == pytest.approx((32 * 64 + 32) / parameters)
    assert report.rows[-1].flop_share == pytest.approx(32 * 48 / linear)
    totals = report.totals()
    assert (totals["linears"], totals["linears_in_fp8"], totals["model_parameters"]) == (7, 6, parameters)
    assert totals["flop_share_in_fp8"] == pytest.approx(1 - 32 * 48 / linear)
    assert totals["parameter_share_in_fp8"] == pytest.approx((3 * 2 * 32 * 64 + 3 * 32) / parameters)


def test_a_module_with_two_names_is_converted_once_and_stays_shared(model):
    model.layers[2].wq = model.layers[0].wq
    report = convert_model(model, recipe=REFERENCE)
    assert model.layers[2].wq is model.layers[0].wq
    assert isinstance(model.layers[0].wq, BlockwiseFP8Linear)
    assert len(report.rows) == 6
    assert (report.rows[0].fqn, report.rows[0].aliases) == ("layers.0.wq", ("layers.2.wq",))
    assert sum(row.flop_share for row in report.rows) == pytest.approx(1)


def test_a_module_twice_in_one_parent_is_swapped_at_both_names(model):
    model.layers[0].again = model.layers[0].wq
    convert_model(model, recipe=REFERENCE)
    assert model.layers[0].again is model.layers[0].wq
    assert isinstance(model.layers[0].again, BlockwiseFP8Linear)


def test_two_names_with_different_decisions_are_refused(model):
    model.layers[2].wq = model.layers[0].wq
    with pytest.raises(ValueError, match=r"layers\.0\.wq and layers\.2\.wq are one module, .* skip by rule 1"):
        convert_model(model, [{"match": "layers.2.*", "action": "skip"}])
    assert fp8_names(model) == []


def test_tied_weights_stay_tied_and_count_once(model):
    model.output.weight = model.embedding.weight
    report = convert_model(model, [{"match": "*"}], recipe=REFERENCE)
    assert isinstance(model.output, BlockwiseFP8Linear)
    assert model.output.weight is model.embedding.weight
    assert report.totals()["parameter_share_in_fp8"] == 1


class OddLinear(nn.Linear):
    pass


def test_subclasses_and_odd_sizes_are_left_alone_whatever_the_rules_say(model):
    model.layers[0].wq = OddLinear(32, 64)
    model.layers[1].wq = nn.Linear(32, 40)
    report = convert_model(model, [{"match": "layers.*"}], recipe=REFERENCE)
    rows = {row.fqn: row for row in report.rows}
    assert type(model.layers[0].wq) is OddLinear
    assert rows["layers.0.wq"].reason == "a OddLinear: only nn.Linear itself is converted"
    assert type(model.layers[1].wq) is nn.Linear
    assert rows["layers.1.wq"].reason == "out_features = 40 is no positive multiple of 16"
    assert {rows["layers.0.wq"].action, rows["layers.1.wq"].action} == {"skip"}


def test_other_dtypes_are_left_alone_whatever_the_rules_say(model):
    model.layers[0].half()
    model.layers[1].wq.double()
    model.layers[2].bfloat16()
    report = convert_model(model, [{"match": "layers.*"}], recipe=REFERENCE)
    assert fp8_names(model) == ["layers.1.wo", "layers.2.wq", "layers.2.wo"]
    rows = {row.fqn: (row.action, row.rule, row.reason) for row in report.rows}
    reason = "weight.dtype = {} is neither torch.bfloat16 nor torch.float32"
    assert rows["layers.0.wo"] == ("skip", "default", reason.format("torch.float16"))
    assert rows["layers.1.wq"] == ("skip", "default", reason.format("torch.float64"))


def test_a_linear_by_itself_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"BlockwiseFP8Linear\.from_linear"):
        convert_model(nn.Linear(32, 32))


def test_a_second_conversion_is_refused(model):
    convert_model(model, [{"match": "layers.1.*", "action": "skip"}])
    before = fp8_names(model)
    with pytest.raises(ValueError, match=r"layers\.0\.wq is a BlockwiseFP8Linear already: convert a model once"):
        convert_model(model)
    assert fp8_names(model) == before


def test_fp8_linears_that_a_rule_leaves_alone_are_listed_as_such(model):
    model.layers[0].wq = BlockwiseFP8Linear(32, 64, recipe=Recipe(scale_format="pow2"))
    report = convert_model(model, [{"match": "layers.0.wq", "action": "skip", "reason": "made by hand"}])
    assert (report.rows[0].action, report.rows[0].recipe) == ("already fp8", Recipe(scale_format="pow2"))
    assert model.layers[0].wq.recipe == Recipe(scale_format="pow2")
    assert report.totals()["linears_in_fp8"] == 6


def test_a_bad_rule_leaves_the_model_as_it_was(model):
    with pytest.raises(
        ValueError, match=r"rule 2 \(match = 'layer\.\*'\) matches no Linear: did you mean one of layers"
    ):
        convert_model(model, [{"match": "layers.*"}, {"match": "layer.*"}])
    assert fp8_names(model) == []


def test_a_failure_while_making_the_twins_leaves_the_model_as_it_was(model, monkeypatch):
    from_linear = BlockwiseFP8Linear.from_linear

    def fail_at_the_last(linear, recipe, fqn):
        if linear is model.layers[2].wo:
            raise ValueError("no")
        return from_linear(linear, recipe, fqn)

    monkeypatch.setattr(BlockwiseFP8Linear, "from_linear", fail_at_the_last)
    with pytest.raises(ValueError, match="no"):
        convert_model(model)
    assert fp8_names(model) == []


def test_a_sharded_model_is_refused(model, monkeypatch):
    # A real DTensor needs a process group; that it is one is all that is asked.
    monkeypatch.setattr("blockfp8_titan.conversion.DTensor", nn.Parameter)
    assert isinstance(model.output.weight, nn.Parameter) and not isinstance(model.output.weight, DTensor)
    with pytest.raises(ValueError, match=r"layers\.0\.wq has a sharded weight .* before FSDP"):
        convert_model(model)


def test_meta_models_convert():
    with torch.device("meta"):
        model = Model()
    convert_model(model)
    assert len(fp8_names(model)) == 6
    assert all(parameter.is_meta for parameter in model.parameters())


def test_nothing_converted_is_warned_of(model):
    report = convert_model(model, [{"match": "*", "action": "skip"}])
    assert report.warnings == ("no Linear is in fp8: the model computes as before",)
    assert "warning: no Linear is in fp8" in report.to_table()


def test_a_model_without_linears_has_an_empty_report():
    report = convert_model(nn.Sequential(nn.ReLU()))
    assert report.rows == ()
    assert "0 of 0 Linears in fp8: 0.0% of linear FLOPs, 0.0% of 0 parameters" in report.to_table()
    assert json.loads(report.to_json())["rows"] == []


def test_the_table_merges_layers_that_are_alike():
    rules = [
        {
            "match": "layers.[01].*",
            "action": "skip",
            "reason": "a reason so long that it cannot stand in one line " * 3,
        },
        {"match": "layers.*.wo", "wgrad": "bf16"},
    ]
    table = plan_conversion(Model(layers=12), rules).with_notes("a remark").to_table()
    lines = table.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["linear", "out", "x", "in", "action", "recipe", "by", "params", "FLOPs", "reason"]
    starts = [line.split("  ")[0] for line in lines[1:] if line.startswith(("layers", "output"))]
    assert starts == [
        "layers.{0-1}.wq ×2",
        "layers.{0-1}.wo ×2",
        "layers.{2-11}.wq ×10",
        "layers.{2-11}.wo ×10",
        "output",
    ]
    assert "64 x 32" in lines[1] and "wgrad=bf16  rule 2" in table
    assert "20 of 25 Linears in fp8: 80.8% of linear FLOPs" in table
    assert lines[-1] == "note: a remark"


def test_the_table_merges_numbers_at_every_depth_exactly():
    experts = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(16, 16) for _ in range(4))}) for _ in range(3)
    )
    model = nn.ModuleDict({"layers": experts})
    rules = [{"match": "layers.1.experts.2", "action": "skip"}]
    names = [line.split("  ")[0] for line in plan_conversion(model, rules).to_table().splitlines()[1:-2]]
    assert names == ["layers.{0,2}.experts.{0-3} ×8", "layers.1.experts.{0-1,3} ×3", "layers.1.experts.2"]


def test_json_has_every_row_in_full(model):
    report = convert_model(model, [{"match": "*.wo", "wgrad": "bf16", "reason": "why"}]).with_notes("a remark")
    content = json.loads(report.to_json())
    assert ConversionReport.from_dict(content) == report
    assert [row["fqn"] for row in content["rows"]] == [row.fqn for row in report.rows]
    assert content["rows"][1] == {
        "fqn": "layers.0.wo",
        "aliases": [],
        "shape": [32, 64],
        "action": "convert",
        "rule": "rule 1",
        "reason": "why",
        "recipe": {"gemm_backend": "auto", "wgrad": "bf16", "scale_format": "fp32"},
        "parameters": 32 * 64 + 32,
        "parameter_share": report.rows[1].parameter_share,
        "flop_share": report.rows[1].flop_share,
    }
    assert content["totals"] == report.totals()
    assert content["notes"] == ["a remark"]


def test_arguments_of_other_types_are_refused_and_leave_the_model_as_it_was(model):
    before = list(model.modules())
    for recipe in ("bf16", None):
        with pytest.raises(ValueError, match=rf"recipe = {recipe!r}: must be a Recipe"):
            convert_model(model, recipe=recipe)
    with pytest.raises(ValueError, match="rules = None: must be a list of rules"):
        convert_model(model, None)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match="model is a NoneType: must be an nn.Module"):
        convert_model(None)


def test_gathers_want_the_report_of_this_models_conversion(model):
    report = convert_model(copy.deepcopy(model))
    with pytest.raises(
        ValueError, match=r"is a Linear, and a Linear in fp8 by the report: pass the report that convert_model returned"
    ):
        gather_weights_in_fp8(model, report)


def test_a_weight_that_is_computed_from_others_is_gathered_as_it_is(model):
    convert = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith("layers")
    ]
    prune.l1_unstructured(model.get_submodule(convert[0]), "weight", 0.5)
    report = gather_weights_in_fp8(model, convert_model(model))
    assert any(convert[0] in note and "its weight is computed from other parameters" in note for note in report.notes)
    linear = model.get_submodule(convert[0])
    state = model.state_dict()
    assert f"{convert[0]}.weight" not in state and f"{convert[0]}.weight_orig" in state
    model.load_state_dict(state)
    linear(torch.randn(3, linear.in_features)).sum().backward()
    assert linear.weight_orig.grad.count_nonzero() > 0
