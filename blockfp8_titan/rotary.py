"""RoPE of compiled blocks in real numbers.

Inductor has no complex ones: it runs PyTorch's kernels on them, in fp32, between copies from and to bf16. Without, each rotation of q or
k, forward and backward, is one kernel that reads and writes bf16.
"""

import functools
import inspect
import sys
from types import ModuleType

import torch
from torch import Tensor
from torchtitan.protocols.train_spec import get_train_spec


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
    pairs = x.float().unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * torch.cat((-sin, sin), -1)).flatten(-2).type_as(x)


def has_complex_rotary_embedding(model_name: str) -> bool:
    """Whether a torchtitan model family computes RoPE as Llama 3 and 4 do, by a function of its module."""
    module = _module_of(model_name)
    function = getattr(module, "apply_rotary_emb", None)
    return (
        function is not None
        and hasattr(module, "reshape_for_broadcast")
        and [*inspect.signature(function).parameters] == ["xq", "xk", "freqs_cis", "positions"]
    )


@functools.cache
def rotate_in_real_numbers(model_name: str) -> None:
    """Let compiled blocks of a torchtitan model family compute RoPE by `rotate`; eager ones, and other kinds of RoPE, go on as they did.

    The function that blocks call belongs to the family's module, and serves all its models in this process.
    """
    if not has_complex_rotary_embedding(model_name):
        return
    module = _module_of(model_name)
    original, reshape_for_broadcast = module.apply_rotary_emb, module.reshape_for_broadcast

    @functools.wraps(original)
    def apply_rotary_emb(
        xq: Tensor, xk: Tensor, freqs_cis: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            return original(xq, xk, freqs_cis, positions)
        freqs_cis = reshape_for_broadcast(freqs_cis, xq[..., ::2], positions)
        return rotate(xq, freqs_cis), rotate(xk, freqs_cis)

    module.apply_rotary_emb = apply_rotary_emb


def _module_of(model_name: str) -> ModuleType:
    return sys.modules[get_train_spec(model_name).model_cls.__module__]
