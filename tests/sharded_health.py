"""fp8 health under FSDP2, on two processes that Gloo connects. Started by test_health.py: `python -m tests.sharded_health` prints a
JSON line for each check, its name and the error if there was one."""

import itertools
import json

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from blockfp8_titan import Recipe
from blockfp8_titan.health import Observation

from .measured import assert_alike, expected, watch
from .sharded import Model, inputs, linears, masters, on_processes, shard


def of_all_ranks(tensors: list[Tensor]) -> list[Tensor]:
    everyones: list[list[Tensor]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, tensors)
    return list(itertools.chain.from_iterable(everyones))


def check(*, fp8: bool, reshard: bool, dtype: torch.dtype | None = None, N: int = 272, wgrad: str = "fp8") -> None:
    """Two steps, of which the second is observed: two micro-batches, with validation before."""
    model = shard(Model(N=N, recipe=Recipe(wgrad=wgrad)), fp8=fp8, reshard=reshard, param_dtype=dtype)
    names = [name for name, module in model.named_modules() if module in linears(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    observation = Observation(lambda: [model])
    for step in range(2):
        observed = step == 1
        if observed:
            # What FSDP2 gathers: master weights, or these rounded.
            weights = dict(zip(names, masters(model), strict=True))
            if not fp8 and dtype is not None:
                weights = {name: w.to(dtype) for name, w in weights.items()}
            seen = watch(model)
            observation.start()
            with torch.no_grad():
                model.eval()(torch.randn(8, 144, generator=generator))
            model.train()
        for rows in (24, 40):
            model(torch.randn(rows, 144, generator=generator)).float().square().mean().backward()
        if observed:
            observation.stop()
        optimizer.step()
        optimizer.zero_grad()
    health = observation.collect()
    everyones = {
        name: {role: of_all_ranks(list(kept)) for role, kept in tensors.items()} for name, tensors in seen.items()
    }
    assert all(len(kept) == 4 for tensors in everyones.values() for kept in tensors.values())
    assert_alike(health, expected(everyones, weights))


def check_compiled(*, fp8: bool) -> None:
    """Compiled and recomputed blocks beside eager ones."""
    tallies = []
    for compiled in (False, True):
        model = Model(blocks=1)
        if compiled:
            for name, block in list(model.layers.named_children()):
                block = torch.compile(checkpoint_wrapper(block, preserve_rng_state=False), backend="aot_eager")
                model.layers.register_module(name, block)
        model = shard(model, fp8=fp8, param_dtype=torch.bfloat16)
        observation = Observation(lambda model=model: [model])
        for observed in (False, True):
            if observed:
                observation.start()
            model(inputs()).float().square().mean().backward()
            observation.stop()
        tallies.append(observation._tallies)
    eager, compiled = tallies
    assert len(eager) == 2 * 3 and eager.keys() == compiled.keys()
    for key, tally in eager.items():
        assert torch.allclose(compiled[key], tally, rtol=1e-9, atol=0), key


CHECKS = {
    "fp8 gathers": lambda: check(fp8=True, reshard=True),
    "fp8 gathers, weights kept after forward": lambda: check(fp8=True, reshard=False, dtype=torch.bfloat16),
    "fp8 gathers, shards that end within blocks": lambda: check(fp8=True, reshard=True, N=352, wgrad="fp8_block"),
    "bf16 gathers": lambda: check(fp8=False, reshard=True, dtype=torch.bfloat16),
    "bf16 gathers, x in blocks for dw": lambda: check(fp8=False, reshard=True, dtype=torch.bfloat16, wgrad="fp8_block"),
    "fp8 gathers, compiled and recomputed": lambda: check_compiled(fp8=True),
    "bf16 gathers, compiled and recomputed": lambda: check_compiled(fp8=False),
}

if __name__ == "__main__":
    for name, function in CHECKS.items():
        print(json.dumps({"name": name} | on_processes(2, function)), flush=True)
