"""What is wrong in a job's TOML: sections and keys that torchtitan does not have, values that its command line would refuse."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def check_keys(config_class: type, table: Mapping[str, Any], section: str = "") -> None:
    """Refuse a section or key that is not in the config, and a section that is no table.

    Args:
        config_class: the dataclass of the job's config or of one of its sections.
        table: the TOML, or what it holds for that section.
        section: its dotted name; "" for the whole.
    Raises:
        ValueError: names the section, the key, the nearest known ones and the way out.
    """
    known = {field.name: field.type for field in fields(config_class)}
    for key, value in table.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in known:
            where = f"[{section}] unknown key {key!r}" if section else f"unknown section [{key}]"
            raise ValueError(f"{where}{_nearest(key, known)} Correct or remove it")
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} = {value!r}: is a section; write its keys under [{name}]")
            check_keys(known[key], value, name)


def check_values(config: Any, section: str = "") -> None:
    """Refuse values of another type than the config declares: torchtitan checks those of the command line, not those of a TOML.

    Args:
        config: the job's config or one of its sections, a dataclass.
        section: its dotted name; "" for the whole.
    Raises:
        ValueError: names the section, the key, the value and the type.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(field.type) and is_dataclass(value):
            check_values(value, f"{section}.{field.name}".lstrip("."))
        elif not _is_a(value, field.type):
            raise ValueError(f"[{section}] {field.name} = {value!r}: must be {_in_words(field.type)}")


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}."


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as annotations write it; True for what is none of those that TOML can express."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_a(value, parts[0])
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, *parts) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind not in (str, bool, NoneType) or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _in_words(parts[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is list:
        return f"a list, each item {_in_words(*parts)}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "left out"}
    return words.get(kind, str(kind))
