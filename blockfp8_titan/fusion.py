"""Which modules of a model quantise what they compute, for the linears after them: known ones of torchtitan's models, by class name."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn as nn

from .activation import alteration
from .feed_forward import Member, fuse_feed_forward, obstacle
from .fqns import collapse
from .norm import quantize_output_of
from .recipe import Fuse, Recipe, SwiGLUInputs

_MODELS = "torchtitan.models"
_LLAMA_LIKE = [f"{_MODELS}.{name}.model.model" for name in ("llama3", "llama4", "qwen3")]
_DEEPSEEK = f"{_MODELS}.deepseek_v3.model.model"
_NORMS = {"attention_norm": "attention", "ffn_norm": "feed_forward"}

BLOCKS: Mapping[str, Mapping[str, str]] = {f"{module}.TransformerBlock": _NORMS for module in (*_LLAMA_LIKE, _DEEPSEEK)}
"""Of these classes: the norms, and which member of the block is handed a norm's result, alone and untouched."""

FEED_FORWARDS: Collection[str] = [
    *(f"{module}.FeedForward" for module in _LLAMA_LIKE),
    f"{_MODELS}.moe.moe.FeedForward",  # deepseek_v3's dense one, and shared experts
]
"""Classes whose forward is w2(silu(w1(x)) * w3(x))."""

CONSUMERS: Mapping[str, Collection[str]] = {
    **{f"{module}.Attention": ("wq", "wk", "wv") for module in _LLAMA_LIKE},
    f"{_DEEPSEEK}.Attention": ("wq", "wq_a", "wkv_a"),  # the first or the second
    **{name: ("w1", "w3") for name in FEED_FORWARDS},
}
"""Classes whose forward does nothing with x but ask for its shape and hand it to these linears."""


@dataclass(frozen=True)
class Fusion:
    """A module that could quantise what it computes."""

    fqn: str
    kind: Literal["norm", "feed_forward"]
    linears: tuple[str, ...]
    """FQNs: of a norm, the linears that multiply its result; of a feed-forward w1, w3 and w2."""
    fused: bool
    reason: str
    """Why it is not fused."""
    swiglu_inputs: SwiGLUInputs | None = None
    """Of a fused feed-forward: what it keeps for backward, see `feed_forward.gated_feed_forward`."""


def plan_fusions(
    model: nn.Module, recipes: Mapping[str, Recipe], fuse: Fuse, swiglu_inputs: SwiGLUInputs
) -> tuple[Fusion, ...]:
    """Look for modules that can quantise, without a change to the model.

    Args:
        model: before or after its Linears are swapped.
        recipes: of the Linears in fp8, by any of their FQNs.
        fuse: "off" gives that as the reason against every one.
        swiglu_inputs: of the feed-forwards.
    """
    names: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[module] = names.get(module, 0) + 1
    fusions = []
    for fqn, module in model.named_modules():
        for name, into in BLOCKS.get(_class_name(module), {}).items():
            fusions.append(_plan_norm(module, fqn, name, into, recipes, names))
        if _class_name(module) in FEED_FORWARDS:
            fusions.append(_plan_feed_forward(module, fqn, recipes, swiglu_inputs))
    if fuse == "off":
        return tuple(Fusion(f.fqn, f.kind, f.linears, False, 'fuse = "off"') for f in fusions)
    return tuple(fusions)


def apply_fusions(model: nn.Module, fusions: Collection[Fusion]) -> None:
    """Make the modules that a plan says quantise, in place, once the Linears are swapped; parameters and names stay as they are."""
    for fusion in fusions:
        if fusion.fused and fusion.kind == "norm":
            quantize_output_of(model.get_submodule(fusion.fqn), model.get_submodule(fusion.linears[0]).recipe)
        elif fusion.fused:
            assert fusion.swiglu_inputs is not None
            fuse_feed_forward(model.get_submodule(fusion.fqn), fusion.swiglu_inputs)


def describe_fusions(fusions: Collection[Fusion]) -> Iterator[str]:
    """Lines for a table; modules that differ in layer numbers only share one."""
    by_name = collapse(
        fusions,
        lambda f: (f.kind, f.fused, f.reason, f.swiglu_inputs, tuple(name.split(".")[-1] for name in f.linears)),
    )
    for fqn, group in by_name:
        first = group[0]
        if not first.fused:
            yield f"not fused: {fqn}: {first.reason}"
        elif first.kind == "norm":
            yield f"fused: {fqn} quantises for {', '.join(name.split('.')[-1] for name in first.linears)}"
        else:
            kept = "; keeps w1(x) and w3(x) in e4m3 for backward" if first.swiglu_inputs == "fp8" else ""
            yield f"fused: {fqn} quantises silu(w1(x)) * w3(x), and in backward the gradients of w1(x) and w3(x){kept}"


def _plan_norm(
    block: nn.Module,
    block_fqn: str,
    name: str,
    into: str,
    recipes: Mapping[str, Recipe],
    names: Mapping[nn.Module, int],
) -> Fusion:
    fqn = _join(block_fqn, name)
    norm, consumer = getattr(block, name, None), getattr(block, into, None)
    if consumer is None or _class_name(consumer) not in CONSUMERS:
        reason = f"its block has no {into}" if consumer is None else f"{into} is an unknown {type(consumer).__name__}"
        return Fusion(fqn, "norm", (), False, reason)
    linears = {
        n: linear for n in CONSUMERS[_class_name(consumer)] if (linear := getattr(consumer, n, None)) is not None
    }
    fqns = tuple(_join(block_fqn, into, n) for n in linears)
    reason = _norm_obstacle(norm) or _forward_obstacle(block, "its block") or _alteration_of(consumer, into)
    if not reason and names[norm] > 1:
        reason = "the model holds it under two names"
    if not reason:
        reason = _linears_obstacle(norm, linears, [recipes.get(linear_fqn) for linear_fqn in fqns])
    return Fusion(fqn, "norm", fqns, not reason, reason)


def _norm_obstacle(norm: nn.Module | None) -> str:
    if type(norm) is not nn.RMSNorm:
        return f"a {type(norm).__name__}, not an nn.RMSNorm"
    if norm.weight is None:
        return "it has no weight"
    if norm.eps is None:
        return "its eps depends on its input's dtype"
    return _alteration_of(norm, "it")


def _alteration_of(module: nn.Module, name: str) -> str:
    return f"{name} has {altered}" if (altered := alteration(module)) else _forward_obstacle(module, name)


def _forward_obstacle(module: nn.Module, name: str) -> str:
    """A forward that stands before its class's, or that somebody has put into the class from elsewhere."""
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    written_in = getattr(vars(owner)["forward"], "__globals__", {}).get("__name__")
    unaltered = written_in == owner.__module__ and "forward" not in vars(module)
    return "" if unaltered else f"{name} has a forward of its own"


def _linears_obstacle(norm: nn.RMSNorm, linears: Mapping[str, nn.Module], recipes: list[Recipe | None]) -> str:
    for (name, linear), recipe in zip(linears.items(), recipes, strict=True):
        if recipe is None:
            return f"{name} is not in fp8"
        if altered := _alteration_of(linear, name):
            return altered
        if recipe.wgrad == "bf16":
            return f"{name} has wgrad = {recipe.wgrad!r}"
        if not recipe.quantizes_like(recipes[0]):
            return f"{name} wants its input quantised in another way than {next(iter(linears))}"
        if tuple(norm.normalized_shape) != (linear.in_features,):
            return f"it does not normalise over the in_features of {name}"
    if not any(linear.weight.requires_grad for linear in linears.values()):
        return f"{', '.join(linears)} are frozen"
    return ""


def _plan_feed_forward(
    module: nn.Module, fqn: str, recipes: Mapping[str, Recipe], swiglu_inputs: SwiGLUInputs
) -> Fusion:
    gate, down, up = (Member(getattr(module, name), recipes.get(_join(fqn, name))) for name in ("w1", "w2", "w3"))
    reason = _alteration_of(module, "it") or obstacle(gate, down, up)
    linears = tuple(_join(fqn, n) for n in ("w1", "w3", "w2"))
    return Fusion(fqn, "feed_forward", linears, not reason, reason, None if reason else swiglu_inputs)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
