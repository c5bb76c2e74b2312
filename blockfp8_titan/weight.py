"""The weight of a blockwise-fp8 linear under FSDP2, stage by stage.

    gather_in_fp8        Parameter(BlockwiseFP8Weight)            [N, K] fp32 or bf16: the master
    fully_shard          Parameter(DTensor(BlockwiseFP8Weight))   [rows of this rank, K]
    all-gather           uint8 [rows of a rank, K]                one byte per element
    forward, backward    Parameter(GatheredFP8Weight)             [N, K] e4m3 and [ceil(N/128), ceil(K/128)] fp32
    state_dict           DTensor of plain tensors                 as without fp8

A block of 128x128 may lie on several ranks. Its multiplier is known to all of them before the gather: `refresh_scales` takes the
amax of the rows that a rank holds and one all_reduce(MAX) over the ranks of a shard gives each the whole table. What a rank
casts is then bit for bit its rows of `ops.quantize_128x128` of the whole weight, however the weight is cut.

The contract of the `fsdp_*` methods is FSDP2's extension point (torch/distributed/fsdp/_fully_shard/_fsdp_param.py).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from . import ops, reference
from .formats import BLOCK, ceil_div
from .ops.library import FLOATS
from .recipe import ScaleFormat

aten = torch.ops.aten

# FSDP2, to_empty, CPU offload and deepcopy make one shard from another by these.
_COPIES = {
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.clone.default,
    aten._to_copy.default,
    aten._pin_memory.default,
}


class LastWrite:
    """When tensors that share memory were last written: a number that no other write has."""

    _clock = itertools.count()

    def __init__(self) -> None:
        self.tick()

    def tick(self) -> None:
        self.time = next(self._clock)


class BlockwiseFP8Weight(Tensor):
    """The master weight, or a rank's rows of it; behaves as the plain tensor that it holds, but FSDP2 gathers it in fp8.

    Args:
        master: [N, K] fp32 or bf16, contiguous.
        scale_format: of its multipliers.
    """

    def __new__(cls, master: Tensor, scale_format: ScaleFormat, last_write: LastWrite | None = None) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            master.size(),
            strides=master.stride(),
            storage_offset=master.storage_offset(),
            dtype=master.dtype,
            device=master.device,
            requires_grad=master.requires_grad,
        )

    def __init__(self, master: Tensor, scale_format: ScaleFormat, last_write: LastWrite | None = None) -> None:
        self.master = master
        self.scale_format = scale_format
        # Autograd's version counters do not see what is written below autograd, where DTensor writes to its shard.
        self.last_write = last_write or LastWrite()

    def __repr__(self) -> str:
        return f"BlockwiseFP8Weight({self.master!r}, scale_format={self.scale_format!r})"

    def __tensor_flatten__(self) -> tuple[list[str], ScaleFormat]:
        return ["master"], self.scale_format

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], scale_format: ScaleFormat, size: torch.Size, stride: tuple[int, ...]
    ) -> "BlockwiseFP8Weight":
        return BlockwiseFP8Weight(inner["master"], scale_format)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            # The same tensor, not another with a version counter of its own.
            return cls(args[0].master, args[0].scale_format, args[0].last_write)
        plain_args, plain_kwargs = pytree.tree_map_only(cls, lambda weight: weight.master, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable or func.namespace == "c10d":
            for weight in _written(func, args, kwargs):
                weight.last_write.tick()
            return return_and_correct_aliasing(func, args, kwargs, out) if isinstance(out, Tensor) else out
        # `view` to one dimension is FSDP2's own, of a padded shard: from a plain one it sees that the shard is padded already. It would
        # pad again, into new memory, while a state dict taken before holds the old.
        is_view = any(result.alias_info for result in func._schema.returns)
        if is_view and not (func is aten.view.default and out.dim() == 1):
            first = args[0]
            return pytree.tree_map_only(Tensor, lambda part: cls(part, first.scale_format, first.last_write), out)
        if func in _COPIES and out.dim() == 2:
            return cls(out, args[0].scale_format)
        return out

    def __reduce_ex__(self, protocol: int) -> Any:
        """A plain tensor's or parameter's: what is saved must load where this package is not installed."""
        plain = nn.Parameter(self.master, self.requires_grad) if isinstance(self, nn.Parameter) else self.master
        return plain.__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:
        """The master's: FSDP2 tells by it that a shard is padded already."""
        return self.master.untyped_storage()

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], tuple[int, Tensor]]:
        """Cast this rank's rows, padded with zeros to as many as every other rank has.

        Raises:
            ValueError: the weight is not cut along its rows, or has become of a dtype that is not quantised.
        """
        scales = module.weight_scales
        if scales is None:
            scales = module.weight_scales = WeightScales(mesh, outer_size, self.device)
        if obstacle := _cast_obstacle(self, outer_size):
            raise ValueError(f"{module.fqn}: {obstacle}" if module.fqn else obstacle)
        _refresh((module,), stale_only=True)
        w_q = ops.quantize_rows(self.master, scales.multipliers, scales.first_row).view(torch.uint8)
        missing = scales.rows - w_q.shape[0]
        return (F.pad(w_q, (0, 0, 0, missing)) if missing else w_q,), (outer_size[0], scales.multipliers)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: tuple[int, Tensor],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The gathered weight; `out` where there is one already, whose payload is the memory that was gathered into."""
        (gathered,), (N, multipliers) = all_gather_outputs, metadata
        if out is None:
            return GatheredFP8Weight(gathered[:N].view(torch.float8_e4m3fn), multipliers, param_dtype), ()
        assert isinstance(out, GatheredFP8Weight) and out.w_q.data_ptr() == gathered.data_ptr()
        out.w_dq = multipliers
        return None


class GatheredFP8Weight(Tensor):
    """A whole weight in fp8 that reports param_dtype, [N, K]: w ~= w_q * w_dq[n // 128, k // 128]. Read-only.

    `blockwise_fp8_matmul` reads payload and multipliers; any other operation gets the weight dequantised.

    Args:
        w_q: [N, K] float8_e4m3fn, row-major.
        w_dq: [ceil(N/128), ceil(K/128)] fp32, row-major.
        dtype: to report and to dequantise to.
    """

    def __new__(cls, w_q: Tensor, w_dq: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, w_q.size(), strides=w_q.stride(), dtype=dtype, device=w_q.device
        )

    def __init__(self, w_q: Tensor, w_dq: Tensor, dtype: torch.dtype) -> None:
        self.w_q = w_q
        self.w_dq = w_dq

    def __repr__(self) -> str:
        return f"GatheredFP8Weight(w_q={self.w_q!r}, w_dq={self.w_dq!r}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["w_q", "w_dq"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]
    ) -> "GatheredFP8Weight":
        return GatheredFP8Weight(inner["w_q"], inner["w_dq"], dtype)

    def dequantize(self) -> Tensor:
        """[N, K] in this weight's dtype."""
        return reference.dequantize_128x128(self.w_q, self.w_dq).to(self.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and any(True for _ in _written(func, args, kwargs)):
            raise RuntimeError(
                f"{func} would write to a weight gathered in fp8, which is a copy: write to the sharded parameter, outside of "
                "forward and backward (FSDPModule.reshard() restores it)"
            )
        weight = args[0] if args else None
        if isinstance(weight, cls) and (
            func in (aten.detach.default, aten.alias.default)
            or (func is aten.view.default and tuple(args[1]) == tuple(weight.shape))
            or (func is aten.as_strided.default and _is_whole(weight, *args[1:]))
        ):
            return return_and_correct_aliasing(
                func, args, kwargs, cls(weight.w_q.detach(), weight.w_dq.detach(), weight.dtype)
            )
        assert func.namespace != "blockfp8", f"{func} would quantise again what is quantised already"
        args, kwargs = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


class WeightScales:
    """The multipliers of one sharded weight, on every rank of its shard mesh, and what they were computed from.

    Args:
        mesh: of the ranks that share the weight out, in chunks of ceil(N / ranks) rows (torch.chunk's and FSDP2's).
        size: [N, K], the whole weight's.
        device: that computes.
    """

    def __init__(self, mesh: DeviceMesh, size: torch.Size, device: torch.device) -> None:
        N, K = size
        ranks = mesh.size()
        self.group = mesh.get_group()
        self.rows = ceil_div(N, ranks)
        self.first_row = min(mesh.get_local_rank() * self.rows, N)
        self.multipliers = torch.empty(ceil_div(N, BLOCK), ceil_div(K, BLOCK), device=device)
        self._computed_from: tuple[int, ...] | None = None
        # A rank without rows is not written to by everything that changes the weight (a checkpoint read into it, say), so
        # ranks could not agree by themselves on whether to compute again.
        self._always = self.rows * (ranks - 1) >= N

    def stale(self, weight: DTensor) -> bool:
        return self._always or self._computed_from != _writes(weight)

    def computed_from(self, weight: DTensor) -> None:
        self._computed_from = _writes(weight)


def gather_in_fp8(linear: nn.Linear, scale_format: ScaleFormat) -> None:
    """Let FSDP2 gather a linear's weight in fp8. Call before fully_shard; the linear must have a `weight_scales` attribute."""
    if is_gathered_in_fp8(linear.weight):
        return
    weight = linear.weight.detach()
    if isinstance(weight, DTensor):
        weight._local_tensor = BlockwiseFP8Weight(weight._local_tensor, scale_format)
    else:
        weight = BlockwiseFP8Weight(weight, scale_format)
    linear.weight = nn.Parameter(weight, linear.weight.requires_grad)


def is_gathered_in_fp8(weight: Tensor) -> bool:
    """Whether a parameter is one that `gather_in_fp8` made, sharded or not."""
    return isinstance(weight._local_tensor if isinstance(weight, DTensor) else weight, BlockwiseFP8Weight)


def refresh_scales(*modules: nn.Module) -> None:
    """Compute the multipliers of the weights in these modules: one all-reduce per shard mesh.

    Call it after an optimizer step, on all ranks, before `FSDPModule.set_post_optim_event` if that is used, and after a change that
    some ranks alone have made. A weight that has changed since gets new multipliers at its next gather in any case, by an all-reduce
    of its own, for which all ranks must have changed it, as DTensor's operations do. Changes are noticed whoever makes them: an
    optimizer, nn.init, load_state_dict, a checkpoint read in place into state_dict(), a collective, in-place operations on the
    parameter, on its `.data`, its local tensor, and on views of these. Not noticed: writes that PyTorch does not see (NumPy's, a
    kernel of one's own), writes to `.data` of what state_dict() returned, and to `.data.view(-1)`.

    Weights are known from their first gather on; those not gathered yet, or gathered just now, are left to their next one.
    """
    _refresh(modules, stale_only=False)


@torch.no_grad()
def _refresh(modules: tuple[nn.Module, ...], *, stale_only: bool) -> None:
    """stale_only: leave those out that have not changed, by what this rank knows."""
    by_group: dict[dist.ProcessGroup, list[tuple[WeightScales, DTensor]]] = {}
    for scales, weight in _scaled_weights(modules):
        if not stale_only or scales.stale(weight):
            by_group.setdefault(scales.group, []).append((scales, weight))
    for group, members in by_group.items():
        _compute(group, members)


def _compute(group: dist.ProcessGroup, members: list[tuple[WeightScales, DTensor]]) -> None:
    """One amax pass over the rows of all members that are here, and one all_reduce(MAX) of int32, 4 bytes a block."""
    shards = [weight._local_tensor for _, weight in members]
    blocks = [scales.multipliers.numel() for scales, _ in members]
    amax_bits = torch.zeros(sum(blocks), dtype=torch.int32, device=shards[0].device)
    ops.amax_128x128_(
        [shard.master for shard in shards],
        [scales.first_row for scales, _ in members],
        [part.view_as(scales.multipliers) for part, (scales, _) in zip(amax_bits.split(blocks), members, strict=True)],
    )
    amax_bits = amax_bits.to(members[0][0].multipliers.device)
    if group.size() > 1:
        dist.all_reduce(amax_bits, dist.ReduceOp.MAX, group)
    formats = [shard.scale_format for shard in shards]
    for scale_format in sorted(set(formats)):
        multipliers = reference.block_multiplier(amax_bits.view(torch.float32), scale_format).split(blocks)
        chosen = [i for i, own in enumerate(formats) if own == scale_format]
        torch._foreach_copy_([members[i][0].multipliers.view(-1) for i in chosen], [multipliers[i] for i in chosen])
    for scales, weight in members:
        scales.computed_from(weight)


def _scaled_weights(modules: tuple[nn.Module, ...]) -> Iterator[tuple[WeightScales, DTensor]]:
    """Weights gathered before and sharded now, a tied one once."""
    seen = set()
    for module in itertools.chain.from_iterable(root.modules() for root in modules):
        scales: WeightScales | None = getattr(module, "weight_scales", None)
        if scales is not None and scales not in seen and is_gathered_in_fp8(module.weight):
            seen.add(scales)
            yield scales, module.weight


def _writes(weight: DTensor) -> tuple[int, ...]:
    """What changes when the weight is written to: through the DTensor or what shares its counter, below it, and in the plain master."""
    shard = weight._local_tensor
    return weight._version, shard._version, shard.master._version, shard.last_write.time


def plain_shard(weight: Tensor) -> Tensor:
    """The weight without the wrapper that gathers it in fp8, sharing memory and version counter."""
    if isinstance(weight, BlockwiseFP8Weight):
        return weight.master
    if isinstance(weight, DTensor) and isinstance(weight._local_tensor, BlockwiseFP8Weight):
        weight = weight.detach()
        weight._local_tensor = weight._local_tensor.master
    return weight


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The wrapped tensors that an operation with these arguments writes to."""
    if func.namespace == "c10d":  # a schema there does not say which
        yield from (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, BlockwiseFP8Weight))
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, (BlockwiseFP8Weight, GatheredFP8Weight)):
                    yield tensor


def _cast_obstacle(shard: Tensor, outer_size: torch.Size) -> str | None:
    """Why a rank's part of a weight cannot be gathered in fp8; None where it can."""
    if shard.shape[1:] != outer_size[1:]:
        return (
            f"its weight {list(outer_size)} is cut into {list(shard.shape)}: a weight gathered in fp8 must be cut along its rows; shard it "
            "by Shard(0), or set fp8_all_gather = false"
        )
    if shard.dtype not in FLOATS:
        return (
            f"its weight has become {shard.dtype}: must be torch.bfloat16 or torch.float32; cast before the conversion"
        )
    return None


def _is_whole(weight: Tensor, size: Any, stride: Any, offset: int | None = None) -> bool:
    return tuple(size) == tuple(weight.shape) and tuple(stride) == weight.stride() and not offset
