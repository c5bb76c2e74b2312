"""scripts/export_fp8.py: a checkpoint becomes Hugging Face safetensors, which transformers loads and which compute the same."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

pytest.importorskip("safetensors", reason="writes safetensors, which the extra [export] brings")

import checkpoints
import export_fp8
from safetensors.torch import load_file, save_file

from blockfp8_titan.conversion import plan_conversion
from blockfp8_titan.numerics import sqnr
from blockfp8_titan.plan import read_job_config
from blockfp8_titan.reference import dequantize_128x128, quantize_128x128

from .data import bits

CONFIG = Path(__file__).parent.parent / "configs" / "debug_blockwise_fp8.toml"
FLAVOR = "debugmodel_2L"
ARGS = dataclasses.replace(llama3_args["debugmodel"], n_layers=2)
ADAPTER = Llama3StateDictAdapter(ARGS, None)
FP8 = 2 * 7
BF16 = 2 * 2 + 3
# fp32 arithmetic in another order; one tensor under a wrong name, unpermuted or with inverse multipliers leaves less than 40.
SAME_WEIGHTS_DB = 90.0
# Rounding to e4m3 leaves 31.5 dB of a weight. At most three quantised Linears follow each other in each of 2 blocks, whose noise
# adds up to 31.5 - 10 log10(6) = 23.7 dB at worst.
QUANTISED_WEIGHTS_DB = 23.0


@pytest.fixture(scope="module", autouse=True)
def flavor() -> Iterator[None]:
    """Two layers of the debug model are enough, and three times as fast."""
    llama3_args[FLAVOR] = ARGS
    yield
    del llama3_args[FLAVOR]


@pytest.fixture(scope="module")
def job(corpus: Path) -> Callable[..., JobConfig]:
    def read(*overrides: str) -> JobConfig:
        model = [f"--model.flavor={FLAVOR}", f"--model.hf_assets_path={corpus / 'tokenizer'}"]
        return read_job_config([f"--job.config_file={CONFIG}", *model, *overrides])

    return read


@pytest.fixture(scope="module")
def model() -> Transformer:
    """The debug model with norms that differ, and with blocks that add as much to the residual stream as the embedding holds."""
    model = Transformer(dataclasses.replace(ARGS, max_seq_len=256))
    with torch.no_grad():
        model.init_weights()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.startswith("layers."):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "step-1"
    state = model.state_dict() | {"optimizer.param_groups.layers.0.attention.wq.weight.lr": 0.1}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def export(job_config: JobConfig, source: Path, out: Path, **options: object) -> list[export_fp8.Parameter]:
    return export_fp8.export(job_config, source, out, device=torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def exported(job: Callable[..., JobConfig], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "debug"
    export(job(), checkpoint, out, shard_bytes=1_500_000)
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export, read as its index says."""
    index = json.loads((folder / export_fp8.INDEX).read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    found = {key: files[name][key] for key, name in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def test_what_is_written(exported: Path, model: Transformer) -> None:
    found = tensors(exported)
    fp8 = [key for key, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(fp8) == FP8
    assert len(list(exported.glob("model-*.safetensors"))) == 3
    assert len(found) == len(model.state_dict()) + len(fp8)
    for key, tensor in found.items():
        assert tensor.dtype in (torch.float8_e4m3fn, torch.bfloat16) or key.endswith(".weight_scale_inv")
        if key in fp8:
            n, k = tensor.shape
            scale = found[f"{key}_scale_inv"]
            assert scale.dtype == torch.float32 and scale.shape == (-(-n // 128), -(-k // 128))
    assert (exported / "tokenizer.json").is_file()
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "who may read one file may read all"
    assert not list(exported.parent.glob(".*"))


def test_payloads_are_those_of_training(exported: Path, model: Transformer) -> None:
    """Hugging Face's order of q and k rows moves none to another block: multipliers and bytes are those of the master weights."""
    found = tensors(exported)
    keys = {fqn: next(iter(ADAPTER.to_hf({fqn: value}))) for fqn, value in model.state_dict().items()}
    for fqn, value in model.state_dict().items():
        tensor = found[keys[fqn]]
        back = ADAPTER.from_hf({keys[fqn]: tensor.view(torch.uint8)})[fqn] if tensor.dtype.itemsize == 1 else tensor
        if tensor.dtype == torch.float8_e4m3fn:
            w_q, w_dq = quantize_128x128(value)
            assert torch.equal(back, bits(w_q)), fqn
            assert torch.equal(found[f"{keys[fqn]}_scale_inv"], w_dq), fqn
        else:
            assert torch.equal(back, value.bfloat16()), fqn


def rounded(model: Transformer) -> Transformer:
    """The model with the weights that the export stands for, in fp32."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.startswith("layers.") and parameter.ndim == 2:
                parameter.copy_(dequantize_128x128(*quantize_128x128(parameter)))
            else:
                parameter.copy_(parameter.bfloat16())
    return twin


def test_transformers_loads_it_and_computes_the_same(exported: Path, model: Transformer) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="the extra [test] brings it")
    pytest.importorskip("accelerate", reason="transformers needs it to load fp8; the extra [test] brings it")
    loaded, loading = transformers.LlamaForCausalLM.from_pretrained(
        exported,
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    loaded.float()  # what is stored in bf16 is loaded in bf16
    angles = model.freqs_cis[1].angle()
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, angles, rtol=1e-6, atol=0)
    tokens = torch.randint(0, 2048, (2, 200))
    with torch.no_grad():
        actual, same, unquantised = loaded(tokens).logits, rounded(model)(tokens), model(tokens)
    assert sqnr(same, actual) > SAME_WEIGHTS_DB
    assert QUANTISED_WEIGHTS_DB < sqnr(unquantised, actual) < 35


@pytest.mark.gpu
def test_transformers_multiplies_it_in_fp8(exported: Path, model: Transformer) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="the extra [test] brings it")
    pytest.importorskip("accelerate", reason="transformers needs it to load fp8; the extra [test] brings it")
    pytest.importorskip("kernels", reason="transformers takes its fp8 kernels from the Hugging Face Hub through it")
    loaded = transformers.LlamaForCausalLM.from_pretrained(exported, device_map="cuda")
    linear = loaded.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.float8_e4m3fn
    tokens = torch.randint(0, 2048, (2, 200))
    with torch.no_grad():
        try:
            actual = loaded(tokens.cuda()).logits.cpu()
        except (ImportError, OSError) as error:
            pytest.skip(f"transformers could not fetch its fp8 kernels: {error}")
        assert sqnr(model(tokens), actual) > QUANTISED_WEIGHTS_DB - 3  # activations are rounded as often as weights


def test_the_config(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
        "ignored_layers": ["lm_head"],
    }
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["torch_dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 131072


@pytest.fixture(scope="module")
def hugging_face(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bf16, as on the Hub, in two files."""
    folder = tmp_path_factory.mktemp("hugging_face")
    state = {key: value.bfloat16().contiguous() for key, value in ADAPTER.to_hf(model.state_dict()).items()}
    first = {key: state.pop(key) for key in list(state)[:8]}
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(state, folder / "model-00002-of-00002.safetensors")
    config = {"model_type": "llama", "hidden_size": 256, "rope_parameters": {"rope_theta": 7.0}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_from_hugging_face(
    job: Callable[..., JobConfig], hugging_face: Path, model: Transformer, tmp_path: Path
) -> None:
    parameters = export(job(), hugging_face, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert len(found) == len(parameters) + FP8
    for key, value in ADAPTER.to_hf(model.state_dict()).items():
        value = value.bfloat16()
        if f"{key}_scale_inv" in found:
            w_q, w_dq = quantize_128x128(value)
            assert torch.equal(bits(found[key]), bits(w_q)) and torch.equal(found[f"{key}_scale_inv"], w_dq)
        else:
            assert torch.equal(found[key], value)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Its own config says how it computes, not the job's model.
    assert config["rope_parameters"] == {"rope_theta": 7.0} and "rope_scaling" not in config
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


def test_a_job_that_skips_part_of_a_fused_matrix(
    job: Callable[..., JobConfig], checkpoint: Path, tmp_path: Path
) -> None:
    config = job("--blockwise_fp8.rules_file=skip_kv", "--blockwise_fp8.scale_format=pow2")
    parameters = {parameter.key: parameter for parameter in export(config, checkpoint, tmp_path / "out")}
    found = tensors(tmp_path / "out")
    for projection in ("q", "k", "v"):
        assert found[f"model.layers.1.self_attn.{projection}_proj.weight"].dtype == torch.bfloat16
    assert "fused with k_proj, v_proj" in parameters["model.layers.1.self_attn.q_proj.weight"].remark
    assert parameters["model.layers.1.self_attn.k_proj.weight"].remark == ""
    assert found["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignored_layers"]
    assert len(skipped) == 1 + 2 * 3 and "model.layers.1.self_attn.q_proj" in skipped
    scale = found["model.layers.1.mlp.up_proj.weight_scale_inv"]
    assert torch.equal(scale, scale.log2().round().exp2())
    summary = export_fp8.summary(list(parameters.values()), tmp_path / "out")
    assert "in bf16: model.layers.0.self_attn.q_proj and 1 more: fused with k_proj, v_proj" in summary


def test_sizes_that_do_not_fit_blocks_stay_in_bf16() -> None:
    args = dataclasses.replace(llama3_args["debugmodel"], dim=192, n_heads=4, multiple_of=128, n_layers=1)
    with torch.device("meta"):
        model = Transformer(args)
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
    keys = {fqn: next(iter(ADAPTER.to_hf({fqn: torch.empty(256, 256)}))) for fqn in shapes}
    parameters = export_fp8.decide(plan_conversion(model), shapes, keys)
    assert all(parameter.scale_format is None for parameter in parameters)
    remarks = {parameter.fqn: parameter.remark for parameter in parameters}
    assert remarks["layers.0.attention.wq.weight"] == "192 x 192 is no multiple of 128 x 128"
    assert remarks["norm.weight"] == remarks["output.weight"] == ""


def test_files_are_cut_by_bytes() -> None:
    def parameter(name: str, elements: int) -> export_fp8.Parameter:
        return export_fp8.Parameter(name, name, (elements,), False, None)

    small, large = [parameter(name, 40) for name in "abc"], parameter("d", 1000)
    assert export_fp8.into_files([*small, large], 160) == [small[:2], small[2:], [large]]
    assert export_fp8.into_files([large, *small], 160) == [[large], small[:2], small[2:]]


def copy_with(folder: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    damage(copied)
    return copied


def truncate(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def resave(file: Path, **changes: Tensor | None) -> None:
    state = {key: value for key, value in (load_file(file) | changes).items() if value is not None}
    save_file(state, file)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate(path / "__0_0.distcp"), "__0_0.distcp is damaged: "),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing: it holds a part of tok_embeddings"),
        (lambda path: truncate(path / ".metadata"), ".metadata is damaged: "),
        (lambda path: (path / ".metadata").unlink(), "has neither .metadata, as a torchtitan checkpoint does"),
        (lambda path: shutil.rmtree(path), "no such folder"),
    ],
)
def test_a_damaged_checkpoint(
    job: Callable[..., JobConfig], checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damaged = copy_with(checkpoint, tmp_path, damage)
    with pytest.raises(ValueError) as raised:
        export(job(), damaged, tmp_path / "out")
    assert message in str(raised.value) and str(damaged) in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {damaged.name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, ""),
        (lambda path: truncate(path / "__0_0.distcp"), "__0_0.distcp is damaged: "),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is damaged: "),
        (lambda path: truncate(path / ".metadata"), ".metadata is damaged: "),
    ],
)
def test_a_checkpoint_is_looked_through(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with(checkpoint, tmp_path, damage)
    assert checkpoints.main([str(folder)]) == bool(message)
    printed = capsys.readouterr()
    assert message in printed.err and str(folder) in (printed.err or printed.out)
    with pytest.raises(SystemExit):
        checkpoints.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate(path / SECOND), f"{SECOND} is damaged: "),
        (lambda path: (path / FIRST).unlink(), "has no tok_embeddings.weight (model.embed_tokens.weight)"),
        (lambda path: shutil.copy(path / FIRST, path / "x.safetensors"), "keep one of the two files"),
        (lambda path: resave(path / SECOND, **{NORM: None}), f"has no norm.weight ({NORM})"),
        (lambda path: resave(path / SECOND, **{NORM: torch.ones(255)}), "has shape [255], the job's model [256]"),
        (lambda path: resave(path / SECOND, **{NORM: torch.full([256], torch.nan)}), f"({NORM}) holds NaN or Inf"),
        (lambda path: resave(path / SECOND, extra=torch.ones(1)), "holds extra, which the job's model does not have"),
        (
            lambda path: resave(path / SECOND, **{NORM: torch.ones(256).to(torch.float8_e4m3fn)}),
            f"{NORM} is stored as F8_E4M3",
        ),
        (lambda path: (path / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda path: (path / "config.json").write_text('{"num_attention_heads": 8}'), "num_attention_heads = 8"),
        (lambda path: (path / "config.json").write_text('{"quantization_config": {}}'), "has a quantization_config"),
    ],
)
def test_damaged_safetensors(
    job: Callable[..., JobConfig], hugging_face: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damaged = copy_with(hugging_face, tmp_path, damage)
    with pytest.raises(ValueError) as raised:
        export(job(), damaged, tmp_path / "out")
    assert message in str(raised.value) and str(damaged) in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {damaged.name}


def test_weights_that_are_not_finite(job: Callable[..., JobConfig], model: Transformer, tmp_path: Path) -> None:
    state = model.state_dict()
    state["layers.1.feed_forward.w3.weight"] = state["layers.1.feed_forward.w3.weight"].clone()
    state["layers.1.feed_forward.w3.weight"][700, 3] = float("inf")
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w3\.weight .* holds NaN or Inf"):
        export(job(), tmp_path / "step-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_flavor(job: Callable[..., JobConfig], checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose its model\.flavor"):
        export(job("--model.flavor=8B"), checkpoint, tmp_path / "out")


def test_rules_that_leave_nothing(job: Callable[..., JobConfig], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('[[rules]]\nmatch = "*"\naction = "skip"\n')
    with pytest.raises(ValueError, match="no weight would be in fp8: the rules convert no Linear"):
        export(job(f"--blockwise_fp8.rules_file={tmp_path / 'rules.toml'}"), checkpoint, tmp_path / "out")


def test_the_output_is_replaced_only_when_told_and_only_if_it_is_an_export(
    job: Callable[..., JobConfig], checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ValueError, match=r"exists already; name another folder or pass --overwrite"):
        export(job(), checkpoint, out)
    with pytest.raises(ValueError, match=r"is no earlier export"):
        export(job(), checkpoint, out, overwrite=True)
    for holder in (checkpoint, checkpoint.parent):
        with pytest.raises(ValueError, match="holds the checkpoint to export"):
            export(job(), checkpoint, holder, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]
    (out / "config.json").write_text('{"quantization_config": {}}')
    export(job(), checkpoint, out, overwrite=True)
    assert not (out / "precious").exists() and len(tensors(out)) == 2 * FP8 + BF16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_as_a_command(corpus: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        f"--job.config_file={CONFIG}",
        f"--model.flavor={FLAVOR}",
        f"--model.hf_assets_path={corpus}",
        f"--checkpoint={checkpoint.parent}",
    ]
    assert export_fp8.main([*common, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "name one of the steps in it: step-1" in line
    with pytest.raises(SystemExit):
        export_fp8.main([*common, "--out", str(tmp_path / "out"), "--shard-gb=inf"])
    assert "--shard-gb inf: must be a number above 0" in capsys.readouterr().err
    # How the job ran does not matter, nor whether this torch could run it so.
    common += ["--parallelism.tensor_parallel_degree=2", "--compile.enable"]
    common[3] = f"--checkpoint={checkpoint}"
    assert export_fp8.main([*common, "--out", str(tmp_path / "out"), "--shard-gb=0.0015"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "model-00002-of-00003.safetensors" in printed.out
    assert f"{FP8} weights in fp8, {BF16} tensors in bf16" in printed.out
    assert "no tokenizer was found" in printed.out
