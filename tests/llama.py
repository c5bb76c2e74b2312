"""Small models of torchtitan's, steps of them, and what a step calls and keeps."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.protocols.train_spec import get_train_spec

from blockfp8_titan.numerics import sqnr

VOCABULARY = 2048


class CountOps(TorchDispatchMode):
    """Counts the calls of our ops and of aten.mm."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(func)
        return func(*args, **(kwargs or {}))

    def count(self, func):
        if func.namespace == "blockfp8" or func is torch.ops.aten.mm.default:
            self.calls[func.__name__.removesuffix(".default")] += 1

    @property
    def gemms(self):
        return sum(count for name, count in self.calls.items() if name.startswith("gemm") or name == "mm")

    @property
    def quantisations(self):
        """Calls that quantise activations or gradients."""
        return sum(
            count
            for name, count in self.calls.items()
            if "quantize_1x128" in name or name == "quantize_128x128_columns"
        )


def model_of(
    name: str = "llama3", layers: int = 2, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **sizes: int
):
    """The debug flavor of a model, with so many layers; the same weights at every call."""
    spec = get_train_spec(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = spec.model_cls(dataclasses.replace(spec.model_args["debugmodel"], n_layers=layers, **sizes))
        with torch.no_grad():
            model.init_weights()
            for parameter in model.parameters():  # ones in norms and zeros would hide mistakes
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                # Not model.to(dtype), which takes complex rotary frequencies for real ones.
                parameter.data = parameter.data.to(dtype)
    return model


def tokens_for(model: nn.Module, sequences: int = 2, length: int = 64) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, length), device=next(model.parameters()).device)


def step(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The output, as "y", and the gradient of every parameter."""
    model.zero_grad()
    y = model(tokens)
    # Some of the outputs, so that gradients are not all alike.
    y[..., ::7].float().square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def names_as_eager(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of a step of a compiled model under the names that they have in the model."""
    return {name.replace("_orig_mod.", ""): value for name, value in values.items()}


def gradients(module, x, dy):
    """Output, gradients of x and of the parameters of a module."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def worst(truth, values):
    """The least SQNR of these values, in dB."""
    assert truth.keys() == values.keys()
    return min(sqnr(truth[name], values[name]) for name in truth)


def graph_calls(graph: fx.GraphModule) -> CountOps:
    """What a graph would call."""
    count = CountOps()
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            count.count(node.target)
    return count


def graph_outputs(graph: fx.GraphModule) -> list[Tensor]:
    """What a graph returns that it was not given, as fake tensors."""
    (node,) = graph.graph.find_nodes(op="output")
    outputs = [value for value in node.args[0] if isinstance(value, fx.Node) and value.op != "placeholder"]
    return [value.meta["val"] for value in outputs if isinstance(value.meta["val"], Tensor)]


def recording(graphs: list[fx.GraphModule]) -> Callable[..., Any]:
    """A backend of torch.compile, up to inductor's own work: what is left runs as it is partitioned.

    Args:
        graphs: receives the graphs of forward and backward, from the first step on.
    """

    def keep(graph: fx.GraphModule, inputs: Iterable[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


def compile_blocks(model: nn.Module) -> list[fx.GraphModule]:
    """Compile each block as torchtitan does, in place, by `recording`, whose graphs are returned."""
    graphs: list[fx.GraphModule] = []
    backend = recording(graphs)
    for name, block in model.layers.named_children():
        model.layers.register_module(name, torch.compile(block, fullgraph=True, backend=backend))
    return graphs


def saved_bytes(run: Callable[[], object], *, without: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of what runs, each memory once; without these tensors' own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())
