"""The shapes that the kernel benchmarks measure: the Linears of Llama 3 and DeepSeek-V3, at several numbers of tokens."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")

FORWARD, WGRAD = "1x128_128x128", "1x128_1x128"  # y and dx; dw
Kind = Literal["1x128_128x128", "1x128_1x128"]


def llama(dim: int, hidden: int, tp: int = 1) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a block's Linears on one of tp ranks; wv is as wk, w3 as w1."""
    kv = 1024
    return {
        "wq": (dim // tp, dim),
        "wk": (kv // tp, dim),
        "wo": (dim, dim // tp),
        "w1": (hidden // tp, dim),
        "w2": (dim, hidden // tp),
    }


MODELS = {
    "8B": llama(4096, 14336),
    "70B": llama(8192, 28672),
    "405B": llama(16384, 53248),
    "70B/TP8": llama(8192, 28672, tp=8),
    "405B/TP8": llama(16384, 53248, tp=8),
    "DSv3": {
        "wq_a": (1536, 7168),
        "wq_b": (24576, 1536),
        "wkv_a": (576, 7168),
        "wkv_b": (32768, 512),
        "wo": (7168, 16384),
        "w1": (18432, 7168),
        "w2": (7168, 18432),
        "expert.w1": (2048, 7168),
        "expert.w2": (7168, 2048),
    },
}
SUITES = {
    "quick": (("8B", 16384), ("70B", 8192)),
    "llama": tuple(itertools.product(("8B", "70B"), (8192, 16384))),
    "full": tuple(itertools.product(MODELS, (4096, 8192, 16384))),
}


@dataclass(frozen=True)
class Shape:
    """One size to measure, and every place of the models that has it: uses, of which the first names it.

    A GEMM is a [M, K] times b [N, K] transposed, of a `Kind`. A tensor to quantise is [M, K] and an activation or gradient, "x",
    or a weight, "w"; its N is 0.
    """

    kind: Kind | Literal["x", "w"]
    M: int
    N: int
    K: int
    uses: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.uses[0]

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def size(self) -> str:
        return "x".join(str(n) for n in (self.M, self.N, self.K) if n)


def _merge(uses: Iterable[tuple[tuple[Any, int, int, int], str]]) -> list[Shape]:
    merged: dict[tuple[Any, int, int, int], list[str]] = {}
    for key, use in uses:
        merged.setdefault(key, []).append(use)
    return [Shape(*key, tuple(names)) for key, names in merged.items()]


def gemm_shapes(suite: Iterable[tuple[str, int]]) -> list[Shape]:
    """The three GEMMs of every Linear of these (model, tokens), each size once."""

    def uses() -> Iterator[tuple[tuple[Kind, int, int, int], str]]:
        for model, tokens in suite:
            for linear, (out, into) in MODELS[model].items():
                name = f"{model} {linear}.{{}} {tokens // 1024}k"
                yield (FORWARD, tokens, out, into), name.format("y")
                yield (FORWARD, tokens, into, out), name.format("dx")
                yield (WGRAD, out, into, tokens), name.format("dw")

    return _merge(uses())


def quantize_shapes(suite: Iterable[tuple[str, int]]) -> list[Shape]:
    """Input, output gradient and weight of every Linear of these (model, tokens), each size once."""

    def uses() -> Iterator[tuple[tuple[str, int, int, int], str]]:
        for model, tokens in suite:
            for linear, (out, into) in MODELS[model].items():
                name = f"{model} {linear}.{{}}"
                yield ("x", tokens, 0, into), f"{name.format('x')} {tokens // 1024}k"
                yield ("x", tokens, 0, out), f"{name.format('dy')} {tokens // 1024}k"
                yield ("w", out, 0, into), name.format("w")

    return _merge(uses())


def chosen(shapes: list[Shape], filters: Sequence[str]) -> list[Shape]:
    """Those with a use that contains one of the texts; all if there are no texts."""
    return [s for s in shapes if not filters or any(text in use for text in filters for use in s.uses)]


def spread_out(items: Sequence[Item]) -> list[Item]:
    """Reordered so that every beginning is spread evenly over the whole (van der Corput's sequence)."""
    bits = len(items).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]
