"""Registration of the ops with torch.library, and the checks that they share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..formats import ALIGNMENT

FLOATS = (torch.bfloat16, torch.float32)
"""What is quantised, and what GEMMs return."""

_library = torch.library.Library("blockfp8", "DEF")

Observer = Callable[[str, tuple[Any, ...], Any], None]
"""Is told an op's name (with its overload), its arguments and what it returned."""

_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Call it after each op that computes, in compiled code too; None ends that. It must leave arguments and results alone."""
    global _observer
    _observer = observer


def _observed(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(implementation)
    def run(*args: Any) -> Any:
        result = implementation(*args)
        if _observer is not None:
            _observer(name, args, result)
        return result

    return run


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
    _library.impl(name, _observed(name, reference), "CompositeExplicitAutograd")
    _library.impl(name, _observed(name, cuda), "CUDA")
    torch.library.register_fake(f"blockfp8::{name}", fake, lib=_library)


_on_current_device = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it x's."""
    return _on_current_device if x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)


_compiled: dict[tuple[object, ...], Any] = {}


@cache
def kernels(module: str) -> ModuleType:
    """A module of `kernels`, imported on first use: Triton may be missing, and import statements cost host time in every call."""
    return import_module(f"..kernels.{module}", __package__)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Tensor | int | float, ...],
    constants: tuple[int | bool, ...] = (),
    **options: int | bool | None,
) -> None:
    """Launch a Triton kernel, remembering what it was compiled to.

    Triton's own search for the specialisation that fits the arguments costs more host time than the launch itself.

    Args:
        grid: all three dimensions.
        args: the kernel's first parameters, a tensor first.
        constants: its others, all tl.constexpr.
        options: num_warps and its like; they must follow from kernel, device and constants.
    """
    device = args[0].get_device()
    values: list[int | float] = []
    # What Triton compiles differently for: a tensor's dtype and alignment; 1, multiples of 16 and 64-bit numbers. The function
    # stands for its kernel, whose hash costs a microsecond.
    key: list[object] = [kernel.fn, device, constants]
    for arg in args:
        if isinstance(arg, int):
            values.append(arg)
            key.append((arg % 16 == 0) + 2 * (arg == 1) + 4 * (arg >= 2**31))
        elif isinstance(arg, float):
            values.append(arg)
        else:
            # Addresses spare the launcher a call of the driver for each tensor.
            values.append(address := arg.data_ptr())
            key += (arg.dtype, address % 16 == 0)
    compiled = _compiled.get(found := tuple(key))
    with on_device_of(args[0]):
        if compiled is None:
            _compiled[found] = kernel[grid](*args, *constants, **options)
        else:
            kernels("launch").start(compiled, device, grid, (*values, *constants))


def check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless x is a matrix of one of these dtypes that autograd does not follow; name is the argument's."""
    if x.dtype in dtypes and x.dim() == 2 and not x.requires_grad:
        return  # the usual case, by the cheapest questions
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which a quantising op does not have: call it under torch.no_grad() or detach {name}; "
            "BlockwiseFP8Linear is differentiable"
        )
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be 2D; flatten leading dimensions first")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}: must be {' or '.join(map(str, dtypes))}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError unless value is one of choices; name is the argument's."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")


def check_aligned(name: str, x: Tensor, dim: int) -> None:
    """Raises ValueError unless x's size in this dimension is a positive multiple of 16."""
    size = x.shape[dim]
    if size % ALIGNMENT or size == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: dimension {dim} must be a positive multiple of {ALIGNMENT}; pad it with zeros"
        )
