"""blockfp8_titan.plan: the table without a GPU, weights or processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.protocols.train_spec import get_train_spec

from blockfp8_titan.plan import SPLIT_BY_COLUMNS, SPLIT_BY_ROWS, build_on_meta, main

CONFIGS = Path(__file__).parent.parent / "configs"
RULES_FILE = 'rules_file = ""'
DEBUG = f"--job.config_file={CONFIGS / 'debug_blockwise_fp8.toml'}"


def test_the_table_of_a_config(capsys):
    assert main([DEBUG]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("llama3 debugmodel\nlinear ")
    assert "layers.{0-5}.attention.wq ×6" in printed.out
    assert "42 of 43 Linears in fp8" in printed.out
    assert "note: FSDP2 over several ranks gathers 42 of the 42 weights in fp8, one byte per element" in printed.out


def test_70b_takes_no_weights(capsys):
    assert main(["--job.config_file", str(CONFIGS / "llama3_70b_blockwise_fp8.toml")]) == 0
    out = capsys.readouterr().out
    assert "560 of 561 Linears in fp8" in out
    assert "of 70,553,706,496 parameters" in out
    assert max(map(len, out.splitlines())) <= 120


def test_overrides_decide_even_on_a_backend_that_this_machine_may_lack(tmp_path, capsys):
    path = tmp_path / "plan.json"
    overrides = ["--blockwise_fp8.rules_file=skip_kv", "--blockwise_fp8.gemm_backend=cublas"]
    assert main([DEBUG, f"--json={path}", *overrides, "--blockwise_fp8.fp8_all_gather=false"]) == 0
    out = capsys.readouterr().out
    assert "skip_kv.toml rule 1" in out and "gemm_backend=cublas" in out
    assert "note:" not in out
    report = json.loads(path.read_text())
    assert len(report["rows"]) == 43
    assert report["totals"]["linears_in_fp8"] == 30


def test_sharding_over_ranks(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["--ranks", "4", "512", DEBUG, f"--json={path}"]) == 0
    out = capsys.readouterr().out
    assert "\n4 FSDP ranks" in out and "\n512 FSDP ranks" in out
    assert max(map(len, out.splitlines())) <= 120
    four, many = json.loads(path.read_text())["sharding"]
    assert [(shards["shape"], shards["count"], shards["rows"]) for shards in four["weights"]] == [
        ([256, 256], 24, 64),
        ([768, 256], 12, 192),
        ([256, 768], 6, 64),
    ]
    assert [shards["empty_ranks"] for shards in many["weights"]] == [256, 128, 256]
    assert four["gathered_bytes"] < 0.8 * four["gathered_bytes_unquantised"]
    assert main([DEBUG, "--ranks=4", "--blockwise_fp8.fp8_all_gather=false"]) == 0
    assert "bfloat16" in (out := capsys.readouterr().out) and "fallbacks: 42" in out


def test_what_is_fused_and_what_checkpointing_recomputes(capsys):
    assert (
        main([DEBUG, "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]) == 0
    )
    out = capsys.readouterr().out
    assert "\nfused: layers.{0-5}.attention_norm quantises for wq, wk, wv\n" in out
    assert 'note: ac_save = "balanced": of the Linears in fp8' in out
    assert main([DEBUG, "--blockwise_fp8.fuse=off", "--activation_checkpoint.mode=full"]) == 0
    out = capsys.readouterr().out
    assert 'not fused: layers.{0-5}.ffn_norm: fuse = "off"' in out and "ac_save" not in out
    for mode, kept in (("none", True), ("full", False)):
        assert main([DEBUG, f"--activation_checkpoint.mode={mode}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("gradients of w1(x) and w3(x); keeps w1(x) and w3(x) in e4m3 for backward" in out) == kept


def test_blocks_unlike_those_of_one_gpu_are_noted(capsys):
    assert main([DEBUG, "--parallelism.tensor_parallel_degree=4"]) == 0
    assert "note: tensor parallelism splits Linears over 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--job.config_file=no/such.toml"], "no/such.toml"),
        ([f"--job.config_file={CONFIGS / 'debug_bf16.toml'}"], "has no 'blockwise_fp8', so this job converts nothing"),
        ([DEBUG, "--blockwise_fp8.rules_file=no"], "[blockwise_fp8] rules_file = 'no': no such file"),
        (
            [DEBUG, "--parallelism.tensor_parallel_degree=2", "--parallelism.enable_async_tensor_parallel"],
            "set parallelism.enable_async_tensor_parallel = false",
        ),
        ([DEBUG, "--model.converters=blockwise_fp8,quantize.linear.mx"], "cannot run beside 'quantize.linear.mx'"),
        ([DEBUG, "--model.flavor=9B"], "model.flavor = '9B': llama3 has debugmodel, "),
        ([DEBUG, "--model.name=llama9"], "model.name = 'llama9': torchtitan has deepseek_v3, "),
        ([DEBUG, "--training.seq_len=-1"], "llama3 debugmodel cannot be built for training.seq_len = -1"),
        ([DEBUG, "--model.converters=blockwise_fp8,no_such"], "there is no 'no_such', only 'quantize.linear.float8', "),
        ([DEBUG, "--model.converters=blockwise_fp8,blockwise_fp8"], "name it once"),
        ([DEBUG, "--parallelism.tensor_parallel_degree=0"], "tensor_parallel_degree = 0: must be at least 1"),
        (
            [DEBUG, "--parallelism.tensor_parallel_degree=32"],
            "[blockwise_fp8] layers.0.attention.wq: out_features = 256 split over 32 ranks is 8 on each: must be a multiple of 16",
        ),
        (
            [DEBUG, "--experimental.custom_import=no_such_package"],
            "experimental.custom_import = 'no_such_package': cannot be imported: ModuleNotFoundError: ",
        ),
        (
            [DEBUG, "--job.custom_config_module=blockfp8_titan.rules"],
            "'JobConfig'; for [blockwise_fp8] set it to 'blockfp8_titan.config'",
        ),
        (
            [DEBUG, "--blockwise_fp8.rules_file=large_only"],
            "large_only.toml rule 1 (match = 'layers.*') matches no Linear",
        ),
        ([DEBUG, "--ranks=0"], "ranks = 0: must be at least 1"),
        ([DEBUG, "--json=no/such/folder/x.json"], "no/such/folder/x.json"),
    ],
)
def test_an_error_is_one_message(capsys, args, message):
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gemm_backend =", "gem_backend =", "[blockwise_fp8] unknown key 'gem_backend', did you mean 'gemm_backend'?"),
        ("[blockwise_fp8]", "[blockwise_fp9]", "unknown section [blockwise_fp9], did you mean 'blockwise_fp8'?"),
        ("seq_len", "seqlen", "[training] unknown key 'seqlen', did you mean 'seq_len'?"),
        ("seq_len = 128", "seq_len = '128'", "[training] seq_len = '128': must be an integer"),
        (
            "[blockwise_fp8]",
            "[validation]\nsteps = 'abc'\n[blockwise_fp8]",
            "Validation cannot be made of {'steps': 'abc'}: ",
        ),
        ("hf_assets_path = ", "hf_assets_path = [1] # ", "[model] hf_assets_path = [1]: must be "),
        ("steps = 80", "dtype = 'float16'", "[training] dtype = 'float16': must be one of 'bfloat16', 'float32'"),
        ('["blockwise_fp8"]', '"blockwise_fp8"', "[model] converters = 'blockwise_fp8': must be a list"),
        ("custom_config_module", "# ", "unknown section [blockwise_fp8]: set job.custom_config_module = "),
        ("scale_format = ", "scale_format = 1 # ", "[blockwise_fp8] scale_format = 1: must be one of 'fp32', 'pow2'"),
        (RULES_FILE, "[[blockwise_fp8.rules]]\nmatsh = '*'", "[blockwise_fp8] rule 1: unknown key 'matsh'"),
        (RULES_FILE, "[[blockwise_fp8.rules]]\naction = 'skip'", "[blockwise_fp8] rule 1: match is missing or empty"),
        (RULES_FILE, "[[blockwise_fp8.rules]]\nmatch = 'x'", "[blockwise_fp8] rule 1 (match = 'x') matches no Linear"),
    ],
)
def test_a_mistake_in_the_toml_is_one_message(tmp_path, capsys, old, new, message):
    text = (CONFIGS / "debug_blockwise_fp8.toml").read_text()
    assert old in text
    (tmp_path / "job.toml").write_text(text.replace(old, new))
    assert main([f"--job.config_file={tmp_path / 'job.toml'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_job_that_brings_no_converter(tmp_path, capsys):
    (tmp_path / "job.toml").write_text("[model]\nflavor = 'debugmodel'\nconverters = ['blockwise_fp8']\n")
    assert main([f"--job.config_file={tmp_path / 'job.toml'}"]) == 2
    assert "set experimental.custom_import = 'blockfp8_titan' and " in capsys.readouterr().err


def test_an_import_that_raises(tmp_path, monkeypatch, capsys):
    (tmp_path / "raises_on_import.py").write_text("raise TypeError('no\\nway')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([DEBUG, "--experimental.custom_import=raises_on_import"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'raises_on_import': cannot be imported: TypeError: no way; " in line


@pytest.mark.parametrize("name", ["llama3", "llama4", "qwen3", "deepseek_v3", "gpt_oss"])
def test_tensor_parallelism_splits_the_linears_as_torchtitan_does(monkeypatch, name):
    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    job = JobConfig()
    job.model.name, job.model.flavor = name, "debugmodel"
    job.activation_checkpoint.mode = "none"
    model = build_on_meta(job)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, etp=1, world_size=2)
        get_train_spec(name).parallelize_fn(model, dims, job)
    finally:
        dist.destroy_process_group()
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    for fqn, linear in linears.items():
        last = fqn.rpartition(".")[2]
        (placement,) = linear.weight.placements
        split = Shard(0) if last in SPLIT_BY_ROWS else Shard(1) if last in SPLIT_BY_COLUMNS else Replicate()
        assert placement == split, fqn
    assert any(linear.weight.placements[0].is_shard() for linear in linears.values())


def test_a_config_that_is_no_toml(tmp_path, capsys):
    (tmp_path / "job.toml").write_text("[job]\ndescription = \n")
    assert main([f"--job.config_file={tmp_path / 'job.toml'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the job's config is wrong: ") and "line 2" in line


def test_as_a_command():
    command = [sys.executable, "-m", "blockfp8_titan.plan", DEBUG, "--blockwise_fp8.rules_file=no"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] and "Traceback" not in done.stderr
