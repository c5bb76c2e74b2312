"""Checks of weights gathered in fp8, on several processes that Gloo connects. Started by test_weight.py.

`python -m tests.sharded` runs the checks one after the other, each on the number of processes that it asks for, and prints a line
for each: its name and "ok" or the error. Processes are forked from one that has only imported: seven cost little more than two.
"""

import copy
import os
import sys
import tempfile
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from blockfp8_titan import BlockwiseFP8Linear, Recipe, reference, weight
from blockfp8_titan.weight import BlockwiseFP8Weight, GatheredFP8Weight, gather_in_fp8, refresh_scales

from .data import bits

CHECKS: dict[str, tuple[int, Callable[[], None]]] = {}


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
) -> nn.Module:
    """The model under FSDP2, blocks first; shape of the mesh: (replicas, ranks of a shard) or (ranks,)."""
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if fp8:
        for linear in linears(model):
            gather_in_fp8(linear, linear.recipe.scale_format)
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)}
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
    return [weight.plain_shard(linear.weight).full_tensor().detach() for linear in linears(model)]


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


def run(rank: int, world_size: int, folder: str, function: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    function()
    dist.barrier()
    dist.destroy_process_group()


def on_processes(world_size: int, function: Callable[[], None]) -> str:
    """ "ok" or the traceback of the first process that failed."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    run(rank, world_size, folder, function)
                    code = 0
                except BaseException:
                    with open(f"{folder}/error", "a") as file:
                        file.write(f"rank {rank}: {traceback.format_exc()}\n")
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if not any(codes):
            return "ok"
        errors = open(f"{folder}/error").read() if os.path.exists(f"{folder}/error") else ""
        return f"exit codes {codes}\n{errors}"


if __name__ == "__main__":
    for name, (world_size, function) in CHECKS.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            print(f"{name}: {on_processes(world_size, function)}", flush=True)
