"""What fp8 did to the tensors of each linear in one step: eager or compiled, recomputed, sharded.

    x   the input, as the GEMM of y multiplies it          in 1x128
    dy  the gradient of y, as the GEMM of dx multiplies it in 1x128
    w   the weight, once                                   in 128x128

Nothing in the graphs changes: every op is opaque to autograd and compilers, and tells an observer what it was given and what it made
(`ops.library.observe`). A tensor is measured where it is quantised, when what it was is still there; whose it is shows when it is
multiplied. Payloads are known by their addresses. Memory that is used again does no harm: the op that wrote to an address last says
what is there, and what our GEMMs multiply is written by our ops or, of weights gathered in fp8, belongs to multipliers that stay
where they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import reference
from .linear import BlockwiseFP8Linear
from .ops.library import observe
from .quantization_error import Source, TensorHealth, add, per_row, tallies_of
from .weight import BlockwiseFP8Weight, GatheredFP8Weight
from .weight_cache import drop_cached_weights

Role = Literal["x", "w", "dy"]

Health = dict[str, dict[Role, TensorHealth]]
"""FQN -> tensor -> its health."""

Tallies = dict[tuple[str, Role], list[float]]
"""As `quantization_error.tallies_of` gives them, of one process."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """What runs in here is no training, and what it computes with may be anything: of it, weights alone are observed."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


class ObservationFailed(RuntimeError):
    """There is no health of a step that was observed."""


class _Payload(NamedTuple):
    """A weight's, quantised here."""

    linear: BlockwiseFP8Linear
    transposed: bool


class Observation:
    """Measures from `start` to `stop` what fp8 does in a model; one at a time in a process.

    Micro-batches add up. Counted are linears in training mode, so that validation is not; of what activation checkpointing computes
    again, nothing. A linear whose input needs no gradient has no dy here, because nothing multiplies it there. Linears that share a
    weight are counted together, under one of their names.

    Args:
        model_parts: gives the modules that hold the linears, asked when the first op runs: one, or under pipeline parallelism several.
    """

    def __init__(self, model_parts: Callable[[], Iterable[nn.Module]]) -> None:
        self._model_parts = model_parts
        self._names: dict[BlockwiseFP8Linear, str] = {}
        self._by_weight: dict[int, BlockwiseFP8Linear] = {}
        self._by_multipliers: dict[int, BlockwiseFP8Linear] = {}
        self._made: dict[int, Tensor | _Payload] = {}
        """Address of a payload -> its tally, or the weight that it is of."""
        self._tallies: dict[tuple[str, Role], Tensor] = {}
        self._failure: str | None = None

    def start(self) -> None:
        # What was quantised before nobody saw.
        drop_cached_weights(*self._model_parts())
        observe(self._see)

    def stop(self) -> None:
        observe(None)

    def collect(self) -> Health:
        """What was measured, on all ranks together: call on every rank. Waits for the device.

        Raises:
            ObservationFailed: measuring did, on some rank; on every rank. The step itself went on.
        """
        tallies: Tallies = {}
        if self._tallies:
            numbers = torch.stack(list(self._tallies.values())).tolist()
            tallies = dict(zip(self._tallies, numbers, strict=True))
        health: Health = {}
        for (fqn, role), tally in _of_all_ranks(self._failure or tallies).items():
            health.setdefault(fqn, {})[role] = TensorHealth.of(tally)
        return health

    @torch.no_grad()
    def _see(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        try:
            self._measure(name, args, result)
        except Exception as error:
            # Such as no memory to measure in, where the step has room for itself: that it is watched must not end it.
            self.stop()
            self._failure = f"{type(error).__name__}: {error}"

    def _measure(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if not self._names:
            self._find_linears()
        outs: Sequence[Tensor] = [result] if isinstance(result, Tensor) else result
        for out in outs or ():
            self._made.pop(out.data_ptr(), None)
        # Of what these compute in backward, forward has been counted.
        again = _in_backward()
        match name.partition(".")[0]:
            case "gemm_1x128_128x128":
                a_q, _, b_q, b_dq, *_ = args
                self._multiplied(a_q, b_q, b_dq)
            case "quantize_1x128" | "quantize_1x128_both":
                self._activations(lambda rows: [args[0][rows]], [outs[:2]])
            case "rms_norm_quantize_1x128" if not again:
                x, weight, _, layout, _, rstd, _ = args
                rstd = outs[-1] if rstd is None else rstd
                if layout in ("rows", "both"):
                    self._activations(lambda rows: [reference.rms_norm(x[rows], rstd[rows], weight)], [outs[:2]])
            case "swiglu_quantize_1x128" if not again:
                gate, up, layout, *_ = args
                if layout in ("rows", "both"):
                    self._activations(lambda rows: [reference.swiglu(gate[rows], up[rows])], [outs[:2]])
            case "swiglu_quantize_1x128_with_inputs" if not again:
                gate, up, *_ = args
                self._activations(lambda rows: [reference.swiglu(gate[rows], up[rows])], [outs[:2]])
            case "swiglu_backward_quantize_1x128_both":
                dh, gate, gate_dq, up, up_dq, *_ = args
                self._activations(
                    lambda rows: reference.swiglu_backward(
                        dh[rows], _values(gate, gate_dq, rows), _values(up, up_dq, rows)
                    ),
                    [outs[:2], outs[4:6]],
                )
            case "quantize_128x128" | "quantize_128x128_both":
                self._weight(args[0], *outs)
            case "quantize_rows":
                w, w_dq, first_row, _ = args
                self._shard(w, w_dq, first_row, *outs)

    def _find_linears(self) -> None:
        for part in self._model_parts():
            for name, module in part.named_modules():
                if isinstance(module, BlockwiseFP8Linear):
                    self._names[module] = module.fqn or _without_wrappers(name)
        self._find_multipliers()

    def _find_multipliers(self) -> None:
        for linear in self._names:
            if linear.weight_scales is not None:
                self._by_multipliers[linear.weight_scales.multipliers.data_ptr()] = linear

    def _activations(self, source: Source, quantized: Sequence[Sequence[Tensor]]) -> None:
        if _rehearsing or not quantized[0][0].numel():
            return
        for (q, _), tally in zip(quantized, tallies_of(source, quantized), strict=True):
            self._made[q.data_ptr()] = tally

    def _weight(self, w: Tensor, w_q: Tensor, w_dq: Tensor, wt_q: Tensor | None = None) -> None:
        """A weight quantised here; one of no linear that is observed is left out."""
        linear = self._holder_of(w.data_ptr())
        if linear is None:
            return
        self._made[w_q.data_ptr()] = _Payload(linear, False)
        if wt_q is not None:
            self._made[wt_q.data_ptr()] = _Payload(linear, True)
        self._measure_weight(linear, w, w_q, w_dq, 0)

    def _shard(self, w: Tensor, w_dq: Tensor, first_row: int, w_q: Tensor) -> None:
        """A rank's rows of a weight, quantised for FSDP2 to gather."""
        if w_dq.data_ptr() not in self._by_multipliers:
            self._find_multipliers()  # they are made at a weight's first gather
        linear = self._by_multipliers.get(w_dq.data_ptr())
        if linear is not None and w.numel():
            self._measure_weight(linear, w, w_q, w_dq, first_row)

    def _measure_weight(self, linear: BlockwiseFP8Linear, w: Tensor, w_q: Tensor, w_dq: Tensor, first_row: int) -> None:
        key: tuple[str, Role] = (self._names[linear], "w")
        if key not in self._tallies:
            (self._tallies[key],) = tallies_of(lambda rows: [w[rows]], [(w_q, per_row(w_dq, first_row, w.shape[0]))])

    def _multiplied(self, a_q: Tensor, b_q: Tensor, b_dq: Tensor) -> None:
        tally = self._made.get(a_q.data_ptr())
        linear = self._by_multipliers.get(b_dq.data_ptr())
        if linear is not None:
            transposed = b_q.data_ptr() != _address(linear.weight)
        elif isinstance(payload := self._made.get(b_q.data_ptr()), _Payload):
            linear, transposed = payload
        else:
            return
        if isinstance(tally, Tensor) and linear.training and (transposed or not _in_backward()):
            key: tuple[str, Role] = (self._names[linear], "dy" if transposed else "x")
            self._tallies[key] = add(self._tallies[key], tally) if key in self._tallies else tally

    def _holder_of(self, address: int) -> BlockwiseFP8Linear | None:
        """The linear whose weight is there now: FSDP2 moves weights from step to step."""
        linear = self._by_weight.get(address)
        if linear is None or _address(linear.weight) != address:
            self._by_weight = {_address(linear.weight): linear for linear in self._names}
            linear = self._by_weight.get(address)
        return linear


def _of_all_ranks(tallies: Tallies | str) -> Tallies:
    """Tallies of all processes, added up by name; a text says why one has none. Tensors that several ranks hold count as often, each
    alike."""
    everyones: list[Any] = [tallies]
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "fake":
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, tallies)
    for rank, found in enumerate(everyones):
        if isinstance(found, str):
            raise ObservationFailed(f"not measured, because of rank {rank}: {found}")
    merged: dict[tuple[str, Role], Tensor] = {}
    for rank in everyones:
        for key, numbers in rank.items():
            tally = torch.tensor(numbers, dtype=torch.float64)
            merged[key] = add(merged[key], tally) if key in merged else tally
    return {key: tally.tolist() for key, tally in merged.items()}


def _address(weight: Tensor) -> int:
    """Where a linear's weight lies, of a gathered one its payload."""
    if isinstance(weight, DTensor):
        weight = weight._local_tensor
    if isinstance(weight, GatheredFP8Weight):
        weight = weight.w_q
    elif isinstance(weight, BlockwiseFP8Weight):
        weight = weight.master
    return weight.data_ptr()


def _values(x: Tensor, x_dq: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if x_dq is None else reference.dequantize_1x128(x[rows], x_dq[rows])


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
