"""How FSDP2 would split and gather a model's weights over many ranks: arithmetic on shapes, no process and no data."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn

from .conversion import ConversionReport, gather_obstacles
from .formats import BLOCK, ceil_div

HEADER = ("weight", "count", "rows/rank", "last rank's", "ranks without", "on blocks", "gathered in")


@dataclass(frozen=True)
class Shards:
    """The weights in fp8 of one shape [N, K], gathered alike, each cut along N as `torch.chunk` cuts it."""

    shape: tuple[int, int]
    count: int
    """How many weights of the model have this shape."""
    rows: int
    """Of the first rank: ceil(N / ranks)."""
    last_rows: int
    """Of the last rank that has any."""
    empty_ranks: int
    """Ranks without a row: they gather, and hold nothing."""
    on_blocks: bool
    """Every cut falls between two 128x128 blocks, so that no rank needs another's rows to scale its own."""
    gathered_in: str
    """"float8_e4m3fn", or the dtype fallen back to."""


@dataclass(frozen=True)
class Sharding:
    """A model on one number of FSDP ranks.

    Bytes are those that an all-gather of every parameter leaves on each rank, FSDP2's padding of uneven shards included. A
    forward makes one; the backward another where parameters are resharded after forward.
    """

    ranks: int
    weights: tuple[Shards, ...]
    fallbacks: int
    """Weights of Linears in fp8 that are not gathered in fp8."""
    gathered_bytes: int
    """As this job gathers."""
    gathered_bytes_unquantised: int
    """With every parameter in training.mixed_precision_param."""
    scale_table_bytes: int
    """fp32 multipliers of all weights gathered in fp8, which every rank holds."""

    def to_table(self) -> str:
        """Aligned text, a line for each shape."""
        lines = [HEADER]
        for shards in self.weights:
            n, k = shards.shape
            cells = (shards.count, shards.rows, shards.last_rows, shards.empty_ranks)
            lines.append((f"{n} x {k}", *map(str, cells), "yes" if shards.on_blocks else "no", shards.gathered_in))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            f"{self.ranks} FSDP ranks (a step gathers the model in forward, and again in backward where FSDP reshards)"
        ]
        text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        share = self.gathered_bytes / self.gathered_bytes_unquantised if self.gathered_bytes_unquantised else 1.0
        text.append(
            f"one all-gather of the model: {_gigabytes(self.gathered_bytes)}, {share:.1%} of "
            f"{_gigabytes(self.gathered_bytes_unquantised)} unquantised; fallbacks: {self.fallbacks or 'none'}; "
            f"scale table: {self.scale_table_bytes / 1e6:.2f} MB"
        )
        return "\n".join(text)


def simulate(
    model: nn.Module, report: ConversionReport, ranks: int, *, param_dtype: torch.dtype, fp8_all_gather: bool
) -> Sharding:
    """Cut every parameter of a model over the ranks of one FSDP mesh.

    Args:
        model: unsharded, on any device, meta included.
        report: which of its Linears compute in fp8.
        ranks: of the mesh that parameters are sharded over; HSDP's replicas do not count.
        param_dtype: that FSDP gathers everything else in.
        fp8_all_gather: gather the weights of Linears in fp8 as e4m3, their multipliers being known beforehand.
    Raises:
        ValueError: ranks < 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    as_they_are = gather_obstacles(model, report) if fp8_all_gather else {row.fqn for row in report.rows}
    weights = {
        f"{row.fqn}.weight": (row.shape, param_dtype if row.fqn in as_they_are else torch.float8_e4m3fn)
        for row in report.rows
        if row.in_fp8
    }
    gathered = unquantised = 0
    for name, parameter in model.named_parameters():
        padded = _rows(parameter.shape[0], ranks) * ranks * parameter[0].numel()
        _, dtype = weights.get(name, (None, param_dtype))
        gathered += padded * dtype.itemsize
        unquantised += padded * param_dtype.itemsize
    in_fp8 = [shape for shape, dtype in weights.values() if dtype == torch.float8_e4m3fn]
    return Sharding(
        ranks,
        tuple(_cut(list(weights.values()), ranks)),
        len(weights) - len(in_fp8),
        gathered,
        unquantised,
        sum(ceil_div(n, BLOCK) * ceil_div(k, BLOCK) for n, k in in_fp8) * torch.float32.itemsize,
    )


def _cut(weights: list[tuple[tuple[int, int], torch.dtype]], ranks: int) -> Iterable[Shards]:
    """One `Shards` for each distinct shape and dtype to gather in, in order of first appearance."""
    for shape, gathered_dtype in dict.fromkeys(weights):
        n, rows = shape[0], _rows(shape[0], ranks)
        holding = ceil_div(n, rows)
        yield Shards(
            shape=shape,
            count=weights.count((shape, gathered_dtype)),
            rows=rows,
            last_rows=n - (holding - 1) * rows,
            empty_ranks=ranks - holding,
            on_blocks=rows % BLOCK == 0 or holding == 1,
            gathered_in=str(gathered_dtype).removeprefix("torch."),
        )


def _rows(n: int, ranks: int) -> int:
    """Rows of the first rank, to which FSDP2 pads all others for the collective."""
    return ceil_div(n, ranks)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
