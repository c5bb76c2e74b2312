"""blockfp8_titan.plan: the table without a GPU, weights or processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockfp8_titan.plan import main

CONFIGS = Path(__file__).parent.parent / "configs"
DEBUG = f"--job.config_file={CONFIGS / 'debug_blockwise_fp8.toml'}"


def test_the_table_of_a_config(capsys):
    assert main([DEBUG]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("llama3 debugmodel\nlinear ")
    assert "layers.{0-5}.attention.wq ×6" in printed.out
    assert "42 of 43 Linears in fp8" in printed.out
    assert "note: FSDP2 gathers 42 of the 42 weights in fp8, one byte per element" in printed.out


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
        ([DEBUG, "--model.name=llama9"], "llama9"),
        ([DEBUG, "--experimental.custom_import=no_such_package"], "no_such_package"),
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
