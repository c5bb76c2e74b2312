"""Names that differ in numbers only, as one."""

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """What has a fully qualified name, such as "layers.0.attention.wq"."""

    @property
    def fqn(self) -> str: ...


N = TypeVar("N", bound=Named)


def collapse(items: Iterable[N], alike: Callable[[N], Hashable]) -> list[tuple[str, list[N]]]:
    """Group items equal but for the numbers in their FQNs, under names such as "layers.{0-31}.attention.wq".

    Numbers are merged position by position, from the right, and only among names equal elsewhere: a group's name stands for
    exactly the items in it.

    Args:
        alike: of an item, what the items of a group have in common.
    """
    groups = {(tuple(item.fqn.split(".")), alike(item)): [item] for item in items}
    for position in reversed(range(max((len(parts) for parts, _ in groups), default=0))):
        families: dict[Any, dict[str, list[N]]] = {}
        for (parts, common), members in groups.items():
            number = parts[position] if position < len(parts) and parts[position].isdecimal() else ""
            pattern = (*parts[:position], None, *parts[position + 1 :]) if number else parts
            families.setdefault((pattern, common), {})[number] = members
        groups = {
            (tuple(_ranges(by_number) if part is None else part for part in pattern), common): [
                item for members in by_number.values() for item in members
            ]
            for (pattern, common), by_number in families.items()
        }
    return [(".".join(parts), members) for (parts, _), members in groups.items()]


def _ranges(numbers: Collection[str]) -> str:
    """["0", "1", "2", "5"] -> "{0-2,5}"; a single number stays as it is."""
    if len(numbers) == 1:
        return next(iter(numbers))
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
