"""BlockwiseFP8Linear: nn.Linear whose three GEMMs run in blockwise fp8."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from .activation import QuantizedInput
from .autograd import KnownWeight, blockwise_fp8_matmul, matmul_obstacle, operand_obstacle
from .formats import ALIGNMENT
from .ops.library import FLOATS
from .recipe import Recipe, check_recipe
from .recomputation import Recomputation
from .tensor_parallel import check_weight_shards, sharded_matmul
from .weight import GatheredFP8Weight, WeightScales, gather_in_fp8, is_gathered_in_fp8, plain_shard
from .weight_cache import CachedWeight


class BlockwiseFP8Linear(nn.Linear):
    """y = x w^T + b with x and dy in 1x128 groups, w in 128x128 blocks, all e4m3, accumulated in fp32.

    A subclass of nn.Linear with the same parameters and state dict: the master weight keeps its dtype, and what loads into or
    wraps the one does so with the other. Quantisation happens in forward and backward.

    Args:
        in_features: K, a positive multiple of 16.
        out_features: N, a positive multiple of 16.
        bias: adds a learnt [N] to y, in y's dtype.
        recipe: numerics and backend.
        device: of the parameters.
        dtype: of the parameters: bf16 or fp32.
    Shape:
        [..., K] bf16 or fp32, any number of tokens from 0 up -> [..., N] in autocast's dtype where it is on, else the input's.
        DTensors, as tensor parallelism makes them, are placed as `tensor_parallel` says.
    Raises:
        ValueError: names the argument, its value and the requirement.
    """

    fqn: str = ""
    """Its name in the model that it was converted in; for error messages."""

    weight_scales: WeightScales | None = None
    """Multipliers of a weight that FSDP2 gathers in fp8, from its first gather on."""

    cached_weight: CachedWeight | None = None
    """The quantised weight, where `cache_weights` asked for that."""

    recomputation: Recomputation = Recomputation()
    """What activation checkpointing computes again."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe = Recipe(),
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_features(in_features, out_features)
        _check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        check_recipe(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe = Recipe(), fqn: str = "") -> "BlockwiseFP8Linear":
        """A blockwise-fp8 twin of a linear: it shares the parameters and takes over hooks and mode; any device, meta included.

        Args:
            recipe: numerics and backend.
            fqn: its name in the model, for error messages.
        Raises:
            ValueError: linear is of another class, whose forward would be lost; in_features or out_features is not a positive multiple
                of 16; the weight is neither bf16 nor fp32; recipe is no Recipe.
        """
        if type(linear) not in (nn.Linear, cls):
            raise ValueError(
                f"linear is a {type(linear).__name__}: must be an nn.Linear itself, whose forward a blockwise-fp8 linear stands for"
            )
        check_recipe(recipe)
        _check_features(linear.in_features, linear.out_features)
        _check_dtype("weight.dtype", linear.weight.dtype)
        twin = cls.__new__(cls)
        # A module's state is its __dict__; registries are copied, so that what is registered on one is not on the other.
        twin.__dict__ = {
            name: value.copy() if isinstance(value, dict) else value for name, value in vars(linear).items()
        }
        twin.recipe = recipe
        twin.fqn = fqn
        return twin

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. Tensor parallelism puts its sharded weight in place of the plain one with this, at start-up.

        Raises:
            ValueError: param is a weight sharded into sizes that fp8 GEMMs cannot take; see `tensor_parallel.check_weight_shards`.
        """
        # What replaces a DTensor is FSDP's, which gathers it before it is multiplied: a checkpoint loaded with assign=True.
        if name == "weight" and isinstance(param, DTensor) and not isinstance(self._parameters.get(name), DTensor):
            check_weight_shards(param, self.fqn)
        super().register_parameter(name, param)

    def forward(self, input: Tensor | QuantizedInput) -> Tensor:
        self.check_input(input)
        if isinstance(self.weight, DTensor):
            output = sharded_matmul(input, self.weight, self.recipe, self.recomputation)
        else:
            output = blockwise_fp8_matmul(input, self.known_weight(), self.recipe, self.recomputation)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def check_input(self, input: Tensor | QuantizedInput) -> None:
        """Raises ValueError where this linear cannot take an input: names itself, the argument, its value and the requirement."""
        self._refuse_if(matmul_obstacle(input, self.weight, self.recipe))

    def check_operand(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """As `check_input`, of an input that is not there yet."""
        self._refuse_if(operand_obstacle(shape, dtype, self.weight))

    def _refuse_if(self, obstacle: str | None) -> None:
        if obstacle:
            # Only here is the name read: code compiled for one layer would not serve the next if it depended on it.
            raise ValueError(f"{self.fqn}: {obstacle}" if self.fqn else obstacle)

    def known_weight(self) -> KnownWeight:
        """The weight, not sharded, with the quantised forms that are at hand."""
        weight = self.weight
        if isinstance(weight, GatheredFP8Weight):
            return KnownWeight(weight, weight.w_q, weight.w_dq)
        quantized = None if self.cached_weight is None else self.cached_weight.of(weight)
        return KnownWeight(weight, *(quantized or ()))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Hand out plain tensors: a checkpoint must load where this package is not installed."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A parametrised weight (pruned, normalised) is no parameter, and not in there.
        if not keep_vars and f"{prefix}weight" in destination:
            destination[f"{prefix}weight"] = plain_shard(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weight one that is gathered in fp8, also where `assign=True` replaces it by a plain tensor."""
        if self.cached_weight is not None:
            self.cached_weight.clear()
        gathered_in_fp8 = is_gathered_in_fp8(self.weight)
        super()._load_from_state_dict(*args, **kwargs)
        if gathered_in_fp8 and not is_gathered_in_fp8(self.weight):
            gather_in_fp8(self, self.recipe.scale_format)

    def extra_repr(self) -> str:
        recipe = self.recipe
        return f"{super().extra_repr()}, gemm_backend={recipe.gemm_backend}, wgrad={recipe.wgrad}, scale_format={recipe.scale_format}"


def _check_features(in_features: int, out_features: int) -> None:
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(features, int) or features <= 0 or features % ALIGNMENT:
            raise ValueError(
                f"{name} = {features!r}: must be a positive multiple of {ALIGNMENT}, the unit in which fp8 tensor cores read rows; "
                "keep this layer an nn.Linear"
            )


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(
            f"{name} = {dtype}: must be {' or '.join(map(str, FLOATS))}, from which weights are quantised; "
            "cast the layer, or keep it an nn.Linear"
        )
