"""Activation checkpointing: which outputs of fp8 GEMMs selective checkpointing keeps for backward, and which it computes again."""

from functools import cache
from typing import get_args

import torch.nn as nn
from torch._functorch.autograd_function import autograd_function_apply
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch.fx import GraphModule

from .conversion import ConversionReport, Row
from .fqns import collapse
from .recomputation import ActivationSave, Recomputation


def recomputed_outputs(report: ConversionReport, ac_save: ActivationSave) -> list[Row]:
    """The Linears in fp8 whose outputs are computed again in backward.

    "balanced" keeps, in each repeated block, at most 7/16 of the bytes. Selective checkpointing of a bf16 model keeps the output of every
    second matrix product, about half; with half, tensors took no more than bf16's, but the allocator, which has more sizes to fit, held
    1.2 to 1.7 % more (Llama 3 8B on two H200). Per byte kept, what is spared grows with in_features, which hardly differ, so the
    largest outputs that fit are kept; of equal ones the later. Outputs of which a fused feed-forward keeps fp8 are half as large, and
    are kept before all others, since they spare twice as much, and in any case: where they alone are more than 7/16, they are no more than
    the half. Outputs that backward does not need (of a feed-forward's last Linear, which is only added) are kept besides, as there.

    Args:
        report: of the conversion.
        ac_save: "gemm" keeps all, "none" none.
    """
    in_fp8 = [row for row in report.rows if row.in_fp8]
    if ac_save != "balanced":
        return in_fp8 if ac_save == "none" else []
    feed_forwards = [fusion for fusion in report.fusions if fusion.kind == "feed_forward"]
    unneeded = {fusion.linears[-1] for fusion in feed_forwards}
    together = {
        fqn: fusion.fqn for fusion in feed_forwards if fusion.swiglu_inputs == "fp8" for fqn in fusion.linears[:-1]
    }
    blocks: dict[str, list[Row]] = {}
    for row in in_fp8:
        block = _block_of(row.fqn)
        if block and unneeded.isdisjoint((row.fqn, *row.aliases)):
            blocks.setdefault(block, []).append(row)
    kept: set[str] = set()
    for rows in blocks.values():
        room = 7 * sum(row.shape[0] for row in rows) // 16
        units: dict[str, list[Row]] = {}
        for row in reversed(rows):
            names = (row.fqn, *row.aliases)
            units.setdefault(next((together[name] for name in names if name in together), row.fqn), []).append(row)
        # Bytes per token over two; a stable sort, of the reversed order.
        sizes = {name: sum(row.shape[0] for row in unit) // len(unit) for name, unit in units.items()}
        for name, unit in sorted(units.items(), key=lambda item: (-len(item[1]), -sizes[item[0]])):
            if len(unit) > 1 or sizes[name] <= room:
                room -= sizes[name]
                kept.update(row.fqn for row in unit)
    return [row for rows in blocks.values() for row in rows if row.fqn not in kept]


def prepare_for_checkpointing(
    model: nn.Module, report: ConversionReport, ac_save: ActivationSave = "gemm", *, columns_apart: bool = False
) -> None:
    """Tell the modules of a converted model how activation checkpointing will treat them, in place.

    Selective checkpointing by op keeps what `torch.ops.blockfp8.gated_feed_forward.default` and `.gemm_1x128_128x128.default` return, if
    its policy says so, and not what the latter's overload `.recomputed` does.

    Args:
        report: of the conversion.
        ac_save: see `recomputed_outputs`; "none" where checkpointing recomputes everything.
        columns_apart: see `Recomputation`; for blocks that are compiled and checkpointed. With torch 2.11 all checkpoints that this
            process compiles from then on recompute what autograd.Functions compute.
    Raises:
        ValueError: there is no such ac_save.
    """
    if ac_save not in get_args(ActivationSave):
        raise ValueError(f"ac_save = {ac_save!r}: must be one of {', '.join(map(repr, get_args(ActivationSave)))}")
    recomputed = {fqn for row in recomputed_outputs(report, ac_save) for fqn in (row.fqn, *row.aliases)}
    for row in report.rows:
        if row.in_fp8:
            model.get_submodule(row.fqn).recomputation = Recomputation(columns_apart, row.fqn in recomputed)
    for fusion in report.fusions:
        if fusion.fused and fusion.kind == "norm":
            output = not recomputed.isdisjoint(fusion.linears)
            model.get_submodule(fusion.fqn).recomputation = Recomputation(columns_apart, output)
    if columns_apart:
        _recompute_autograd_functions()


@cache
def _recompute_autograd_functions() -> None:
    """Let compiled checkpoints of whole blocks recompute what autograd.Functions do, as they do by themselves from torch 2.12 on.

    In 2.11 a checkpoint's own graph is marked for recomputation, and not the graphs of the autograd.Functions in it, whose results are
    then kept: of a block, the outputs of all its fp8 GEMMs (pytorch/pytorch#177396).
    """
    tag_nodes = getattr(TagActivationCheckpoint, "tag_nodes", None)
    if tag_nodes is None:
        return

    def tag_all_nodes(graph: GraphModule, is_sac: bool) -> GraphModule:
        graph = tag_nodes(graph, is_sac)
        if not is_sac:  # there a policy marks what it is shown, in all graphs
            _tag_autograd_functions(graph)
        return graph

    TagActivationCheckpoint.tag_nodes = staticmethod(tag_all_nodes)


def _tag_autograd_functions(graph: GraphModule) -> None:
    """Mark the nodes of the forward of each autograd.Function in a graph as the call of it is marked."""
    for call in graph.graph.find_nodes(op="call_function", target=autograd_function_apply):
        forward = graph.get_submodule(call.args[0].target)
        for node in forward.graph.nodes:
            if node.op.startswith("call_"):
                node.meta |= {key: call.meta[key] for key in ("ac_graph_id", "recompute")}


def checkpointing_note(report: ConversionReport, ac_save: ActivationSave) -> str:
    """What a report says where selective checkpointing by op is on."""
    rows = recomputed_outputs(report, ac_save)
    what = ", ".join(name for name, _ in collapse(rows, lambda row: row.shape)) or "none"
    return f'ac_save = "{ac_save}": of the Linears in fp8, selective checkpointing recomputes the outputs of {what}'


def _block_of(fqn: str) -> str:
    """ "layers.3" of "layers.3.attention.wq"; empty outside of repeated blocks."""
    parts = fqn.split(".")
    ends = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: ends[0] + 1]) if ends else ""
