"""blockfp8_titan.job_file: unknown keys and values of another type, in torchtitan's own config and in ours."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from torchtitan.config import JobConfig

from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.job_file import check_keys, check_values


@dataclass
class Inner:
    names: list[str] = field(default_factory=list)
    nested: list[list[str]] | None = None
    mode: Literal["a", "b"] = "a"


@dataclass
class Section:
    count: int = 1
    rate: float = 1.0
    limit: float | int = 1
    on: bool = False
    path: str | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass
class Config:
    section: Section = field(default_factory=Section)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sections": {}}, "unknown section [sections], did you mean 'section'? Correct or remove it"),
        ({"x": 1}, "unknown section [x]; there are section. Correct or remove it"),
        ({"section": {"cuont": 1}}, "[section] unknown key 'cuont', did you mean 'count'? Correct or remove it"),
        ({"section": {"inner": {"moode": 1}}}, "[section.inner] unknown key 'moode', did you mean 'mode'?"),
        ({"section": 3}, "section = 3: is a section; write its keys under [section]"),
        ({"section": {"inner": "a"}}, "section.inner = 'a': is a section; write its keys under [section.inner]"),
    ],
)
def test_an_unknown_key_is_named(table, message):
    with pytest.raises(ValueError) as error:
        check_keys(Config, table)
    assert str(error.value).startswith(message)


def test_known_keys_pass():
    check_keys(Config, {"section": {"count": 1, "inner": {"mode": "b"}}})
    check_keys(Config, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "1"}, "[section] count = '1': must be an integer"),
        ({"count": 1.0}, "[section] count = 1.0: must be an integer"),
        ({"count": True}, "[section] count = True: must be an integer"),
        ({"count": None}, "[section] count = None: must be an integer"),
        ({"rate": "fast"}, "[section] rate = 'fast': must be a number"),
        ({"limit": True}, "[section] limit = True: must be a number or an integer"),
        ({"on": 1}, "[section] on = 1: must be true or false"),
        ({"path": ["x"]}, "[section] path = ['x']: must be a string or left out"),
        ({"inner": Inner(names="a")}, "[section.inner] names = 'a': must be a list, each item a string"),
        ({"inner": Inner(names=["a", 1])}, "[section.inner] names = ['a', 1]: must be a list, each item a string"),
        ({"inner": Inner(mode="c")}, "[section.inner] mode = 'c': must be one of 'a', 'b'"),
        ({"inner": Inner(nested=["a"])}, "[section.inner] nested = ['a']: must be a list, each item a list,"),
    ],
)
def test_a_value_of_another_type_is_named(values, message):
    with pytest.raises(ValueError) as error:
        check_values(Config(Section(**values)))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "config",
    [
        Config(Section(rate=1, limit=0.5, path="x", inner=Inner(["a"], [["b"], []], "b"))),
        JobConfig(),
        BlockwiseFP8(rules=[{"match": "*", "wgrad": "bf16"}]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_values_of_the_declared_types_pass(config):
    check_values(config)
