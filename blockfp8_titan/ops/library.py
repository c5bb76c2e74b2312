"""Registration of the ops with torch.library, and the checks that they share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..formats import ALIGNMENT

_library = torch.library.Library("blockfp8", "DEF")


def define(
    schema: str, *, reference: Callable[..., object], cuda: Callable[..., object], fake: Callable[..., object]
) -> None:
    """Define `blockfp8::<schema>`.

    Library.define instead of `torch.library.custom_op`: a third of its host time per call.

    Args:
        reference: for every device but CUDA.
        cuda: for CUDA tensors.
        fake: results of the same shapes, dtypes and strides, without data.
    """
    # Exact strides: inductor must neither re-lay an operand nor assume another layout of a result.
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    name = schema.partition("(")[0]
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"blockfp8::{name}", fake, lib=_library)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it x's."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless x is a matrix of one of these dtypes; name is the argument's."""
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be 2D; flatten leading dimensions first")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}: must be {' or '.join(map(str, dtypes))}")


def check_aligned(name: str, x: Tensor, dim: int) -> None:
    """Raises ValueError unless x's size in this dimension is a positive multiple of 16."""
    if x.shape[dim] % ALIGNMENT or x.shape[dim] == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: dimension {dim} must be a positive multiple of {ALIGNMENT}; pad it with zeros"
        )
