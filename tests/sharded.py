"""Checks of weights gathered in fp8, on several processes that Gloo connects. Started by test_weight.py.

`python -m tests.sharded` runs the checks one after the other, each on the number of processes that it asks for, and prints a JSON
line for each: its name and what it returned, or the error. Processes are forked from one that has only imported: seven cost
little more than two.
"""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from blockfp8_titan import BlockwiseFP8Linear, Recipe, convert_model, reference, weight
from blockfp8_titan.weight import BlockwiseFP8Weight, GatheredFP8Weight, gather_in_fp8, refresh_scales

from .data import bits
from .llama import VOCABULARY, model_of

CHECKS: dict[str, tuple[int, Callable[[], object]]] = {}


def check(world_size: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[function.__name__] = (world_size, function)
        return function

    return register


class Block(nn.Module):
    def __init__(self, K: int, N: int, recipe: Recipe) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.up = BlockwiseFP8Linear(K, N, bias=False, recipe=recipe)
        self.down = BlockwiseFP8Linear(N, K, recipe=recipe)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks of two fp8 linears each; equal on every process."""

    def __init__(self, K: int = 144, N: int = 272, blocks: int = 2, recipe: Recipe = Recipe()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(K, N, recipe) for _ in range(blocks))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def linears(model: nn.Module) -> list[BlockwiseFP8Linear]:
    return [module for module in model.modules() if isinstance(module, BlockwiseFP8Linear)]


def shard(
    model: nn.Module,
    *,
    fp8: bool = True,
    shape: tuple[int, ...] | None = None,
    param_dtype: torch.dtype | None = None,
    reshard: bool = True,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """The model under FSDP2, blocks first; shape of the mesh: (replicas, ranks of a shard) or (ranks,)."""
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if fp8:
        for linear in linears(model):
            gather_in_fp8(linear, linear.recipe.scale_format)
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)}
    if offload_policy:
        options["offload_policy"] = offload_policy
    for layer in model.layers:
        fully_shard(layer, **options, reshard_after_forward=reshard)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no averages
    return model


def gathered(model: nn.Module) -> list[GatheredFP8Weight]:
    """The gathered weights; the model stays unsharded."""
    for layer in model.layers:
        layer.unshard()
    weights = [linear.weight for linear in linears(model)]
    assert all(isinstance(w, GatheredFP8Weight) for w in weights), [type(w) for w in weights]
    return weights


def check_bitwise(model: nn.Module, masters: list[Tensor], scale_format: str = "fp32") -> None:
    """What is gathered is what one process quantises."""
    for w, master in zip(gathered(model), masters, strict=True):
        w_q, w_dq = reference.quantize_128x128(master, scale_format)
        assert torch.equal(bits(w.w_q), bits(w_q)) and torch.equal(bits(w.w_dq), bits(w_dq)), tuple(master.shape)
    for layer in model.layers:
        layer.reshard()


def inputs(step: int = 0, K: int = 144) -> Tensor:
    """Of one process; different ones draw different numbers."""
    return torch.randn(24, K, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() for p in model.parameters()]


def masters(model: nn.Module) -> list[Tensor]:
    return [weight.plain_shard(linear.weight).full_tensor().detach().clone() for linear in linears(model)]


def check_ranks(world: int) -> None:
    """Shards of 1, 5, 64, 96, 448 and 1000 rows a rank, even and uneven."""
    for rows, missing, K in ((1, 0, 16), (64, 0, 272), (96, 16, 144), (448, 0, 16), (1000, 8, 16), (128, 0, 256)):
        N = rows * world - missing
        for scale_format, dtype in (("fp32", torch.float32), ("pow2", torch.bfloat16)):
            if N % 16:
                N += -N % 16
            model = Model(K, N, 1, Recipe(scale_format=scale_format)).to(dtype)
            expected = [linear.weight.detach().clone() for linear in linears(model)]
            check_bitwise(shard(model), expected, scale_format)


@check(3)
def three_uneven_ranks_gather_what_one_quantises() -> None:
    check_ranks(3)


@check(2)
def two_ranks_gather_what_one_quantises() -> None:
    check_ranks(2)


@check(1)
def one_rank_gathers_what_it_quantises() -> None:
    model = shard(Model())
    check_bitwise(model, masters(model))
    check_changes(model, ["fused AdamW"])


def train(model: nn.Module, steps: int = 3, parts: int = 1, **options: object) -> list[float]:
    """Losses; the same data whatever the number of processes: `24 * 12` rows in all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    world, rank = dist.get_world_size(), dist.get_rank()
    losses = []
    for step in range(steps):
        x = torch.randn(1536, 144, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in x.chunk(parts):
            loss = model(part).float().square().sum() / 1536
            loss.backward()
            total += loss.detach()
        optimizer.step()
        refresh_scales(model)
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


@check(3)
def fp8_gathers_change_no_number() -> None:
    """With fp32 as param_dtype both kinds of gather quantise the same numbers."""
    runs = {}
    for fp8 in (True, False):
        for reshard in (True, False):
            model = shard(Model(), fp8=fp8, reshard=reshard)
            losses = train(model)
            runs[fp8, reshard] = [torch.tensor(losses), *whole(model)]
    first = runs.pop((True, True))
    assert first[0][-1] < first[0][0] / 1.5, first[0]
    for other in runs.values():
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class Collectives:
    """Counts what a `with` block sends: calls of all_reduce, bytes that all-gathers leave on this process."""

    def __enter__(self) -> "Collectives":
        self.all_reduces, self.gathered_bytes = 0, 0
        self.originals = {
            name: getattr(dist, name)
            for name in ("all_reduce", "all_gather_into_tensor", "all_gather_single")  # the last is torch 2.13's
            if hasattr(dist, name)
        }
        for name, original in self.originals.items():
            setattr(dist, name, self.counting(name, original))
        return self

    def counting(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if name == "all_reduce":
                self.all_reduces += 1
            else:
                self.gathered_bytes += (args[0] if args else kwargs["output_tensor"]).nbytes
            return original(*args, **kwargs)

        return call

    def __exit__(self, *exception: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


@check(3)
def nan_and_inf_reach_every_rank_and_only_their_blocks() -> None:
    model = shard(Model(N=400, blocks=1))
    for linear in linears(model):
        poisoned = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
        for row, poison in ((1, torch.nan), (-1, torch.inf), (poisoned.shape[0] // 2, -torch.inf)):
            poisoned[row, 5] = poison
        with torch.no_grad():
            linear.weight.copy_(distribute_tensor(poisoned, linear.weight.device_mesh, linear.weight.placements))
    check_bitwise(model, masters(model))
    up = gathered(model)[0].dequantize()
    assert up[:128, :128].isnan().all() and up[:, 128:].isfinite().all()


def optimizer_step(**options: object) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def each_weight(change: Callable[[DTensor], object]) -> Callable[[nn.Module], None]:
    def change_all(model: nn.Module) -> None:
        for linear in linears(model):
            change(linear.weight)

    return change_all


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() * 2 for name, tensor in state.items()}


def read_in_place(model: nn.Module) -> None:
    """A checkpoint read into what state_dict() returns, and no load_state_dict after it."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save(doubled(get_model_state_dict(model)), checkpoint_id=folder[0])
    dcp.load(get_model_state_dict(model), checkpoint_id=folder[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "copy_": each_weight(lambda w: w.copy_(w * 2)),
    "trunc_normal_": each_weight(nn.init.trunc_normal_),
    "AdamW": optimizer_step(foreach=True),
    "fused AdamW": optimizer_step(fused=True),
    "AdamW one by one": optimizer_step(foreach=False),
    ".data": each_weight(lambda w: w.data.mul_(2)),
    "detached": each_weight(lambda w: w.detach().mul_(2)),
    "local tensor": each_weight(lambda w: w._local_tensor.mul_(2)),
    "to_local": each_weight(lambda w: w.to_local().mul_(2)),
    "slice": each_weight(lambda w: w[:, 16:48].mul_(2)),
    "transposed local tensor": each_weight(lambda w: w.to_local().t().mul_(2)),
    "parts of .data": each_weight(lambda w: [part.mul_(2) for part in w.data.split(100, 1)]),
    "chunks of .data": each_weight(lambda w: [part.mul_(2) for part in w.data.chunk(2, 1)]),
    "transposed .data": each_weight(lambda w: w.data.t().mul_(2)),
    "view of .data": each_weight(lambda w: w.data.unsqueeze(0).mul_(2)),
    "rows of the local tensor's .data": each_weight(lambda w: [row.mul_(2) for row in w.to_local().data]),
    "parts of the local tensor's .data": each_weight(lambda w: [part.mul_(2) for part in w.to_local().data.split(7)]),
    "all_reduce": each_weight(lambda w: dist.all_reduce(w.to_local()[:32])),
    "broadcast": each_weight(lambda w: dist.broadcast(w.to_local()[:32].mul_(2), 0)),
    "state dict": lambda model: [tensor.mul_(2) for tensor in model.state_dict().values()],
    "load_state_dict": lambda model: model.load_state_dict(doubled(model.state_dict())),
    "assigned": lambda model: model.load_state_dict(doubled(model.state_dict()), assign=True),
    "set_model_state_dict": lambda model: set_model_state_dict(model, doubled(get_model_state_dict(model))),
    "read in place": read_in_place,
}


def check_changes(model: nn.Module, changes: Iterable[str]) -> None:
    check_bitwise(model, masters(model))
    for name in changes:
        before = masters(model)
        with torch.no_grad():
            CHANGES[name](model)
        after = masters(model)
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
        try:
            check_bitwise(model, after)
        except AssertionError as error:
            raise AssertionError(f"change by {name}") from error


@check(3)
def every_change_is_noticed() -> None:
    model = shard(Model(blocks=1))
    check_changes(model, CHANGES)
    with Collectives() as unchanged:
        check_bitwise(model, masters(model))
    assert unchanged.all_reduces == 0


@check(2)
def a_change_on_one_rank_is_shared_by_asking_for_it() -> None:
    model = shard(Model(blocks=1))
    check_bitwise(model, masters(model))
    with torch.no_grad():
        if dist.get_rank() == 1:
            linears(model)[0].weight.to_local().mul_(3)
    with Collectives() as asked:
        refresh_scales(model)
    assert asked.all_reduces == 1
    check_bitwise(model, masters(model))


@check(7)
def ranks_without_rows_notice_what_the_others_do() -> None:
    """16 rows on 7 ranks: 3, 3, 3, 3, 3, 1, 0."""
    model = shard(Model(K=16, N=144, blocks=1))
    assert (linears(model)[1].weight.to_local().numel() == 0) == (dist.get_rank() == 6)
    check_changes(model, ("fused AdamW", ".data", "load_state_dict", "read in place", "copy_"))


@check(2)
def one_byte_per_element_and_one_all_reduce_per_step() -> None:
    K, N = 256, 384
    elements = sum(linear.weight.numel() for linear in linears(Model(K, N)))
    others = sum(p.numel() for p in Model(K, N).parameters()) - elements
    for fp8, bytes_per_element in ((True, 1), (False, 2)):
        model = shard(Model(K, N), fp8=fp8, param_dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        model(inputs(K=K)).float().sum().backward()
        for _ in range(2):
            with Collectives() as sent:
                for microbatch in range(3):
                    model(inputs(microbatch, K)).float().sum().backward()
                optimizer.step()
                refresh_scales(model)
            assert sent.all_reduces == (1 if fp8 else 0)
            # Each microbatch gathers for forward and, but for what is still there, for backward.
            gathers = sent.gathered_bytes / (elements * bytes_per_element + 2 * others)
            assert gathers == round(gathers) and 3 <= gathers <= 6, gathers
            assert all(linear.weight.grad.dtype == torch.float32 for linear in linears(model))


@check(2)
def compiled_and_recomputed_blocks_change_no_number() -> None:
    options = {"param_dtype": torch.bfloat16}

    @cache
    def eager(recipe: Recipe) -> list[float]:
        return train(shard(Model(blocks=1, recipe=recipe), **options), steps=2)

    saved = {torch.ops.blockfp8.gemm_1x128_128x128.default}

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    selective = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}
    for wgrad, recompute, compiled in (
        ("fp8", {}, False),
        ("fp8", selective, False),
        ("fp8", None, True),
        ("fp8", {}, True),
        ("fp8", selective, True),
        ("bf16", None, True),
        ("fp8_block", selective, True),
    ):
        torch._dynamo.reset()
        recipe = Recipe(wgrad=wgrad)
        model = Model(blocks=1, recipe=recipe)
        block = model.layers[0]
        if recompute is not None:
            block = checkpoint_wrapper(block, preserve_rng_state=False, **recompute)
        if compiled:
            block = torch.compile(block, backend="aot_eager", fullgraph=True)
        model.layers.register_module("0", block)
        model = shard(model, **options)
        assert train(model, steps=2) == eager(recipe), (wgrad, recompute, compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(model, steps=2)


@check(2)
def accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole_batch, accumulated = train(shard(Model())), train(shard(Model()), parts=3)
    assert max(abs(a / b - 1) for a, b in zip(whole_batch, accumulated, strict=True)) < 1e-5


@check(4)
def hybrid_shards_gather_what_one_quantises() -> None:
    model = shard(Model(), shape=(2, 2))
    train(model, steps=2)
    check_bitwise(model, masters(model))


@check(2)
def meta_models_are_copied_and_made() -> None:
    with torch.device("meta"):
        model = Model()
    for linear in linears(model):
        gather_in_fp8(linear, "fp32")
    copied = copy.deepcopy(model)
    assert all(isinstance(linear.weight, BlockwiseFP8Weight) for linear in linears(copied))
    model = shard(copied, fp8=False)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.trunc_normal_(parameter)
    check_bitwise(model, masters(model))
    assert train(model)[-1] > 0


@check(2)
def copies_have_a_memory_of_their_own() -> None:
    linear = Model().layers[0].up
    gather_in_fp8(linear, "pow2")
    copied = copy.deepcopy(linear)
    assert isinstance(copied.weight, BlockwiseFP8Weight) and isinstance(copied.weight, nn.Parameter)
    assert copied.weight.requires_grad and copied.weight.scale_format == "pow2"
    with torch.no_grad():
        copied.weight.zero_()
    assert linear.weight.abs().sum() > 0 and not copied.weight.any()
    gather_in_fp8(linear, "pow2")
    assert type(linear.weight.master) is Tensor
    file = io.BytesIO()
    torch.save({"linear": linear, "weight": linear.weight.detach()}, file)
    assert b"BlockwiseFP8Weight" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded["linear"].weight) is nn.Parameter and type(loaded["weight"]) is Tensor
    assert torch.equal(loaded["linear"].weight, linear.weight.master)


@check(3)
def checkpoints_hold_plain_tensors() -> None:
    """The state dict is taken once, before the first step, as torchtitan does; shards are uneven."""
    model = shard(Model())
    state = get_model_state_dict(model)
    assert all(type(t) is DTensor and type(t.to_local()) is Tensor for t in state.values())
    assert state.keys() == Model().state_dict().keys()
    train(model, steps=2)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.async_save(state, checkpoint_id=folder[0]).result()
    resumed, plain = shard(Model()), shard(Model(), fp8=False)
    for other in (resumed, plain):
        train(other, steps=1)
        loaded = get_model_state_dict(other)
        dcp.load(loaded, checkpoint_id=folder[0])
        set_model_state_dict(other, loaded)
        assert all(torch.equal(a, b) for a, b in zip(whole(other), whole(model), strict=True))
    assert train(resumed) == train(plain)
    # Copies of the parameters, an average of them say, are saved plain as well.
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loaded = {name: torch.zeros_like(parameter) for name, parameter in saved.items()}
    dcp.save({"average": saved}, checkpoint_id=f"{folder[0]}/average")
    dcp.load({"average": loaded}, checkpoint_id=f"{folder[0]}/average")
    assert all(torch.equal(a.full_tensor(), saved[name].full_tensor()) for name, a in loaded.items())
    dist.barrier()
    if dist.get_rank() == 0:
        missing = min(Path(folder[0]).glob("*.distcp"))
        missing.unlink()
    dist.barrier()
    try:
        dcp.load(get_model_state_dict(resumed), checkpoint_id=folder[0])
    except CheckpointException as error:
        assert ".distcp" in str(error) and folder[0] in str(error)
    else:
        raise AssertionError("no error")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@check(2)
def offloaded_weights_are_gathered_too() -> None:
    model = shard(Model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert train(model) == train(shard(Model()))
    check_bitwise(model, masters(model))


@check(2)
def weights_that_cannot_be_gathered_in_fp8_are_named() -> None:
    model = Model(blocks=1)
    linears(model)[0].fqn = "up"
    gather_in_fp8(linears(model)[0], "fp32")
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    with pytest.raises(
        ValueError, match=r"up: its weight \[272, 144\] is cut into \[272, 72\]: a weight gathered in fp8"
    ):
        model(inputs())
    model = Model(blocks=1)
    linears(model)[0].fqn = "up"
    shard(model).half()
    with pytest.raises(ValueError, match="up: its weight has become torch.float16: must be torch.bfloat16 or"):
        model.layers[0].unshard()


@check(2)
def a_gathered_weight_reads_as_dequantised_and_refuses_writes() -> None:
    model = shard(Model(), param_dtype=torch.bfloat16)
    w = gathered(model)[0]
    assert w.dtype == torch.bfloat16 and w.shape == (272, 144)
    assert torch.equal(w + 0, w.dequantize()) and torch.equal(w.t(), w.dequantize().t())
    assert type(torch.zeros_like(w)) is Tensor
    with torch.no_grad():
        for write in (w.zero_, lambda: torch._foreach_mul_([w], 2)):
            try:
                write()
            except RuntimeError as error:
                assert "would write to a weight gathered in fp8" in str(error)
            else:
                raise AssertionError("no error")


@check(2)
def fused_blocks_may_consist_of_several_units() -> None:
    """FSDP2 casts what a unit receives, and finds nothing to cast in an activation that is quantised."""
    norms = {}
    for unit in ("", "attention", "feed_forward", "attention.wq", "feed_forward.w1"):
        model = model_of(layers=2, dtype=torch.float32)
        report = convert_model(model)
        assert all(fusion.fused for fusion in report.fusions)
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
        for block in model.layers.values():
            if unit:
                fully_shard(block.get_submodule(unit), **options)
            fully_shard(block, **options)
        fully_shard(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        tokens = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
        model(tokens).float().square().mean().backward()
        norms[unit] = torch.nn.utils.get_total_norm([p.grad.full_tensor() for p in model.parameters()]).item()
    assert len(norms) == 5 and max(norms.values()) / min(norms.values()) < 1.01, norms


def losses_from_one_seed() -> list[float]:
    return train(shard(Model(K=144, N=400)) if dist.get_world_size() > 1 else Model(K=144, N=400))


for world_size in (1, 2, 3, 4):
    CHECKS[f"losses_of_{world_size}"] = (world_size, losses_from_one_seed)


def run(rank: int, world_size: int, folder: str, function: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    result = function()
    dist.barrier()
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    dist.destroy_process_group()


def on_processes(world_size: int, function: Callable[[], object]) -> dict[str, object]:
    """{"result": rank 0's} or {"error": the tracebacks}."""
    with tempfile.TemporaryDirectory() as folder:
        children = set()
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run(rank, world_size, folder, function)
                    code = 0
                except BaseException:
                    Path(folder, f"error_{rank}").write_text(f"rank {rank}: {traceback.format_exc()}\n")
                finally:
                    os._exit(code)
            children.add(child)
        failed = False
        while children:
            child, status = os.wait()
            children.discard(child)
            if status and not failed:
                failed = True
                for other in children:  # they wait for the one that failed
                    os.kill(other, signal.SIGTERM)
        if failed:
            return {"error": "".join(file.read_text() for file in sorted(Path(folder).glob("error_*"))) or "killed"}
        return {"result": json.loads(Path(folder, "result").read_text())}


def outcomes_of(module: str) -> dict[str, dict[str, object]]:
    """Run a module of such checks in a process of its own, without GPUs: name -> the check's line."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


if __name__ == "__main__":
    for name, (world_size, function) in CHECKS.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            print(json.dumps({"name": name} | on_processes(world_size, function)), flush=True)
