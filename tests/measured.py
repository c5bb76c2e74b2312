"""The health of a model's tensors, computed from what hooks see of them: what test_health.py and sharded_health.py compare with."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from blockfp8_titan import BlockwiseFP8Linear, reference
from blockfp8_titan.formats import BLOCK
from blockfp8_titan.health import Health
from blockfp8_titan.quantization_error import TensorHealth

Seen = dict[str, dict[str, list[Tensor]]]
"""FQN -> "x" or "dy" -> what came, [..., K] each."""


def direct(x: Tensor, q: Tensor, dq: Tensor) -> TensorHealth:
    """From a tensor [M, K], its payload and a multiplier for each element, in fp64."""
    x, values = x.double(), q.double() * dq.double()
    known = dq.isfinite()
    nonzero = known & (x != 0)
    signal, noise = (v[known].square().sum().item() for v in (x, x - values))
    # Multipliers of blocks that hold something: of a block, all elements have the same.
    used = dq[nonzero]
    return TensorHealth(
        10 * math.log10(signal / noise) if noise else math.inf if signal else math.nan,
        (nonzero & (q.float() == 0)).sum().item() / max(nonzero.sum().item(), 1),
        (known & (q.float().abs() == 448)).sum().item() / max(known.sum().item(), 1),
        used.min().item() if used.numel() else math.nan,
        used.max().item() if used.numel() else math.nan,
        (~x.isfinite()).sum().item(),
    )


def in_rows(x: Tensor, scale_format: str = "fp32") -> TensorHealth:
    """Of an activation or gradient [..., K]."""
    x = x.flatten(0, -2)
    q, dq = reference.quantize_1x128(x, scale_format)
    return direct(x, q, dq.repeat_interleave(BLOCK, 1)[:, : x.shape[1]])


def in_blocks(w: Tensor, scale_format: str = "fp32") -> TensorHealth:
    """Of a weight [N, K]."""
    q, dq = reference.quantize_128x128(w, scale_format)
    return direct(w, q, dq.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: w.shape[0], : w.shape[1]])


def watch(model: nn.Module) -> Seen:
    """Keep what goes into each linear in training mode, and the gradient of what comes out."""
    seen: Seen = {}
    for name, linear in model.named_modules():
        if isinstance(linear, BlockwiseFP8Linear):
            keep = seen[name] = {"x": [], "dy": []}

            def before(module: nn.Module, args: tuple[Tensor], keep=keep) -> None:
                if module.training:
                    keep["x"].append(args[0].detach().clone())

            def after(module: nn.Module, args: tuple[Tensor], y: Tensor, keep=keep) -> None:
                if y.requires_grad:
                    y.register_hook(lambda dy: keep["dy"].append(dy.clone()))

            linear.register_forward_pre_hook(before)
            linear.register_forward_hook(after)
    return seen


def expected(seen: Seen, weights: Mapping[str, Tensor], scale_format: str = "fp32") -> Health:
    return {
        name: {
            "x": in_rows(torch.cat(tensors["x"]), scale_format),
            "w": in_blocks(weights[name], scale_format),
            "dy": in_rows(torch.cat(tensors["dy"]), scale_format),
        }
        for name, tensors in seen.items()
    }


def assert_alike(found: Health, truth: Health, *, rel: float = 1e-4, shares: float = 0.0, least: bool = True) -> None:
    """Compare what was measured with what should have been.

    Args:
        rel: tolerance of SQNR in dB and multipliers.
        shares: absolute tolerance of the shares.
        least: whether the least multipliers are compared. A block of gradients that are zero but for rounding has any.
    """
    assert found.keys() == truth.keys()
    for fqn in truth:
        assert found[fqn].keys() == truth[fqn].keys(), fqn
        for role, tensor in truth[fqn].items():
            other = found[fqn][role]
            for name in ("sqnr_db", "multiplier_max", *["multiplier_min"] * least):
                value = getattr(tensor, name)
                assert getattr(other, name) == pytest.approx(value, rel=rel, abs=0, nan_ok=True), (fqn, role, name)
            for name in ("flushed", "clamped"):
                value = getattr(tensor, name)
                assert getattr(other, name) == pytest.approx(value, abs=shares + 1e-12), (fqn, role, name)
            assert other.nonfinite == tensor.nonfinite, (fqn, role)
