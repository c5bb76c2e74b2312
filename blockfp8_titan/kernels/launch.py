"""How a kernel that is compiled already is started, with the least host time."""

from collections.abc import Callable
from copy import copy
from functools import partial
from types import CellType, FunctionType
from typing import Any

from triton import knobs
from triton.runtime import driver


def start(compiled: Any, device: int, grid: tuple[int, int, int], args: list[Any] | tuple[Any, ...]) -> None:
    """`compiled[grid](*args)`, by the call that Triton's own launches end with: it spares a closure and calls of empty hooks.

    Args:
        compiled: what launching a kernel returned: a triton.compiler.CompiledKernel.
        device: the index of the current device.
        args: for all parameters, constants too; addresses may stand for tensors.
    """
    if _is_hooked():
        compiled[grid](*args)
        return
    run = compiled.run
    stream = driver.active.get_current_stream(device)
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def repeatable(compiled: Any, device: int, grid: tuple[int, int, int], args: tuple[Any, ...]) -> Callable[[], None]:
    """A function that does what `start` does with these arguments, as often as it is called.

    Tensor maps among the arguments are encoded once, which in each of Triton's launches takes longer than the driver's launch.

    Args:
        args: as for `start`; they are kept, so none may be a tensor.
    """
    found = _last_call(compiled, grid, args)
    if found is None:
        return partial(start, compiled, device, grid, args)
    launch, before, after = found

    def repeat() -> None:
        if _is_hooked():
            compiled[grid](*args)
        else:
            launch(*before, driver.active.get_current_stream(device), *after)

    return repeat


def _is_hooked() -> bool:
    """Whether a profiler wants to be told of launches. A hook that is no chain of hooks counts as one."""
    hooks = knobs.runtime
    return bool(getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True))


def _last_call(
    compiled: Any, grid: tuple[int, int, int], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]] | None:
    """The function that Triton's launcher ends up calling, and its arguments before and after the stream.

    The launcher wraps that function in one that makes tensor maps of descriptors. What it would be given is found by running the
    wrapper around a function that takes notes: the order of arguments differs from version to version. None where the launcher is
    built in another way, or has memory to allocate for each launch.
    """
    launcher = compiled.run
    wrapper = getattr(launcher, "launch", None)
    if not isinstance(wrapper, FunctionType) or "launcher" not in wrapper.__code__.co_freevars:
        return None
    # GSan counts launches among the arguments.
    if any(getattr(launcher, name, None) != 0 for name in ("global_scratch_size", "profile_scratch_size")) or getattr(
        launcher, "gsan_enabled", False
    ):
        return None
    calls: list[tuple[Any, ...]] = []
    cells = list(wrapper.__closure__ or ())
    at = wrapper.__code__.co_freevars.index("launcher")
    launch = cells[at].cell_contents
    cells[at] = CellType(lambda *call: calls.append(call))
    noting = copy(launcher)
    noting.launch = FunctionType(wrapper.__code__, wrapper.__globals__, closure=tuple(cells))
    stream = object()
    noting(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    found = [(call, i) for call in calls for i, arg in enumerate(call) if arg is stream]
    if len(calls) != 1 or len(found) != 1:
        return None
    call, at = found[0]
    return launch, call[:at], call[at + 1 :]
