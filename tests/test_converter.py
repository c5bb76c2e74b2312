"""blockfp8_titan.converter through torchtitan's own registry and container, on llama3's debug model on meta."""

import dataclasses
import importlib
import json
import logging
import os
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra import parallelize
from torchtitan.models.llama3.model import model as llama3
from torchtitan.models.llama3.model.model import apply_rotary_emb
from torchtitan.protocols import train_spec
from torchtitan.protocols.model_converter import _registry_model_converter_cls, build_model_converters
from torchtitan.tools import utils

from blockfp8_titan import converter
from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.config import JobConfig as AddedConfig
from blockfp8_titan.environment import processor_name
from blockfp8_titan.linear import BlockwiseFP8Linear
from blockfp8_titan.rules import Rule
from blockfp8_titan.weight import BlockwiseFP8Weight


@dataclasses.dataclass
class FullConfig(AddedConfig, JobConfig):
    """What torchtitan makes of both."""


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(utils, "device_type", "cpu")


@pytest.fixture(autouse=True)
def torchtitans_rope(monkeypatch):
    """Each test begins with it, and none leaves another behind."""
    monkeypatch.setattr(llama3, "apply_rotary_emb", apply_rotary_emb)


@pytest.fixture
def job(tmp_path):
    config = FullConfig()
    config.model.converters = ["blockwise_fp8"]
    config.job.dump_folder = str(tmp_path / "run")
    return config


def dims(world_size=1, **degrees):
    ones = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
    return ParallelDims(**(ones | degrees), world_size=world_size)


def debug_model():
    spec = train_spec.get_train_spec("llama3")
    with torch.device("meta"):
        return spec.model_cls(spec.model_args["debugmodel"])


def convert(job, parallel_dims=None):
    model = debug_model()
    build_model_converters(job, parallel_dims or dims()).convert(model)
    return model


def recipes(model):
    return {fqn: module.recipe for fqn, module in model.named_modules() if isinstance(module, BlockwiseFP8Linear)}


def test_conversion_logs_the_table_and_the_backend_and_writes_every_row(job, tmp_path, caplog):
    job.blockwise_fp8 = BlockwiseFP8(rules=[Rule("layers.*.attention.w[kv]", "skip", "narrow")])
    with caplog.at_level(logging.INFO):
        model = convert(job)
    assert len(recipes(model)) == 6 * 5
    assert "layers.{0-5}.attention.wk ×6" in caplog.text and "narrow" in caplog.text
    assert "30 of 43 Linears in fp8" in caplog.text
    assert "GEMM backend: reference on cpu, chosen by auto" in caplog.text
    assert f"device: {processor_name()}, one of 1" in caplog.text and f"torch {version('torch')}" in caplog.text
    (block,) = [record for record in caplog.records if "Blockwise fp8" in record.message]
    assert "\x1b" not in block.message
    report = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())
    assert len(report["rows"]) == 43
    assert report["totals"]["linears_in_fp8"] == 30


def test_other_ranks_convert_silently(job, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO):
        assert len(recipes(convert(job))) == 6 * 7
    assert caplog.text == ""
    assert not (tmp_path / "run").exists()


def test_a_job_without_the_section_gets_its_defaults(tmp_path):
    job = JobConfig()
    job.model.converters = ["blockwise_fp8"]
    job.job.dump_folder = str(tmp_path)
    assert set(recipes(convert(job)).values()) == {BlockwiseFP8().recipe()}


def test_rules_file_and_section_decide_in_this_order(job):
    job.blockwise_fp8 = BlockwiseFP8(
        wgrad="bf16",
        scale_format="pow2",
        rules_file="skip_kv",
        rules=[Rule("layers.0.attention.*", wgrad="fp8")],
    )
    found = recipes(convert(job))
    assert "layers.0.attention.wk" not in found
    assert (found["layers.0.attention.wq"].wgrad, found["layers.0.attention.wq"].scale_format) == ("fp8", "pow2")
    assert found["layers.1.attention.wq"].wgrad == "bf16"


@pytest.mark.parametrize(
    ("parallel_dims", "keys", "gathered", "cached"),
    [
        (dims(2, dp_shard=2), {}, True, False),
        (dims(2, cp=2), {}, True, False),
        (dims(2, dp_shard=2), {"fp8_all_gather": False}, False, False),
        (dims(2, dp_replicate=2), {}, False, True),
        (dims(2, dp_replicate=2), {"cache_weight": False}, False, False),
        (dims(2, pp=2), {}, False, True),
    ],
    ids=["fsdp", "context parallel", "fsdp without", "ddp", "ddp without", "pipeline"],
)
def test_weights_are_gathered_in_fp8_or_cached(job, tmp_path, parallel_dims, keys, gathered, cached):
    job.blockwise_fp8 = BlockwiseFP8(**keys)
    linears = [m for m in convert(job, parallel_dims).modules() if isinstance(m, BlockwiseFP8Linear)]
    assert all(isinstance(linear.weight, BlockwiseFP8Weight) is gathered for linear in linears)
    assert all((linear.cached_weight is not None) is cached for linear in linears)
    notes = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())["notes"]
    assert notes == ["FSDP2 over several ranks gathers 42 of the 42 weights in fp8, one byte per element"] * gathered


def test_a_tied_weight_is_gathered_unquantised_and_the_report_says_why(job, tmp_path):
    model = debug_model()
    model.layers["1"].attention.wq.weight = model.layers["0"].attention.wo.weight
    build_model_converters(job, dims(2, dp_shard=2)).convert(model)
    first, second = model.layers["0"].attention.wo.weight, model.layers["1"].attention.wq.weight
    assert first is second and type(first) is torch.nn.Parameter
    assert isinstance(model.layers["1"].attention.wo.weight, BlockwiseFP8Weight)
    assert json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())["notes"] == [
        "FSDP2 over several ranks gathers 40 of the 42 weights in fp8, one byte per element",
        "layers.0.attention.wo is gathered unquantised: its weight is tied to layers.1.attention.wq.weight",
        "layers.1.attention.wq is gathered unquantised: its weight is tied to layers.0.attention.wo.weight",
    ]


@pytest.mark.parametrize(
    "other",
    ["quantize.linear.float8", "quantize.linear.mx", "quantize.grouped_mm.mx", "float8", "mx", "my_fp8", "int8"],
)
def test_another_quantising_converter_is_refused_by_name(job, other):
    job.model.converters = [other, "blockwise_fp8"]
    with pytest.raises(ValueError, match=f"'blockwise_fp8' cannot run beside '{other}'"):
        converter.BlockwiseFP8Converter(job, dims())


@pytest.mark.parametrize("other", ["lora", "remix", "fused_norm"])
def test_other_converters_are_welcome(job, other):
    job.model.converters = [other, "blockwise_fp8"]
    converter.BlockwiseFP8Converter(job, dims())


def test_listed_twice_is_refused(job):
    job.model.converters = ["blockwise_fp8", "blockwise_fp8"]
    with pytest.raises(ValueError, match="'blockwise_fp8' converts a model once; name it once$"):
        convert(job)


@pytest.mark.parametrize(
    ("torch_version", "enable", "components", "refused"),
    [
        ("2.11.0+cu130", True, ["model", "loss"], False),
        ("2.12.0", True, ["model", "loss"], True),
        ("2.13.1", True, ["model"], True),
        ("2.13.1", True, ["loss"], False),
        ("2.13.1", False, ["model"], False),
    ],
)
def test_compiled_tensor_parallelism_is_refused_where_torch_fails(
    job, monkeypatch, torch_version, enable, components, refused
):
    monkeypatch.setattr(torch, "__version__", torch_version)
    job.compile.enable, job.compile.components = enable, components
    converter.BlockwiseFP8Converter(job, dims())
    way_out = r"tensor_parallel_degree = 2 with compile.enable = true .* torch 2\.1[23].* use torch 2\.11"
    with pytest.raises(ValueError, match=way_out) if refused else nullcontext():
        converter.BlockwiseFP8Converter(job, dims(2, tp=2))


def test_asynchronous_tensor_parallelism_is_refused(job):
    job.parallelism.enable_async_tensor_parallel = True
    with pytest.raises(ValueError, match=r"set parallelism.enable_async_tensor_parallel = false"):
        converter.BlockwiseFP8Converter(job, dims(2, tp=2))


@pytest.mark.parametrize(("degree", "noted"), [(1, 0), (2, 0), (4, 42)])
def test_blocks_unlike_those_of_one_gpu_are_noted(job, tmp_path, degree, noted):
    """256 and 768 features: halves end with a block, quarters do not."""
    convert(job, dims(degree, tp=degree))
    notes = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())["notes"]
    notes = [note for note in notes if "blocks of 128" in note]
    assert len(notes) == bool(noted)
    assert not noted or f"for {noted} Linears (layers.0.attention.wq …) out_features / 4 or in_features / 4" in notes[0]


def test_torchtitans_plan_refuses_a_layer_that_does_not_split(job):
    """Named by its FQN, before any weight has memory."""
    parallel_dims = dims(32, tp=32)
    job.training.seq_len = 64
    model = convert(job, parallel_dims)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    try:
        with pytest.raises(
            ValueError, match=r"^layers\.0\.attention\.wq: out_features = 256 split over 32 ranks is 8 on each"
        ):
            parallelize.parallelize_llama(model, parallel_dims, job)
    finally:
        dist.destroy_process_group()


def test_a_backend_that_the_device_cannot_run_is_refused(job):
    job.blockwise_fp8 = BlockwiseFP8(gemm_backend="cublas")
    with pytest.raises(ValueError, match=r'^\[blockwise_fp8\] gemm_backend = "cublas"'):
        converter.BlockwiseFP8Converter(job, dims())
    job.blockwise_fp8 = BlockwiseFP8(rules=[Rule("*"), Rule("layers.0.*", gemm_backend="triton")])
    with pytest.raises(
        ValueError, match=r"^\[blockwise_fp8\] rule 2 \(match = 'layers\.0\.\*'\): gemm_backend = \"triton\""
    ):
        converter.BlockwiseFP8Converter(job, dims())


def test_a_rule_without_a_match_names_the_section(job):
    job.blockwise_fp8 = BlockwiseFP8(rules=[Rule("layers.*.atention.*")])
    with pytest.raises(
        ValueError, match=r"^\[blockwise_fp8\] rule 1 \(match = 'layers\.\*\.atention\.\*'\) matches no Linear"
    ):
        convert(job)


def test_selective_checkpointing_saves_the_forward_gemm(job, monkeypatch):
    saved = {torch.ops.aten.mm.default}
    monkeypatch.setattr(parallelize, "_op_sac_save_list", saved)
    convert(job)
    ours = torch.ops.blockfp8
    assert saved == {torch.ops.aten.mm.default, ours.gemm_1x128_128x128.default, ours.gated_feed_forward.default}


def recomputations(model):
    return [module.recomputation for module in model.modules() if hasattr(module, "recomputation")]


@pytest.mark.parametrize(
    ("mode", "option", "compiles", "apart", "recomputed"),
    [
        ("selective", "op", True, True, 18 + 6),
        ("selective", "op", False, False, 18 + 6),
        ("selective", "2", True, True, 0),
        ("full", "op", True, True, 42 + 12),
        ("none", "op", True, False, 0),
    ],
)
def test_modules_know_how_they_will_be_checkpointed(job, tmp_path, mode, option, compiles, apart, recomputed):
    job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option = mode, option
    job.compile.enable = compiles
    found = recomputations(convert(job))
    assert len(found) == 42 + 12
    assert all(recomputation.columns_apart is apart for recomputation in found)
    assert sum(recomputation.output for recomputation in found) == recomputed
    notes = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())["notes"]
    assert any('ac_save = "balanced"' in note for note in notes) == (mode == "selective" and option == "op")


def test_ac_save_none_recomputes_every_output(job):
    job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option = "selective", "op"
    job.blockwise_fp8 = BlockwiseFP8(ac_save="none")
    assert sum(recomputation.output for recomputation in recomputations(convert(job))) == 42 + 12


@pytest.mark.parametrize(
    ("fuse", "degree", "fused", "noted"), [("auto", 1, 18, 0), ("off", 1, 0, 0), ("auto", 2, 0, 1), ("off", 2, 0, 0)]
)
def test_what_is_fused(job, tmp_path, fuse, degree, fused, noted):
    job.blockwise_fp8 = BlockwiseFP8(fuse=fuse)
    convert(job, dims(degree, tp=degree))
    report = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())
    assert sum(fusion["fused"] for fusion in report["fusions"]) == fused
    assert report["notes"] == ['fuse = "auto" has no effect beside tensor parallelism of degree 2'] * noted


@pytest.mark.parametrize(
    ("mode", "option", "settings", "degree", "inputs"),
    [
        ("none", "op", {}, 1, "fp8"),
        ("none", "op", {"swiglu_inputs": "bf16"}, 1, "bf16"),
        ("selective", "op", {}, 1, "fp8"),
        ("selective", "op", {"ac_save": "gemm"}, 1, "fp8"),
        ("selective", "op", {"ac_save": "none"}, 1, "bf16"),
        ("selective", "2", {}, 1, "bf16"),
        ("full", "op", {}, 1, "bf16"),
        ("none", "op", {"fuse": "off"}, 1, None),
        ("none", "op", {}, 2, None),
    ],
)
def test_what_feed_forwards_keep(job, tmp_path, mode, option, settings, degree, inputs):
    job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option = mode, option
    job.blockwise_fp8 = BlockwiseFP8(**settings)
    model = convert(job, dims(degree, tp=degree))
    report = json.loads((tmp_path / "run" / "blockwise_fp8_conversion.json").read_text())
    kept = [fusion["swiglu_inputs"] for fusion in report["fusions"] if fusion["kind"] == "feed_forward"]
    assert kept == [inputs] * 6
    assert [
        getattr(m, "swiglu_inputs", None) for name, m in model.named_modules() if name.endswith("feed_forward")
    ] == kept


def test_a_model_family_without_a_list_of_ops_to_save_converts_too(job, monkeypatch):
    def parallelize_nothing(model, parallel_dims, job_config):
        return model

    spec = dataclasses.replace(train_spec.get_train_spec("llama3"), parallelize_fn=parallelize_nothing)
    monkeypatch.setitem(train_spec._extra_train_specs, "plain", spec)
    job.model.name = "plain"
    assert len(recipes(convert(job))) == 6 * 7


def test_a_second_import_is_harmless():
    importlib.reload(converter)
    assert _registry_model_converter_cls["blockwise_fp8"].__name__ == "BlockwiseFP8Converter"


def test_the_converter_keeps_no_module(job):
    made = converter.BlockwiseFP8Converter(job, dims())
    model = debug_model()
    made.convert(model)
    before = vars(made).copy()
    made.post_optimizer_hook([model])
    assert vars(made) == before
    assert not any(isinstance(value, torch.nn.Module) for value in before.values())


@pytest.mark.parametrize(
    "enable, components, backend, fuse",
    [
        (True, ["loss"], "inductor", "auto"),
        (False, ["model"], "inductor", "auto"),
        (True, ["model"], "aot_eager", "auto"),
        (True, ["model"], "inductor", "off"),
    ],
)
def test_rope_of_compiled_blocks_is_in_real_numbers(job, caplog, enable, components, backend, fuse):
    def replaced_by_conversion():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            convert(job)
        replaced = llama3.apply_rotary_emb is not apply_rotary_emb
        assert ("fused: RoPE of compiled blocks" in caplog.text) == replaced
        return replaced

    job.compile.enable = True
    job.blockwise_fp8 = BlockwiseFP8()
    assert replaced_by_conversion()
    assert not converter.rotates_in_real_numbers(job, degree=2)
    job.compile.enable, job.compile.components, job.compile.backend = enable, components, backend
    job.blockwise_fp8 = BlockwiseFP8(fuse=fuse)
    assert not replaced_by_conversion()


def test_where_triton_keeps_what_it_compiles_is_named_as_inductor_names_it(job, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def name_after_conversion(compiled, device):
        job.compile.enable = compiled
        (made,) = build_model_converters(job, dims()).converters
        made.device = torch.device(device)
        made.convert(debug_model())
        return os.environ.get("TRITON_CACHE_DIR")

    assert name_after_conversion(compiled=False, device="cuda") is None
    assert name_after_conversion(compiled=True, device="cpu") is None
    assert name_after_conversion(compiled=True, device="cuda") == triton_cache_dir(3)
    monkeypatch.setenv("TRITON_CACHE_DIR", "a user's")
    assert name_after_conversion(compiled=True, device="cuda") == "a user's"
