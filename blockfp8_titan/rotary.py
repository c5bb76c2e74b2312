"""RoPE of compiled Llama blocks in real numbers.

torchtitan computes it in complex ones, which inductor does not have: it leaves them to PyTorch's kernels, in fp32, between copies from and
to bf16. In real numbers a rotation of q or k is one kernel of inductor's, in forward and in backward.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor

_MODULES = [f"torchtitan.models.{name}.model.model" for name in ("llama3", "llama4")]
"""Whose Attention calls the module's apply_rotary_emb(xq, xk, freqs_cis, positions), which is `rotate` of both."""


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """RoPE of pairs of neighbours: (a + bi) (cos + i sin), computed in fp32 and rounded once.

    Args:
        x: [..., D], D even.
        freqs_cis: complex64, broadcastable to [..., D / 2].
    Returns:
        As x.
    """
    factors = torch.view_as_real(freqs_cis)
    cos, sin = factors[..., :1], factors[..., 1:]
    # Computed again in backward; of the signed sines as a tensor autograd would keep one for each block.
    signs = 2 * torch.arange(2, device=x.device) - 1
    pairs = x.float().unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * (signs * sin)).flatten(-2).type_as(x)


def has_complex_rope(model: nn.Module) -> bool:
    """Whether attention in a model computes RoPE as torchtitan's Llama 3 and 4 do, by torchtitan's own function."""
    return any(True for _ in _modules_of(model))


def rotate_in_real_numbers(model: nn.Module, wanted: bool = True) -> None:
    """Let compiled blocks of such a model compute RoPE by `rotate`, or by torchtitan's function again; eager ones go on as they did.

    The function belongs to the module of the model's class: all models of that class in this process share it.
    """
    for module in _modules_of(model):
        function = module.apply_rotary_emb
        original = function.__wrapped__ if function.__module__ == __name__ else function
        module.apply_rotary_emb = _in_real_numbers(original, module.reshape_for_broadcast) if wanted else original


def _modules_of(model: nn.Module) -> Iterator[ModuleType]:
    found = {type(part).__module__ for part in model.modules() if type(part).__name__ == "Attention"}
    for module in map(sys.modules.__getitem__, sorted(found.intersection(_MODULES))):
        function = module.apply_rotary_emb
        # Not what somebody else has put there, whatever it says that it wraps.
        torchtitans = function.__module__ == module.__name__ and not hasattr(function, "__wrapped__")
        if torchtitans or function.__module__ == __name__:
            yield module


@cache
def _in_real_numbers(
    original: Callable[..., tuple[Tensor, Tensor]], reshape_for_broadcast: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_emb(
        xq: Tensor, xk: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            return original(xq, xk, freqs_cis, positions)
        freqs_cis = reshape_for_broadcast(freqs_cis, xq[..., ::2], positions)
        return rotate(xq, freqs_cis), rotate(xk, freqs_cis)

    apply_rotary_emb.__wrapped__ = original
    return apply_rotary_emb
