"""What bench_linear.py measures: Linears and blocks of Llama 3 under every converter, one forward and backward at a time."""

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gpu_trace
import torch
import torch.nn as nn
from shapes import FORWARD, WGRAD, Kind
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama3.model.model import TransformerBlock, precompute_freqs_cis

from blockfp8_titan import Recipe, convert_model
from blockfp8_titan.numerics import relative_error

Mode = Literal["eager", "compiled"]
MODES: tuple[Mode, ...] = ("eager", "compiled")
BF16 = "bf16"
SEQUENCE = 8192
ERROR_BOUND = 0.08
"""Relative error of y, dx and dw against bf16. Rounding both operands of a GEMM costs 0.038 of normal data with e4m3, and 0.059
with e5m2, in which torchao's tensorwise recipe has dy."""
BLOCK_ERROR_BOUND = 0.2
"""The same of a block, whose gradients pass through several GEMMs and a softmax: twice what blocks of the debug model show."""

# What is measured

ATTENTION, FEED_FORWARD = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
SUBJECTS = ("linears", "block", *ATTENTION, *FEED_FORWARD)


class Linears(nn.Module):
    """The seven Linears of a block under their names there, without what lies between them."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.attention = nn.ModuleDict({name: getattr(block.attention, name) for name in ATTENTION})
        self.feed_forward = nn.ModuleDict({name: getattr(block.feed_forward, name) for name in FEED_FORWARD})

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor, gated: Tensor) -> tuple[Tensor, ...]:
        attention = *(self.attention[name](x) for name in ("wq", "wk", "wv")), self.attention["wo"](attended)
        feed_forward = *(self.feed_forward[name](normed) for name in ("w1", "w3")), self.feed_forward["w2"](gated)
        return *attention, *feed_forward


class Single(nn.Module):
    """One Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(x),)


class Block(nn.Module):
    """A whole block, with rotary embedding, causal, of sequences as long as its frequencies."""

    def __init__(self, block: TransformerBlock, freqs_cis: Tensor):
        super().__init__()
        self.block = block
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.block(x, self.freqs_cis, None),)


@dataclass
class Subject:
    """A module in bf16, its inputs, the gradients of its outputs, and the sizes (out, in) of its Linears."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    bound: float


def subject_of(name: str, flavor: str, tokens: int, device: torch.device) -> Subject:
    """Random bf16 weights (torchtitan's initialisation) and data.

    Args:
        name: of `SUBJECTS`.
        flavor: of torchtitan's Llama 3.
        tokens: rows of a Linear's input; a block takes them as sequences of 8192.
    """
    args = llama3_args[flavor]
    with torch.device(device):
        block = TransformerBlock(0, args)
        with torch.no_grad():
            block.init_weights()
        block.to(torch.bfloat16)
        if name == "block":
            length = min(tokens, SEQUENCE)
            module: nn.Module = Block(block, precompute_freqs_cis(args.dim // args.n_heads, length, args.rope_theta))
            shapes = [(tokens // length, length, args.dim)]
        elif name == "linears":
            module = Linears(block)
            into = (block.attention.wq, block.attention.wo, block.feed_forward.w1, block.feed_forward.w2)
            shapes = [(tokens, linear.in_features) for linear in into]
        else:
            linear = getattr(block.attention if name in ATTENTION else block.feed_forward, name)
            module, shapes = Single(linear), [(tokens, linear.in_features)]
        inputs = tuple(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        with torch.no_grad():
            gradients = tuple(torch.randn_like(y) for y in module(*inputs))
    sizes = tuple((m.out_features, m.in_features) for m in module.modules() if isinstance(m, nn.Linear))
    return Subject(module, inputs, gradients, sizes, BLOCK_ERROR_BOUND if name == "block" else ERROR_BOUND)


# Candidates


def _ours(**recipe: Any) -> Callable[[nn.Module], None]:
    def convert(module: nn.Module) -> None:
        convert_model(module, [{"match": "*", "action": "convert"}], recipe=Recipe(**recipe))

    return convert


def _torchao(recipe: str | None) -> Callable[[nn.Module], None]:
    def convert(module: nn.Module) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe) if recipe else Float8LinearConfig()
        convert_to_float8_training(module, config=config)

    return convert


def _torchao_blockwise(module: nn.Module) -> None:
    from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Float8BlockwiseLinear.from_float(child))


@dataclass(frozen=True)
class Converter:
    """How a module is converted in place, and whose GEMMs in `candidates.GEMMS` bound its speed; dw: the kind of its dw GEMM;
    tunes: seconds that its kernels tune themselves for a subject's shapes, about."""

    convert: Callable[[nn.Module], None]
    roof: str
    dw: Kind = WGRAD
    tunes: float = 0.0


CONVERTERS = {
    BF16: Converter(lambda module: None, "bf16"),
    "blockwise_fp8": Converter(_ours(), "cublas"),
    "blockwise_fp8 wgrad=fp8_block": Converter(_ours(wgrad="fp8_block"), "cublas", FORWARD),
    "float8_tensorwise": Converter(_torchao(None), "tensorwise"),
    "float8_rowwise": Converter(_torchao("rowwise"), "rowwise"),
    "torchao_blockwise": Converter(_torchao_blockwise, "cublas", tunes=150.0),
}


@contextlib.contextmanager
def as_torchtitan_compiles(name: str) -> Iterator[None]:
    """For rowwise, torchtitan has inductor round where eager mode does."""
    with torch._inductor.config.patch(emulate_precision_casts=name == "float8_rowwise"):
        yield


def compiled(module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """module's forward under torch.compile, with a code object of its own: Dynamo keeps its cache, and its limit, by code object."""

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return module(*inputs)

    forward.__code__ = forward.__code__.replace(co_name="forward_compiled")
    return torch.compile(forward, fullgraph=True)


class Step:
    """One forward and backward of a candidate."""

    def __init__(self, module: nn.Module, subject: Subject, mode: Mode):
        self.module = module
        self.inputs = tuple(x.detach().requires_grad_() for x in subject.inputs)
        self.gradients = subject.gradients
        self.forward: Callable[..., tuple[Tensor, ...]] = compiled(module) if mode == "compiled" else module

    def __call__(self) -> None:
        torch.autograd.backward(self.forward(*self.inputs), self.gradients)
        for tensor in itertools.chain(self.module.parameters(), self.inputs):
            tensor.grad = None

    def results(self) -> list[Tensor]:
        """Outputs, then gradients of the inputs and of the parameters."""
        outputs = self.forward(*self.inputs)
        torch.autograd.backward(outputs, self.gradients)
        found = [y.detach() for y in outputs]
        for tensor in itertools.chain(self.inputs, self.module.parameters()):
            assert tensor.grad is not None
            found.append(tensor.grad)
            tensor.grad = None
        return found

    def saved(self) -> dict[str, int]:
        """Bytes that autograd keeps from forward to backward: storages, each counted once, without parameters and buffers.

        saved_bytes: all of them. saved_weight_bytes: those in a parameter's shape or its transpose, quantised weights.
        """
        own = {t.untyped_storage().data_ptr() for t in itertools.chain(self.module.parameters(), self.module.buffers())}
        shapes = {tuple(p.shape) for p in self.module.parameters()} | {
            tuple(p.shape)[::-1] for p in self.module.parameters()
        }
        shapes -= {tuple(tensor.shape) for tensor in (*self.inputs, *self.gradients)}
        kept: dict[int, int] = {}
        weights: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            for inner in plain_tensors(tensor):
                storage = inner.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                    if tuple(inner.shape) in shapes:
                        weights[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.forward(*self.inputs)
        del outputs
        return {"saved_bytes": sum(kept.values()), "saved_weight_bytes": sum(weights.values())}


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor subclass is made of; a plain tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def largest_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest relative error; NaN where a tensor holds NaN."""
    errors = [relative_error(a, b) for a, b in zip(exact, found, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def memory_of(step: Step) -> dict[str, int]:
    """Bytes that the allocator holds between forward and backward besides outputs, and the peak of a step, above what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = step.forward(*step.inputs)
    held = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in outputs)
    del outputs
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"held_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def kernels_of(step: Step) -> dict[str, Any]:
    """The kernels of a step: their number, and µs by group."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        summary = gpu_trace.summarise(gpu_trace.read_trace(path))
    groups = {group: row["ms"] * 1e3 for group, row in summary["groups"].items()}
    return {"launches": summary["launches"], "group_us": groups, "kernels": summary["kernels"]}
