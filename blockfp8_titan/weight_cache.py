"""The weight of a blockwise-fp8 linear that nothing shards: quantised once, and used until it changes."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .recipe import Recipe
from .weight import LastWrite


class CachedWeight:
    """An unsharded weight as it was quantised last: e4m3 payload [N, K], multipliers, and the payload transposed for dx.

    Two bytes per element. Under torch.compile nothing can be asked about the weight, so that only `refresh_cached_weights`, in a
    hook of the whole model, fills the cache, and compiled code trusts what it finds there.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, Tensor, Tensor] | None = None
        self._quantized_from: tuple[object, ...] | None = None

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """w_q, w_dq and wt_q; None where they are not those of this weight as it is now."""
        fresh = torch.compiler.is_compiling() or self._quantized_from == _state(weight)
        return self.tensors if fresh else None

    def refresh(self, weight: Tensor, recipe: Recipe) -> None:
        if self.of(weight) is not None or weight.is_meta:
            return
        # First, so that the new ones take their memory: launches are remembered by addresses, and with the old still there the weights
        # of a model would move into each other's places at every step.
        self.clear()
        # Autograd keeps what is cached, and refuses what inference mode has made.
        with torch.inference_mode(False), torch.no_grad():
            self.tensors = ops.quantize_128x128_both(
                weight.detach(), recipe.scale_format, backend=recipe.quantize_backend
            )
        self._quantized_from = _state(weight)

    def clear(self) -> None:
        self.tensors = self._quantized_from = None


def cache_weights(model: nn.Module) -> None:
    """Keep the quantised weights of a model's blockwise-fp8 linears until they change: with gradient accumulation they are quantised
    once, and transposed once, in a step.

    Changes are noticed when the model's forward begins: the step of any torch.optim.Optimizer, nn.init, load_state_dict and every
    other in-place operation on a parameter that PyTorch counts, which one on its `.data` is not. A compiled block that is called
    by itself, not through this model, does not notice an in-place change made since the model's last forward, unless by
    `drop_cached_weights` or load_state_dict.

    Args:
        model: the whole of it, not compiled itself (its blocks may be); without FSDP2 or tensor parallelism. Its copies cache too.
    """
    for linear in _caching_linears(model):
        linear.cached_weight = CachedWeight()
    _watch_optimizers()
    model.register_forward_pre_hook(refresh_cached_weights)


@torch.no_grad()
def refresh_cached_weights(model: nn.Module, args: Any = ()) -> None:
    """Quantise those weights that have changed: a forward pre-hook."""
    for linear in _caching_linears(model):
        if linear.cached_weight is not None:
            linear.cached_weight.refresh(linear.weight, linear.recipe)


def drop_cached_weights(*modules: nn.Module) -> None:
    """Free the quantised weights of these modules; the next forward of the model makes them again."""
    for linear in itertools.chain.from_iterable(map(_caching_linears, modules)):
        if linear.cached_weight is not None:
            linear.cached_weight.clear()


def _caching_linears(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "cached_weight"))


def _state(weight: Tensor) -> tuple[object, ...]:
    """What changes when a plain weight does."""
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device, _optimizer_steps.time


_optimizer_steps = LastWrite()


@cache
def _watch_optimizers() -> None:
    """Count the steps of all optimizers: fused ones write to parameters without counting up their versions."""
    register_optimizer_step_post_hook(lambda *_: _optimizer_steps.tick())
