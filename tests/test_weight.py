"""Weights that FSDP2 gathers in fp8: the checks of sharded.py, on 1 to 7 processes. Weights that are cached."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blockfp8_titan import Recipe
from blockfp8_titan.weight_cache import cache_weights, drop_cached_weights

from .sharded import CHECKS, Model, linears, outcomes_of

OF_ONE_SEED = [f"losses_of_{world_size}" for world_size in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of("tests.sharded")


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in OF_ONE_SEED])
def test_on_processes(outcomes, name):
    assert "error" not in outcomes[name], outcomes[name]["error"]


def test_losses_do_not_depend_on_the_number_of_processes(outcomes):
    runs = [outcomes[name]["result"] for name in OF_ONE_SEED]
    assert runs[0][-1] < runs[0][0] / 1.5
    for losses in runs[1:]:
        assert max(abs(a / b - 1) for a, b in zip(runs[0], losses, strict=True)) < 1e-4


class Calls(TorchDispatchMode):
    """Counts the calls of ops, by name."""

    def __enter__(self):
        self.count = Counter()
        super().__enter__()
        return self.count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def caching(wgrad="fp8"):
    """A model that caches, and its twin that does not."""
    model = Model(blocks=1, recipe=Recipe(wgrad=wgrad, scale_format="pow2"))
    plain = copy.deepcopy(model)
    cache_weights(model)
    return model, plain


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


def assert_same(model, plain):
    x = torch.randn(24, 144)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(plain, x), strict=True))


@pytest.mark.parametrize("wgrad", ["fp8", "bf16", "fp8_block"])
def test_cached_weights_change_no_number(wgrad):
    model, plain = caching(wgrad)
    assert_same(model, plain)
    assert_same(model, plain)


def test_weights_are_quantised_and_transposed_once():
    model, _ = caching()
    with Calls() as count:
        for _ in range(3):
            gradients(model, torch.randn(24, 144))
    assert count["blockfp8::quantize_128x128_both"] == 2
    assert count["blockfp8::quantize_128x128"] == count["blockfp8::transpose_fp8"] == 0
    drop_cached_weights(model)
    assert all(linear.cached_weight.tensors is None for linear in linears(model))
    copied = copy.deepcopy(model)
    gradients(model, torch.randn(24, 144))
    assert all(linear.cached_weight.tensors is None for linear in linears(copied))


CHANGES = {
    "AdamW": lambda model: stepped(model, foreach=True),
    "fused AdamW": lambda model: stepped(model, fused=True),
    "init": lambda model: [nn.init.trunc_normal_(linear.weight) for linear in linears(model)],
    "load_state_dict": lambda model: model.load_state_dict({k: -v for k, v in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict({k: -v for k, v in model.state_dict().items()}, assign=True),
    "replaced": lambda model: [
        setattr(linear, "weight", nn.Parameter(linear.weight.detach() + 1)) for linear in linears(model)
    ],
    "dtype": lambda model: model.bfloat16().float(),
    "in place": lambda model: [linear.weight.neg_() for linear in linears(model)],
}


def stepped(model, **options):
    gradients(model, torch.ones(8, 144))
    with torch.enable_grad():
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()


@pytest.mark.parametrize("compiled", [False, True])
def test_changes_of_a_cached_weight_are_noticed(compiled):
    torch._dynamo.reset()
    model, plain = caching()
    blocks = model.layers[0]
    if compiled:
        model.layers.register_module("0", torch.compile(blocks, backend="aot_eager", fullgraph=True))
    for name, change in CHANGES.items():
        assert_same(model, plain)
        torch.manual_seed(0)
        with torch.no_grad() if "AdamW" not in name else torch.enable_grad():
            change(model)
            state = {key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()}
            plain.load_state_dict(state)
        x = torch.randn(24, 144)
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(plain, x), strict=True)), name
        if not compiled:
            with torch.no_grad():
                linears(model)[0].weight.mul_(2)
                linears(plain)[0].weight.mul_(2)
            # A block by itself, without the model's hook.
            assert torch.equal(model.layers[0](x), plain.layers[0](x))


def test_steps_do_not_compile_again():
    torch._dynamo.reset()
    model, _ = caching()
    model.layers.register_module("0", torch.compile(model.layers[0], backend="aot_eager", fullgraph=True))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            gradients(model, torch.randn(24, 144))
        optimizer.step()
        drop_cached_weights(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_inference_mode_has_cached_can_be_trained_with(compiled):
    model, plain = caching("fp8")
    if compiled:
        torch._dynamo.reset()
        model.layers.register_module("0", torch.compile(model.layers[0], backend="aot_eager", fullgraph=True))
    x = torch.randn(24, 144)
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert_same(model, plain)


@pytest.mark.gpu
def test_cached_weights_stay_where_they_are():
    """Of launches by other addresses nothing is remembered."""
    model, _ = caching("fp8")
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

    def addresses():
        return [tensor.data_ptr() for linear in linears(model) for tensor in linear.cached_weight.tensors]

    seen = []
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):  # without the holes that other tests have left
        for _ in range(4):
            gradients(model, torch.randn(24, 144, device="cuda"))
            seen.append(addresses())
            optimizer.step()
    assert seen[1] == seen[2] == seen[3]
