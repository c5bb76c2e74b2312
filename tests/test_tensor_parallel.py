"""blockfp8_titan.tensor_parallel: placements, refusals at start-up, and sharded linears and models beside whole ones (4 Gloo processes)."""

import contextlib
import dataclasses
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.torch_version import TorchVersion
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.llama3.infra.parallelize import parallelize_llama

from blockfp8_titan import BlockwiseFP8Linear, Recipe, convert_model
from blockfp8_titan.converter import FIRST_TORCH_WITHOUT_COMPILED_TP
from blockfp8_titan.numerics import SQNR_FLOOR_DB, sqnr
from blockfp8_titan.tensor_parallel import linear_placements

RANKS = 4
SAME_BUT_FOR_SUMS = 90.0
"""Least SQNR in dB of equally quantised fp32 products that are summed in another order."""
BF16_DW = Recipe(wgrad="bf16", scale_format="pow2")


def test_placements() -> None:
    R, P, tokens, columns = Replicate(), Partial(), Shard(1), Shard(2)
    for x in (R, P, tokens, columns):
        assert linear_placements((x,), (Shard(0),), 3) == ((R,), (columns,), (P,), (Shard(0),))
        assert linear_placements((x,), (Shard(1),), 3) == ((columns,), (P,), (columns,), (Shard(1),))
    assert linear_placements((tokens,), (R,), 3) == ((tokens,), (tokens,), (tokens,), (P,))
    for x in (R, P, columns):
        assert linear_placements((x,), (R,), 3) == ((R,), (R,), (R,), (R,))
    assert linear_placements((Shard(0), R), (R, Shard(0)), 3) == (
        (Shard(0), R),
        (Shard(0), columns),
        (Shard(0), P),
        (P, Shard(0)),
    )
    with pytest.raises(
        ValueError, match=r"weight .* placed as \(Partial\(sum\),\): must be Shard\(0\), Shard\(1\) or Replicate"
    ):
        linear_placements((R,), (P,), 3)


@contextlib.contextmanager
def fake_ranks(world_size: int):
    """A process group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("style", "sizes", "message"),
    [
        (
            ColwiseParallel(),
            (256, 32),
            r"layers\.0\.w: out_features = 32 split over 4 ranks is 8 on each: must be a multiple of 16",
        ),
        (ColwiseParallel(), (256, 96), r"out_features = 96 split over 4 ranks is 24 on each"),
        (ColwiseParallel(), (256, 16), r"out_features = 16 split over 4 ranks is 4 on each"),
        (
            RowwiseParallel(),
            (112, 64),
            r"in_features = 112 split over 4 ranks is 28 on each.* match = 'layers\.0\.w', action = 'skip'",
        ),
        (ColwiseParallel(), (16, 64), None),
        (RowwiseParallel(), (64, 16), None),
    ],
)
def test_shards_that_fp8_cannot_take_are_refused_when_the_weight_is_split(
    style: ParallelStyle, sizes: tuple[int, int], message: str | None
) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"w": nn.Linear(*sizes)})])})
    convert_model(model)
    with fake_ranks(RANKS):
        refusal = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
        with refusal:
            parallelize_module(model, init_device_mesh("cpu", (RANKS,)), {"layers.0.w": style})


def test_a_plain_input_and_a_sharded_weight_are_refused() -> None:
    with fake_ranks(RANKS):
        linear = BlockwiseFP8Linear(64, 64, bias=False)
        linear.weight = nn.Parameter(
            distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (RANKS,)), [Shard(0)])
        )
        with pytest.raises(
            ValueError, match="input of a blockwise-fp8 linear is a plain tensor and its weight a DTensor"
        ):
            linear(torch.randn(3, 64))


def test_four_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Processes forked from one that has done the imports, which take longer than the checks.
    multiprocessing.set_forkserver_preload(["torch._inductor.compile_fx", "torchtitan.train"])
    mp.start_processes(check_in_process, (str(tmp_path / "store"),), RANKS, start_method="forkserver")


def check_in_process(rank: int, store: str) -> None:
    import blockfp8_titan.cpu  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rest", "tp"))["tp"]
    if rank < mesh.size():
        check_linears(mesh)
    check_models(rank)
    dist.destroy_process_group()


def check_linears(mesh: DeviceMesh) -> None:
    block = Recipe(wgrad="fp8_block")
    for tokens, recipe in (((), Recipe()), ((0,), block), ((1,), block), ((7,), BF16_DW), ((2, 129), Recipe())):
        for style in (ColwiseParallel, RowwiseParallel):
            check_linear(mesh, style, tokens, recipe)
    check_partial_sums_are_reduced_before_they_are_quantised(mesh)
    check_small_shards(mesh)
    check_replicated_weight(mesh)
    check_frozen(mesh)
    check_compiled_linear(mesh)
    check_that_compiled_blocks_fail_without_fp8(mesh)


def twins(in_features: int, out_features: int, recipe: Recipe = Recipe(), bias: bool = False):
    """Two equal linears, of the same weights on every rank."""
    torch.manual_seed(in_features * out_features)
    whole = BlockwiseFP8Linear(in_features, out_features, bias, recipe=recipe)
    other = BlockwiseFP8Linear(in_features, out_features, bias, recipe=recipe)
    other.load_state_dict(whole.state_dict())
    return whole, other


def assert_alike(expected: list[torch.Tensor], found: list[torch.Tensor], floor: float = SAME_BUT_FOR_SUMS) -> None:
    for a, b in zip(expected, found, strict=True):
        b = b.full_tensor() if isinstance(b, DTensor) else b
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.numel() == 0 or torch.equal(a, b) or sqnr(a, b) > floor, sqnr(a, b)


def check_linear(mesh: DeviceMesh, style: type[ParallelStyle], tokens: tuple[int, ...], recipe: Recipe) -> None:
    """Shards of 128 and 256: the blocks are those of the whole."""
    whole, sharded = twins(256, 512, recipe, bias=True)
    parallelize_module(sharded, mesh, style(input_layouts=Replicate(), output_layouts=Replicate()))
    x, dy = torch.randn(*tokens, 256, requires_grad=True), torch.randn(*tokens, 512)
    sharded_x = x.detach().clone().requires_grad_()
    y, sharded_y = whole(x), sharded(sharded_x)
    y.backward(dy)
    sharded_y.backward(dy)
    assert sharded.weight.grad.placements == sharded.weight.placements
    assert_alike(
        [y, x.grad, whole.weight.grad, whole.bias.grad],
        [sharded_y, sharded_x.grad, sharded.weight.grad, sharded.bias.grad],
    )


def check_partial_sums_are_reduced_before_they_are_quantised(mesh: DeviceMesh) -> None:
    """Row-wise into column-wise, without a style between them that reduces."""
    whole = nn.Sequential(*(twins(256, 256)[0] for _ in range(2)))
    sharded = nn.Sequential(*(twins(256, 256)[0] for _ in range(2)))
    for linear, placement in zip(sharded, (Shard(1), Shard(0)), strict=True):
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [placement]))
    x, dy = torch.randn(5, 256, requires_grad=True), torch.randn(5, 256)
    sharded_x = distribute_tensor(x.detach(), mesh, [Replicate()]).requires_grad_()
    y, sharded_y = whole(x), sharded(sharded_x)
    assert sharded[0](sharded_x).placements == (Partial(),)
    y.backward(dy)
    sharded_y.backward(distribute_tensor(dy, mesh, [Shard(1)]))
    found = [sharded_y, sharded_x.grad, *(linear.weight.grad for linear in sharded)]
    # Another order of sums moves an activation across a rounding boundary now and then: far below quantisation noise (28 dB).
    assert_alike([y, x.grad, *(linear.weight.grad for linear in whole)], found, floor=45.0)


def check_small_shards(mesh: DeviceMesh) -> None:
    """Shards of 48 and 80: other blocks than the whole's, no more noise."""
    for style, sizes in ((ColwiseParallel, (144, 96)), (RowwiseParallel, (160, 144))):
        torch.manual_seed(0)
        exact = nn.Linear(*sizes, bias=False)
        sharded = BlockwiseFP8Linear(*sizes, bias=False)
        sharded.load_state_dict(exact.state_dict())
        parallelize_module(sharded, mesh, style(input_layouts=Replicate(), output_layouts=Replicate()))
        x, dy = torch.randn(200, sizes[0], requires_grad=True), torch.randn(200, sizes[1])
        sharded_x = x.detach().clone().requires_grad_()
        y, sharded_y = exact(x), sharded(sharded_x)
        y.backward(dy)
        sharded_y.backward(dy)
        for name, a, b in (
            ("y", y, sharded_y),
            ("dx", x.grad, sharded_x.grad),
            ("dw", exact.weight.grad, sharded.weight.grad.full_tensor()),
        ):
            assert sqnr(a, b) > SQNR_FLOOR_DB[name], (name, sqnr(a, b))


def check_replicated_weight(mesh: DeviceMesh) -> None:
    """Tokens split unevenly, as sequence parallelism of an odd length does: 4 and 3 of 7."""
    whole, replicated = twins(128, 64, Recipe(wgrad="bf16"))
    replicated.weight = nn.Parameter(distribute_tensor(replicated.weight.detach(), mesh, [Replicate()]))
    x, dy = torch.randn(2, 7, 128, requires_grad=True), torch.randn(2, 7, 64)
    split_x = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    y, split_y = whole(x), replicated(split_x)
    assert split_y.placements == (Shard(1),) and split_y.shape == y.shape and split_y.stride() == y.stride()
    y.backward(dy)
    split_y.backward(distribute_tensor(dy, mesh, [Shard(1)]))
    assert replicated.weight.grad.placements == (Partial(),)
    assert_alike([y, x.grad], [split_y, split_x.grad])
    # dw: each rank's part is rounded to bf16 before it is summed.
    assert_alike([whole.weight.grad], [replicated.weight.grad], floor=SQNR_FLOOR_DB["dw_bf16"])


def check_frozen(mesh: DeviceMesh) -> None:
    whole, sharded = twins(128, 256)
    sharded.requires_grad_(False)
    parallelize_module(sharded, mesh, ColwiseParallel(output_layouts=Replicate()))
    x = torch.randn(3, 128, requires_grad=True)
    sharded(x).sum().backward()
    found, x.grad = x.grad, None
    whole(x).sum().backward()
    assert sharded.weight.grad is None
    assert_alike([x.grad], [found])
    with torch.no_grad():
        assert_alike([whole(x)], [sharded(x)])


def check_compiled_linear(mesh: DeviceMesh) -> None:
    eager, compiled = twins(128, 256)
    for linear in (eager, compiled):
        parallelize_module(linear, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()))
    x = torch.randn(9, 128)
    y, compiled_y = eager(x), torch.compile(compiled, backend="aot_eager", fullgraph=True)(x)
    y.square().sum().backward()
    compiled_y.square().sum().backward()
    assert_alike([y, eager.weight.grad.full_tensor()], [compiled_y, compiled.weight.grad])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def check_that_compiled_blocks_fail_without_fp8(mesh: DeviceMesh) -> None:
    """What the converter refuses on newer torch does fail there, with torch alone. If this fails, refuse less."""
    model = nn.Sequential(nn.Embedding(32, 64), Block())
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1.norm": SequenceParallel(),
        "1.linear": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, plan)
    model[1] = torch.compile(model[1], backend="aot_eager", fullgraph=True)
    fails = TorchVersion(torch.__version__) >= FIRST_TORCH_WITHOUT_COMPILED_TP
    expected = pytest.raises(AttributeError, match="_local_tensor") if fails else contextlib.nullcontext()
    with expected:
        model(torch.arange(32).view(2, 16)).sum().backward()


DEGREES = {
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 4},
    "fsdp x tp": {"dp_shard": 2, "tp": 2},
}


def check_models(rank: int) -> None:
    """Loss and gradients of a small converted Llama, as torchtitan parallelises it, beside those of one process."""
    args = dataclasses.replace(llama3_args["debugmodel"], n_layers=1, dim=512, vocab_size=512, multiple_of=512)
    job = JobConfig()
    job.training.mixed_precision_param = "float32"
    job.training.seq_len = 128  # dw's groups of 128 tokens are a sequence, on however many ranks
    job.activation_checkpoint.mode = "none"
    torch.manual_seed(0)
    whole = Transformer(args)
    with torch.no_grad():
        whole.init_weights()
    convert_model(whole)
    tokens, labels = torch.randint(args.vocab_size, (2, RANKS, 128))
    expected = F.cross_entropy(whole(tokens).flatten(0, 1), labels.flatten())
    expected.backward()

    for name, degrees in DEGREES.items():
        ones = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
        dims = ParallelDims(**(ones | degrees), world_size=RANKS)
        dims.build_mesh()
        with torch.device("meta"):
            model = Transformer(args)
        convert_model(model)
        model = parallelize_llama(model, dims, job)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device="cpu")
        set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
        ways = dims.dp_replicate * dims.dp_shard
        batch = slice(rank // dims.tp * RANKS // ways, (rank // dims.tp + 1) * RANKS // ways)
        with loss_parallel() if dims.tp_enabled else contextlib.nullcontext():
            loss = F.cross_entropy(model(tokens[batch]).flatten(0, 1), labels[batch].flatten()) / ways
            loss.backward()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        assert torch.allclose(loss / dims.tp, expected, rtol=1e-4), (name, loss / dims.tp, expected)
        for (fqn, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
            # Under tensor parallelism another order of sums moves an activation across a rounding boundary now and then.
            assert sqnr(a.grad, b.grad.full_tensor()) > (40.0 if dims.tp_enabled else 100.0), (name, fqn)
