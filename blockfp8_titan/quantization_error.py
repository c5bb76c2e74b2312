"""What quantisation did to a tensor: numbers that add up over tokens, micro-batches and ranks, and what follows from their sums."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import BLOCK, ceil_div

_SUMS = 7
"""Of a tally, how many numbers are sums; those that follow are minima."""

_ELEMENTS = 2**24
"""How many are measured at once: temporary tensors stay below 400 MB, and launches are few."""

_ZERO, _LARGEST = 0x00, 0x7E
"""float8_e4m3fn without its sign: 0 and 448."""

Source = Callable[[slice], Sequence[Tensor]]
"""Rows of the tensors that were quantised, [rows, K] each; computed again where they were never written."""


@dataclass(frozen=True)
class TensorHealth:
    """One tensor of one layer in one step. Values in blocks with NaN or Inf count in `nonfinite` alone."""

    sqnr_db: float
    """10 log10(sum of x^2 / sum of (x - x_q * x_dq)^2); inf where nothing was lost, NaN where nothing but zeros was there."""

    flushed: float
    """Share of the values other than zero whose payload is zero."""

    clamped: float
    """Share of the values whose payload is 448 or -448, the largest; each block has one at least, unless multipliers are "pow2"."""

    multiplier_min: float
    multiplier_max: float
    """Of the blocks that are not zero; NaN where there are none."""

    nonfinite: int
    """How many values were NaN or Inf."""

    @classmethod
    def of(cls, tally: Sequence[float]) -> "TensorHealth":
        """Args: tally: as `tally_of` gives it or `add` made it."""
        signal, noise, values, nonzero, flushed, clamped, nonfinite, least, negated_largest = tally
        without_noise = math.inf if signal else math.nan
        return cls(
            10 * math.log10(signal / noise) if noise else without_noise,
            flushed / nonzero if nonzero else 0.0,
            clamped / values if values else 0.0,
            least if math.isfinite(least) else math.nan,
            -negated_largest if math.isfinite(negated_largest) else math.nan,
            round(nonfinite),
        )


def tallies_of(source: Source, quantized: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Compare tensors with what they were quantised to, without a wait for the device.

    Args:
        source: gives as many tensors [rows, K] bf16 or fp32 as there are in `quantized`.
        quantized: payload [M, K] and multipliers [M, ceil(K/128)] of each, in 1x128, M > 0. Blocks of 128x128: see `per_row`.
    Returns:
        For each a tally [9] fp64: sums of x^2 and of its error; how many values, how many of them not zero, flushed to zero, at 448,
        NaN or Inf; the least multiplier and the negated largest. `add` puts tallies together.
    """
    M, K = quantized[0][0].shape
    step = max(1, _ELEMENTS // K)
    tallies: list[Tensor] = []
    for start in range(0, M, step):
        rows = slice(start, start + step)
        parts = [_tally(x, q[rows], dq[rows]) for x, (q, dq) in zip(source(rows), quantized, strict=True)]
        tallies = [add(*both) for both in zip(tallies, parts, strict=True)] if tallies else parts
    return tallies


def per_row(w_dq: Tensor, first_row: int, rows: int) -> Tensor:
    """Multipliers of 128x128 blocks as those of each row: [rows, ceil(K/128)] from [ceil(N/128), ceil(K/128)], from first_row on."""
    return w_dq[torch.arange(first_row, first_row + rows, device=w_dq.device) // BLOCK]


def add(a: Tensor, b: Tensor) -> Tensor:
    """The tally of two tensors together; of lists of tallies, [..., 9] each, one by one."""
    return torch.cat([a[..., :_SUMS] + b[..., :_SUMS], torch.minimum(a[..., _SUMS:], b[..., _SUMS:])], -1)


def _tally(x: Tensor, q: Tensor, dq: Tensor) -> Tensor:
    x, codes = _in_groups(x.float()), _in_groups(q.view(torch.uint8)) & 0x7F
    known = dq.isfinite()
    # Divided by the multipliers, values have squares that fp32 can hold; those of gradients would be zero.
    exact = x / dq[..., None]
    error = exact - _in_groups(q.float())
    signal, noise = (
        torch.where(known, torch.linalg.vector_norm(v, dim=-1).double() * dq.double(), 0).square().sum()
        for v in (exact, error)
    )
    nonzero = (x != 0) & known[..., None]
    used = nonzero.any(-1)
    missing = -q.shape[1] % BLOCK
    numbers = (
        signal,
        noise,
        known.sum() * BLOCK - known[:, -1].sum() * missing,
        nonzero.sum(),
        (nonzero & (codes == _ZERO)).sum(),
        (codes == _LARGEST).sum(),
        x.isfinite().logical_not_().sum(),
        torch.where(used, dq, torch.inf).amin(),
        torch.where(used, -dq, torch.inf).amin(),
    )
    return torch.stack([number.double() for number in numbers])


def _in_groups(x: Tensor) -> Tensor:
    """[m, K] -> [m, ceil(K/128), 128], zeros at the end."""
    m, K = x.shape
    return F.pad(x, (0, -K % BLOCK)).view(m, ceil_div(K, BLOCK), BLOCK) if K % BLOCK else x.view(m, K // BLOCK, BLOCK)
