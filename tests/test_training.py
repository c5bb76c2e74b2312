"""Whole runs of torchtitan's trainer with two processes: fp8 beside bf16, and with what else a run may use."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import launch
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.torch_version import TorchVersion

from blockfp8_titan import reference
from blockfp8_titan.converter import FIRST_TORCH_WITHOUT_COMPILED_TP
from blockfp8_titan.journal import read
from blockfp8_titan.metrics import HEALTH_FILE, METRICS_FILE, RUNS_FILE, VALIDATION_FILE

from .conftest import Run, Train
from .data import bits

STEPS = 6
COMPILED_TP_WORKS = TorchVersion(torch.__version__) < FIRST_TORCH_WITHOUT_COMPILED_TP
FULL_CHECKPOINTS = ("--checkpoint.enable", "--checkpoint.interval=3", "--checkpoint.no_last_save_model_only")


@pytest.fixture(scope="module")
def bf16(train: Train) -> Run:
    return train("debug_bf16", *FULL_CHECKPOINTS, steps=STEPS)


@pytest.fixture(scope="module")
def fp8(train: Train) -> Run:
    return train("debug_blockwise_fp8", "--blockwise_fp8.health_freq=2", *FULL_CHECKPOINTS, steps=STEPS, torchrun=True)


def initial_load(run: Run) -> tuple[str, str]:
    """Overrides that start a run with the final weights of another."""
    return "--checkpoint.enable", f"--checkpoint.initial_load_path={run.checkpoint(STEPS)}"


@pytest.fixture(scope="module")
def fp8_from_bf16(train: Train, bf16: Run) -> Run:
    return train("debug_blockwise_fp8", *initial_load(bf16), steps=2)


def largest_gap(a: Run, b: Run) -> float:
    """The largest relative difference of the two runs' losses, over the steps that both logged."""
    return max(abs(x / y - 1) for x, y in zip(a.losses, b.losses, strict=False))


def weights(checkpoint: Path, file: Path) -> dict[str, torch.Tensor]:
    """Read the model from a distributed checkpoint in a process that cannot import this package."""
    script = """
import sys, torch
sys.modules["blockfp8_titan"] = None
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtitan.models.llama3 import Transformer, llama3_args
dcp_to_torch_save(sys.argv[1], sys.argv[2])
state = torch.load(sys.argv[2], weights_only=False)
model = {name: state[name] for name in Transformer(llama3_args["debugmodel"]).state_dict()}
assert all(type(tensor) is torch.Tensor for tensor in model.values()), {type(t) for t in model.values()}
torch.save(model, sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, str(checkpoint), str(file)], check=True)
    return torch.load(file, weights_only=True)


def test_fp8_trains_as_bf16_does(bf16: Run, fp8: Run) -> None:
    assert bf16.losses[-1] < bf16.losses[0] - 0.5
    assert fp8.losses[-1] < fp8.losses[0] - 0.5
    assert fp8.losses != bf16.losses
    assert largest_gap(fp8, bf16) < 0.005
    assert all(abs(x / y - 1) < 0.02 for x, y in zip(fp8.grad_norms, bf16.grad_norms, strict=True))


def test_the_conversion_is_reported(fp8: Run) -> None:
    report = json.loads((fp8.folder / "blockwise_fp8_conversion.json").read_text())
    assert "layers.{0-5}.feed_forward.w1 ×6" in fp8.log.read_text()
    assert "layers.5.feed_forward.w1" in json.dumps(report)


def test_both_runs_are_recorded(bf16: Run, fp8: Run) -> None:
    for run in (bf16, fp8):
        records = read(run.folder / METRICS_FILE)
        assert [record["step"] for record in records] == [step.step for step in run.steps]
        assert [record["loss"] for record in records] == pytest.approx(run.losses, abs=1e-5)
        assert [record["grad_norm"] for record in records] == pytest.approx(run.grad_norms, abs=1e-4)
        assert [record["tps"] for record in records] == pytest.approx([step.tps for step in run.steps], rel=0.05)
        assert all(record["memory_gib"] > 0 and 0 <= record["data_loading_share"] <= 1 for record in records)
        assert len({record["lr"] for record in records}) > 2
        (start,) = read(run.folder / RUNS_FILE)
        assert start["config"]["debug"]["seed"] == 0 and start["world_size"] == 2
    assert "mfu: nan%" in fp8.log.read_text() and "GEMM backend: reference" in fp8.log.read_text()


def test_resuming_repeats_the_undisturbed_run(train: Train, fp8: Run, tmp_path: Path) -> None:
    resumed = train(
        "debug_blockwise_fp8",
        *FULL_CHECKPOINTS,
        f"--checkpoint.initial_load_path={fp8.checkpoint(3)}",
        "--checkpoint.no_initial_load_model_only",
        steps=STEPS,
    )
    assert [step.step for step in resumed.steps] == [4, 5, 6]
    assert resumed.losses == fp8.losses[3:]
    assert resumed.grad_norms == fp8.grad_norms[3:]
    expected, found = weights(fp8.checkpoint(6), tmp_path / "a.pt"), weights(resumed.checkpoint(6), tmp_path / "b.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def kill_ranks(folder: Path) -> None:
    """kill -9 the processes that train into this folder, torchrun apart."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue  # ended in between
        if f"--job.dump_folder={folder}\0" in command and "torch.distributed.run" not in command:
            os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the processes in Linux's /proc")
def test_a_killed_run_goes_on_as_if_undisturbed(train: Train, fp8: Run, tmp_path: Path) -> None:
    def kill_at_5(step: launch.Step) -> None:
        if step.step == 5:
            kill_ranks(tmp_path)

    with pytest.raises(launch.TrainingFailed):
        train("debug_blockwise_fp8", *FULL_CHECKPOINTS, steps=STEPS, folder=tmp_path, on_step=kill_at_5)
    assert not (tmp_path / "checkpoint" / "step-6").exists()
    resumed = train("debug_blockwise_fp8", *FULL_CHECKPOINTS, steps=STEPS, folder=tmp_path)
    assert [step.step for step in resumed.steps] == [4, 5, 6]
    assert resumed.losses == fp8.losses[3:] and resumed.grad_norms == fp8.grad_norms[3:]
    # The killed run recorded steps beyond its checkpoint; each is there once.
    records = read(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == pytest.approx(fp8.losses, abs=1e-5)
    assert [start["first_step"] for start in read(tmp_path / RUNS_FILE)] == [1, 4]
    assert len({record["run"] for record in records}) == 2


def test_three_processes_with_uneven_shards_go_on_from_two(train: Train, bf16: Run, fp8: Run, tmp_path: Path) -> None:
    overrides = ["--checkpoint.interval=1", "--checkpoint.async_mode=async", "--checkpoint.no_last_save_model_only"]
    run = train("debug_blockwise_fp8", *initial_load(fp8), *overrides, steps=2, nproc=3)
    assert run.losses[0] < bf16.losses[0] - 0.5
    start, after = weights(fp8.checkpoint(STEPS), tmp_path / "a.pt"), weights(run.checkpoint(2), tmp_path / "b.pt")
    assert all(after[name].isfinite().all() and not torch.equal(after[name], start[name]) for name in start)


def test_weights_gathered_in_bf16(train: Train, fp8: Run) -> None:
    run = train("debug_blockwise_fp8", "--blockwise_fp8.fp8_all_gather=false", steps=2)
    # Weights are rounded to bf16 before they are to fp8.
    assert run.losses != fp8.losses[:2] and largest_gap(run, fp8) < 0.005


def test_checkpoints_load_in_runs_of_the_other_kind(train: Train, bf16: Run, fp8_from_bf16: Run, fp8: Run) -> None:
    bf16_from_fp8 = train("debug_bf16", *initial_load(fp8), steps=1)
    # The first batch again, with six steps of nearly the same training behind it.
    assert bf16_from_fp8.losses[0] < bf16.losses[0] - 0.5
    assert fp8_from_bf16.losses[0] < bf16.losses[0] - 0.5
    assert largest_gap(bf16_from_fp8, fp8_from_bf16) < 0.005


def test_accumulated_gradients_are_those_of_the_whole_batch(train: Train, fp8: Run) -> None:
    accumulated = train(
        "debug_blockwise_fp8", "--training.local_batch_size=2", "--training.global_batch_size=8", steps=3
    )
    assert "gradient accumulation steps 2" in accumulated.log.read_text()
    # Two sequences are one group of 128 tokens: what is quantised is the same, the order of sums is not.
    assert largest_gap(accumulated, fp8) < 2e-4


@pytest.mark.parametrize("mode", ["op", "2", "full"])
def test_activation_checkpointing_changes_no_number(train: Train, fp8: Run, mode: str) -> None:
    overrides = ["--activation_checkpoint.mode=full"]
    if mode != "full":
        overrides = ["--activation_checkpoint.mode=selective", f"--activation_checkpoint.selective_ac_option={mode}"]
    recomputed = train("debug_blockwise_fp8", *overrides, steps=2)
    # Where whole blocks are computed again, nothing is kept in fp8.
    plain = fp8 if mode == "op" else train("debug_blockwise_fp8", "--blockwise_fp8.swiglu_inputs=bf16", steps=2)
    assert recomputed.losses == plain.losses[:2]
    assert recomputed.grad_norms == plain.grad_norms[:2]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks(train: Train, fp8: Run, mode: str) -> None:
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    compiled = train(
        "debug_blockwise_fp8",
        "--compile.enable",
        "--compile.components=model",
        f"--compile.backend={backend}",
        f"--activation_checkpoint.mode={mode}",
        "--activation_checkpoint.selective_ac_option=op",
        "--blockwise_fp8.health_freq=2",
        steps=3,
    )
    # Fused arithmetic keeps intermediate results in fp32 that eager rounds to bf16.
    assert largest_gap(compiled, fp8) < 0.005
    health, eager = (read(run.folder / HEALTH_FILE)[0] for run in (compiled, fp8))
    assert health["step"] == eager["step"] == 2
    assert health["layers"].keys() == eager["layers"].keys() and len(eager["layers"]) == 42
    for fqn, tensors in eager["layers"].items():
        found = [health["layers"][fqn][role]["sqnr_db"] for role in tensors]
        assert len(found) == 3 and found == pytest.approx(
            [tensor["sqnr_db"] for tensor in tensors.values()], rel=0.01
        ), fqn


def test_unfused(train: Train, fp8: Run) -> None:
    unfused = train("debug_blockwise_fp8", "--blockwise_fp8.fuse=off", steps=2)
    # Fused, an intermediate result is rounded to bf16 once less.
    assert unfused.losses != fp8.losses[:2] and largest_gap(unfused, fp8) < 0.002


def test_inputs_of_swiglu_in_fp8(train: Train, fp8: Run) -> None:
    """Under FSDP2, compiled, with checkpointing by op: the first loss is the other's, gradients differ a little."""
    options = ["--compile.enable", "--compile.components=model", "--compile.backend=aot_eager"]
    options += ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
    kept = train("debug_blockwise_fp8", *options, steps=3)
    plain = train("debug_blockwise_fp8", *options, "--blockwise_fp8.swiglu_inputs=bf16", steps=3)
    report = json.loads((kept.folder / "blockwise_fp8_conversion.json").read_text())
    assert sum(fusion["swiglu_inputs"] == "fp8" for fusion in report["fusions"]) == 6
    assert kept.losses[0] == plain.losses[0] and kept.losses != plain.losses and largest_gap(kept, plain) < 0.002


def test_ddp(train: Train, bf16: Run, fp8_from_bf16: Run) -> None:
    replicated = train(
        "debug_blockwise_fp8",
        *initial_load(bf16),
        "--parallelism.data_parallel_replicate_degree=2",
        "--parallelism.data_parallel_shard_degree=1",
        steps=2,
    )
    assert "Applied DDP to the model" in replicated.log.read_text()
    # Weights reach the linears in fp32 here and in bf16 under FSDP.
    assert largest_gap(replicated, fp8_from_bf16) < 0.005


def test_a_checkpoint_of_two_processes_is_exported(fp8: Run, corpus: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="writes safetensors, which the extra [export] brings")
    import export_fp8

    config = f"--job.config_file={launch.ROOT / 'configs' / 'debug_blockwise_fp8.toml'}"
    assets = f"--model.hf_assets_path={corpus / 'tokenizer'}"
    checkpoint, out = fp8.checkpoint(STEPS), tmp_path / "out"
    assert export_fp8.main([config, assets, f"--checkpoint={checkpoint}", f"--out={out}"]) == 0
    (file,) = out.glob("*.safetensors")
    exported = safetensors.load_file(file)
    master = {"layers.5.feed_forward.w1.weight": torch.empty(768, 256)}
    dcp.load(master, checkpoint_id=checkpoint, no_dist=True)
    w_q, w_dq = reference.quantize_128x128(*master.values())
    assert torch.equal(bits(exported["model.layers.5.mlp.gate_proj.weight"]), bits(w_q))
    assert torch.equal(exported["model.layers.5.mlp.gate_proj.weight_scale_inv"], w_dq)
    assert (out / "tokenizer.json").is_file()


def test_torchtitans_own_export_is_plain(train: Train, fp8: Run) -> None:
    """`checkpoint.last_save_in_hf`, of sharded weights that are gathered in fp8."""
    safetensors = pytest.importorskip("safetensors.torch")
    run = train(
        "debug_blockwise_fp8", *initial_load(fp8), "--checkpoint.last_save_in_hf", "--optimizer.lr=0", steps=1, nproc=2
    )
    (file,) = run.checkpoint(1).glob("*.safetensors")
    exported = safetensors.load_file(file)
    master = {"layers.5.feed_forward.w1.weight": torch.empty(768, 256)}
    dcp.load(master, checkpoint_id=fp8.checkpoint(STEPS), no_dist=True)
    assert torch.equal(exported["model.layers.5.mlp.gate_proj.weight"], *master.values())
    assert not any("scale" in key for key in exported)


@pytest.fixture(scope="module")
def alone(train: Train, corpus: Path) -> Run:
    validation = ("enable", "dataset=c4_test", f"dataset_path={corpus / 'corpus'}", "seq_len=64", "freq=4", "steps=2")
    return train(
        "debug_blockwise_fp8",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        "--checkpoint.no_last_save_model_only",
        *(f"--validation.{key}" for key in validation),
        steps=4,
        nproc=1,
    )


def test_one_process_with_validation(alone: Run) -> None:
    assert alone.losses[-1] < alone.losses[0] - 0.5
    logged = re.findall(r"validate step:\s*(\d+)\s+loss:\s*(\S+)", alone.log.read_text())
    losses = {int(step): float(loss) for step, loss in logged}
    assert losses[4] < alone.losses[0] - 0.5
    recorded = {record["step"]: record["loss"] for record in read(alone.folder / VALIDATION_FILE)}
    assert recorded == pytest.approx(losses, abs=1e-4)
    assert [record["step"] for record in read(alone.folder / METRICS_FILE)] == [1, 2, 3, 4]


@dataclass(frozen=True)
class Composition:
    """A run that goes on from another's checkpoint, on more processes and sharded in another way."""

    overrides: tuple[str, ...]
    nproc: int
    after: str
    """The fixture of the run that it continues, of as many data-parallel ranks."""
    step: int
    """After which step of that run."""
    says: str
    """In the log, where the parallelism is on."""
    rank: int = 0
    """Whose log has the loss."""


TENSOR = ("--parallelism.tensor_parallel_degree=2",)
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B")
CONTEXT = ("--parallelism.context_parallel_degree=2",)
FULL_AC = ("--activation_checkpoint.mode=full",)
COMPILED = ("--compile.enable", "--compile.components=model")
OFFLOAD = ("--training.enable_cpu_offload",)

COMPOSITIONS = {
    "TP, full AC": Composition((*TENSOR, *FULL_AC), 2, "alone", 2, "Applied Tensor Parallelism"),
    "PP": Composition(PIPELINE, 2, "alone", 2, "pp=2", rank=1),
    "FSDP2 x TP": Composition(TENSOR, 4, "fp8", 3, "Applied Tensor Parallelism"),
}
GPU_COMPOSITIONS = {
    "TP": Composition(TENSOR, 2, "alone_on_gpu", 3, "Applied Tensor Parallelism"),
    "TP, compiled": Composition((*TENSOR, *COMPILED), 2, "alone_on_gpu", 3, "Compiling each TransformerBlock"),
    "PP": Composition(PIPELINE, 2, "alone_on_gpu", 3, "pp=2", rank=1),
    "CP": Composition(CONTEXT, 2, "alone_on_gpu", 3, "Applied Context Parallel"),
    "CPU offload": Composition(OFFLOAD, 2, "fp8_on_gpus", 3, "Applied CPU Offloading"),
}


def gap_after_going_on(train: Train, before: Run, composition: Composition, device: str) -> float:
    """The largest relative difference of two steps' losses from those of the run that is continued."""
    run = train(
        "debug_blockwise_fp8",
        "--checkpoint.enable",
        f"--checkpoint.initial_load_path={before.checkpoint(composition.step)}",
        "--checkpoint.no_initial_load_model_only",
        *composition.overrides,
        steps=composition.step + 2,
        nproc=composition.nproc,
        device=device,
    )
    assert composition.says in run.log.read_text()
    losses = run.losses_of(composition.rank)
    assert [record["loss"] for record in read(run.folder / METRICS_FILE)] == pytest.approx(losses, abs=1e-5)
    return max(abs(x / y - 1) for x, y in zip(losses, before.losses[composition.step :][:2], strict=True))


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_a_composition_goes_on_as_the_run_before(
    train: Train, request: pytest.FixtureRequest, composition: Composition
) -> None:
    before: Run = request.getfixturevalue(composition.after)
    # Sums in another order; and TP or PP alone, which know no mixed precision, are fp32 where the other run has bf16.
    assert gap_after_going_on(train, before, composition, "cpu") < 5e-4


@pytest.fixture(scope="module")
def alone_on_gpu(train: Train) -> Run:
    return train("debug_blockwise_fp8", *FULL_CHECKPOINTS, steps=STEPS, nproc=1, device="cuda")


@pytest.fixture(scope="module")
def fp8_on_gpus(train: Train) -> Run:
    return train("debug_blockwise_fp8", *FULL_CHECKPOINTS, steps=STEPS, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), COMPILED], ids=["eager", "compiled"])
def test_fp8_trains_as_bf16_does_on_one_gpu(train: Train, overrides: tuple[str, ...]) -> None:
    bf16 = train("debug_bf16", *overrides, steps=STEPS, nproc=1, device="cuda")
    triton = "--blockwise_fp8.gemm_backend=triton"
    fp8 = train("debug_blockwise_fp8", triton, *overrides, steps=STEPS, nproc=1, device="cuda")
    log = fp8.log.read_text()
    assert "GEMM backend: triton on " in log and "42 of 43 Linears in fp8" in log
    assert ("Compiling each TransformerBlock" in log) == bool(overrides)
    assert fp8.losses[-1] < fp8.losses[0] - 0.5
    assert fp8.losses != bf16.losses
    assert largest_gap(fp8, bf16) < 0.005


@pytest.mark.gpus(2)
def test_fp8_trains_as_bf16_does_on_gpus(train: Train, fp8_on_gpus: Run) -> None:
    bf16 = train("debug_bf16", steps=STEPS, device="cuda")
    assert fp8_on_gpus.losses[-1] < fp8_on_gpus.losses[0] - 0.5
    assert fp8_on_gpus.losses != bf16.losses
    assert largest_gap(fp8_on_gpus, bf16) < 0.005


@pytest.mark.gpus(2)
@pytest.mark.parametrize("composition", GPU_COMPOSITIONS.values(), ids=GPU_COMPOSITIONS)
def test_a_composition_goes_on_as_the_run_before_on_gpus(
    train: Train, request: pytest.FixtureRequest, composition: Composition
) -> None:
    if set(TENSOR + COMPILED) <= set(composition.overrides) and not COMPILED_TP_WORKS:
        pytest.skip(f"torch {torch.__version__} cannot compile under tensor parallelism: the converter refuses it")
    before: Run = request.getfixturevalue(composition.after)
    assert gap_after_going_on(train, before, composition, "cuda") < 0.005


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    "overrides",
    [
        ["--compile.enable", "--compile.components=model"],
        ["--blockwise_fp8.fp8_all_gather=false"],
    ],
    ids=["compiled", "gathered in bf16"],
)
def test_fp8_gathers_on_gpus(train: Train, fp8_on_gpus: Run, overrides: list[str]) -> None:
    run = train("debug_blockwise_fp8", *overrides, steps=3, device="cuda")
    assert largest_gap(run, fp8_on_gpus) < 0.005
