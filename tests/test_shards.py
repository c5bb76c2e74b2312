"""blockfp8_titan.shards: the cuts are torch.chunk's, and what they come to on whole models."""

import random
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torchtitan.config import ConfigManager

from blockfp8_titan import plan
from blockfp8_titan.conversion import ConversionReport, plan_conversion
from blockfp8_titan.shards import Sharding, simulate

CONFIGS = Path(__file__).parent.parent / "configs"
LARGE = {"8B": "llama3_8b", "70B": "llama3_70b", "405B": "llama3_70b"}


class OneLinear(nn.Module):
    """A block with one Linear of n x k and a bf16 vector of m."""

    def __init__(self, n: int, k: int, m: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(k, n, bias=False, device="meta")])
        self.norm = nn.Parameter(torch.empty(m, device="meta"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 512, 1000])
def test_a_cut_is_that_of_torch_chunk(ranks: int) -> None:
    for _ in range(5):
        n, k, m = 16 * random.randint(1, 300), 16 * random.randint(1, 20), random.randint(1, 3000)
        model = OneLinear(n, k, m)
        report = plan_conversion(model)
        sharding = simulate(model, report, ranks, param_dtype=torch.bfloat16, fp8_all_gather=True)
        (shards,) = sharding.weights
        chunks = torch.empty(n).chunk(ranks)
        assert (shards.rows, shards.last_rows) == (len(chunks[0]), len(chunks[-1]))
        assert shards.empty_ranks == ranks - len(chunks)
        ends = list(accumulate(map(len, chunks)))
        assert shards.on_blocks == all(end % 128 == 0 for end in ends[:-1])
        # FSDP2 pads every shard to the first one's rows.
        vector = torch.empty(m).chunk(ranks)
        assert sharding.gathered_bytes == ranks * (len(chunks[0]) * k + 2 * len(vector[0]))
        assert sharding.gathered_bytes_unquantised == ranks * 2 * (len(chunks[0]) * k + len(vector[0]))
        assert sharding.scale_table_bytes == 4 * -(-n // 128) * -(-k // 128)


def test_without_fp8_all_gather_every_weight_falls_back() -> None:
    model = OneLinear(256, 128, 5)
    sharding = simulate(model, plan_conversion(model), 4, param_dtype=torch.float32, fp8_all_gather=False)
    assert sharding.fallbacks == 1
    assert sharding.weights[0].gathered_in == "float32"
    assert sharding.gathered_bytes == sharding.gathered_bytes_unquantised == 4 * (256 * 128 + 8)


def test_a_tied_weight_falls_back_alone() -> None:
    model = nn.Module()
    model.embeddings = nn.Embedding(256, 128, device="meta")
    model.layers = nn.ModuleList(nn.Linear(128, 256, bias=False, device="meta") for _ in range(2))
    model.layers[1].weight = model.embeddings.weight
    sharding = simulate(model, plan_conversion(model), 2, param_dtype=torch.bfloat16, fp8_all_gather=True)
    assert [(s.count, s.gathered_in) for s in sharding.weights] == [(1, "float8_e4m3fn"), (1, "bfloat16")]
    assert sharding.fallbacks == 1 and sharding.scale_table_bytes == 2 * 4
    assert sharding.gathered_bytes == 256 * 128 * 3


def test_no_rank_is_an_error() -> None:
    model = OneLinear(16, 16, 1)
    with pytest.raises(ValueError, match="ranks = 0: must be at least 1"):
        simulate(model, plan_conversion(model), 0, param_dtype=torch.bfloat16, fp8_all_gather=True)


def test_shards_of_tensor_parallelism_are_not_shown() -> None:
    config = CONFIGS / "debug_blockwise_fp8.toml"
    job = ConfigManager().parse_args([f"--job.config_file={config}", "--parallelism.tensor_parallel_degree=2"])
    model = OneLinear(256, 128, 5)
    with pytest.raises(ValueError, match="tensor_parallel_degree = 2 cuts the weights before it"):
        plan.simulate_sharding(job, model, plan_conversion(model), 4)


@pytest.fixture(scope="module", params=LARGE)
def large(request: pytest.FixtureRequest) -> tuple[str, nn.Module, ConversionReport]:
    """A flavor's name, its model on the meta device and what is converted of it."""
    config = CONFIGS / f"{LARGE[request.param]}_blockwise_fp8.toml"
    job = ConfigManager().parse_args([f"--job.config_file={config}", f"--model.flavor={request.param}"])
    model = plan.build_on_meta(job)
    return request.param, model, plan.plan(job, model)


# Rows of wq, wk and wv, w1 and w3, w2 on each rank.
ROWS = {
    ("8B", 64): [64, 16, 224, 64],
    ("8B", 512): [8, 2, 28, 8],
    ("70B", 64): [128, 16, 448, 128],
    ("70B", 512): [16, 2, 56, 16],
    ("405B", 64): [256, 16, 832, 256],
    ("405B", 512): [32, 2, 104, 32],
}


@pytest.mark.parametrize("ranks", [64, 512])
def test_a_large_model_is_gathered_in_fp8_whatever_its_shards(
    large: tuple[str, nn.Module, ConversionReport], ranks: int
) -> None:
    flavor, model, report = large
    sharding: Sharding = simulate(model, report, ranks, param_dtype=torch.bfloat16, fp8_all_gather=True)
    assert [shards.rows for shards in sharding.weights] == ROWS[flavor, ranks]
    assert [shards.on_blocks for shards in sharding.weights] == [rows % 128 == 0 for rows in ROWS[flavor, ranks]]
    assert all(shards.last_rows == shards.rows and not shards.empty_ranks for shards in sharding.weights)
    assert sum(shards.count for shards in sharding.weights) == report.totals()["linears_in_fp8"]
    assert sharding.fallbacks == 0
    # A byte for each parameter in fp8 and two for each other one; norms and the embedding are padded.
    exact = 2 * report.model_parameters - report.fp8_parameters
    assert exact <= sharding.gathered_bytes < 1.002 * exact
    # Four bytes for each 128 x 128 of the parameters in fp8, all of which are multiples of 128.
    assert sharding.scale_table_bytes == report.fp8_parameters // 128**2 * 4


def test_the_table_names_ranks_without_rows() -> None:
    model = OneLinear(256, 128, 5)
    sharding = simulate(model, plan_conversion(model), 512, param_dtype=torch.bfloat16, fp8_all_gather=True)
    (shards,) = sharding.weights
    assert (shards.rows, shards.last_rows, shards.empty_ranks) == (1, 1, 256)
    table = sharding.to_table()
    assert table.startswith("512 FSDP ranks") and "fallbacks: none" in table
    assert table.splitlines()[2].split() == ["256", "x", "128", "1", "1", "1", "256", "no", "float8_e4m3fn"]
