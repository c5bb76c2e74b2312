"""The linear on DTensors: each rank multiplies its own shards, and placements say what the results are parts of.

    w          x                 y                dx               dw
    Shard(0)   Replicate         Shard(-1)        Partial          Shard(0)                 column-wise
    Shard(1)   Shard(-1)         Partial          Shard(-1)        Shard(1)                 row-wise
    Replicate  Shard(tokens)     Shard(tokens)    Shard(tokens)    Partial
    Replicate  Replicate         Replicate        Replicate        Replicate

x is brought to the placement named here first, so that nothing is quantised that is yet to be summed. What is quantised is a shard:
blocks of 128 begin anew at its edge, and are those of one GPU where the shard's size is a multiple of 128.

A sharding rule for each op (`torch.distributed.tensor.experimental.register_sharding`) could not say that: the ceil(K/128) multipliers
of a whole tensor are not those of its shards where a shard ends within a block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .autograd import KnownWeight, blockwise_fp8_matmul
from .formats import ALIGNMENT
from .recipe import Recipe
from .recomputation import Recomputation


class LinearPlacements(NamedTuple):
    """How x has to be placed, and how y, dx and dw then are: one placement each for every mesh dimension."""

    x: tuple[Placement, ...]
    y: tuple[Placement, ...]
    dx: tuple[Placement, ...]
    dw: tuple[Placement, ...]


def linear_placements(x: tuple[Placement, ...], w: tuple[Placement, ...], x_dims: int) -> LinearPlacements:
    """Placements of y = x w^T and its gradients; see the module's table.

    Args:
        x: x's placements as it comes.
        w: w's placements.
        x_dims: number of x's dimensions, the last of which is contracted.
    Raises:
        ValueError: w is neither Shard(0), Shard(1) nor Replicate in a mesh dimension.
    """
    columns = x_dims - 1
    by_mesh_dim = []
    for x_placement, w_placement in zip(x, w, strict=True):
        if type(w_placement) is Shard and w_placement.dim == 0:
            row = (Replicate(), Shard(columns), Partial(), w_placement)
        elif type(w_placement) is Shard and w_placement.dim == 1:
            row = (Shard(columns), Partial(), Shard(columns), w_placement)
        elif isinstance(w_placement, Replicate):
            if type(x_placement) is Shard and x_placement.dim != columns:
                row = (x_placement, x_placement, x_placement, Partial())
            else:
                row = (Replicate(), Replicate(), Replicate(), Replicate())
        else:
            raise ValueError(
                f"weight of a blockwise-fp8 linear is placed as {w}: must be Shard(0), Shard(1) or Replicate() in every mesh "
                "dimension; under FSDP, call the module that FSDP wraps, which gathers its weights first"
            )
        by_mesh_dim.append(row)
    return LinearPlacements(*zip(*by_mesh_dim, strict=True))


def sharded_matmul(x: Tensor, w: DTensor, recipe: Recipe, recomputation: Recomputation) -> DTensor:
    """`blockwise_fp8_matmul` of DTensors.

    Args:
        x: DTensor [..., K] bf16 or fp32, on w's mesh, placed in any way; partial sums are reduced first.
        w: DTensor [N, K], each mesh dimension Shard(0), Shard(1) or Replicate; shards as `check_weight_shards` wants them.
        recipe: numerics and backend.
        recomputation: what activation checkpointing computes again.
    Returns:
        DTensor [..., N], placed as the module's table says: the caller reduces or gathers it.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """
    if not isinstance(x, DTensor):
        raise ValueError(
            f"input of a blockwise-fp8 linear is a plain tensor and its weight a DTensor placed as {w.placements}: parallelise the "
            "module with ColwiseParallel, RowwiseParallel or another style that makes DTensors of inputs; under FSDP, call the "
            "module that FSDP wraps, which gathers its weights first"
        )
    if x.device_mesh != w.device_mesh:
        raise ValueError(f"input is on {x.device_mesh} and weight on {w.device_mesh}: must be the same mesh")
    placements = linear_placements(x.placements, w.placements, x.dim())
    y = blockwise_fp8_matmul(
        x.redistribute(placements=placements.x).to_local(grad_placements=placements.dx),
        KnownWeight(w.to_local(grad_placements=placements.dw)),
        recipe,
        recomputation,
    )
    if all(placement.is_replicate() for placement in w.placements):
        # Tokens may be split unevenly: the whole's sizes do not follow from this rank's.
        whole = torch.empty(*x.shape[:-1], w.shape[0], device="meta")
        return DTensor.from_local(y, x.device_mesh, placements.y, shape=whole.shape, stride=whole.stride())
    return DTensor.from_local(y, x.device_mesh, placements.y)


def check_weight_shards(w: DTensor, fqn: str) -> None:
    """Refuse shards that fp8 GEMMs cannot take; the same verdict on every rank.

    Args:
        w: the weight [N, K] of a blockwise-fp8 linear; any device, meta included.
        fqn: the linear's name, for the message.
    Raises:
        ValueError: a dimension does not split into equal multiples of 16.
    """
    degrees = [
        math.prod(w.device_mesh.size(i) for i, placement in enumerate(w.placements) if placement.is_shard(dim))
        for dim in (0, 1)
    ]
    check_split(w.shape, degrees, fqn)


def check_split(shape: Sequence[int], degrees: Sequence[int], fqn: str) -> None:
    """As `check_weight_shards`, of sizes alone.

    Args:
        shape: the whole weight's, (out_features, in_features).
        degrees: over how many ranks each of the two is split.
    """
    for name, size, degree in zip(("out_features", "in_features"), shape, degrees, strict=True):
        if size % (degree * ALIGNMENT):
            raise ValueError(
                f"{fqn or 'a blockwise-fp8 linear'}: {name} = {size} split over {degree} ranks is {size / degree:g} "
                f"on each: must be a multiple of {ALIGNMENT}; lower tensor_parallel_degree, or keep the layer out of fp8 "
                f"with a rule: match = {fqn or '<name>'!r}, action = 'skip'"
            )
