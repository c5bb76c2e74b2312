"""configs/: every job config loads, every pair of twins differs in the converter only, every preset fits Llama 3 8B."""

from pathlib import Path

import pytest
import tomli
from torchtitan.config import ConfigManager

from blockfp8_titan.conversion import plan_conversion
from blockfp8_titan.plan import build_on_meta
from blockfp8_titan.rules import load_rules_file, presets

CONFIGS = Path(__file__).parent.parent / "configs"
JOBS = sorted(CONFIGS.glob("*.toml"))
FP8_JOBS = [path for path in JOBS if path.stem.endswith("_blockwise_fp8")]
CONVERTER_KEYS = {
    ("job", "custom_config_module"),
    ("job", "description"),
    ("job", "dump_folder"),
    ("experimental", "custom_import"),
    ("model", "converters"),
    ("blockwise_fp8",),
}


def load(path):
    return ConfigManager().parse_args(["--job.config_file", str(path)])


def leaves(table, prefix=()):
    """{("job", "description"): "…"}; [blockwise_fp8] counts as one."""
    found = {}
    for key, value in table.items():
        path = (*prefix, key)
        if isinstance(value, dict) and path not in CONVERTER_KEYS:
            found |= leaves(value, path)
        else:
            found[path] = value
    return found


def test_there_are_configs():
    assert {path.stem for path in FP8_JOBS} == {f"{n}_blockwise_fp8" for n in ("debug", "llama3_8b", "llama3_70b")}
    assert len(JOBS) == 2 * len(FP8_JOBS)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_config_loads(path):
    job = load(path)
    assert job.model.converters == (["blockwise_fp8"] if path in FP8_JOBS else [])
    assert job.parallelism.tensor_parallel_degree == (8 if job.model.flavor == "70B" else 1)


@pytest.mark.parametrize("path", FP8_JOBS, ids=lambda path: path.stem)
def test_twins_differ_in_the_converter_only(path):
    fp8 = leaves(tomli.loads(path.read_text()))
    bf16 = leaves(tomli.loads(path.with_stem(path.stem.replace("blockwise_fp8", "bf16")).read_text()))
    differing = {key for key in fp8.keys() | bf16.keys() if fp8.get(key) != bf16.get(key)}
    assert differing <= CONVERTER_KEYS
    assert ("blockwise_fp8",) in differing
    for key in (("job", "dump_folder"), ("job", "description")):
        assert fp8[key] != bf16[key]


@pytest.fixture(scope="module")
def llama3_8b():
    return build_on_meta(load(CONFIGS / "llama3_8b_blockwise_fp8.toml"))


@pytest.mark.parametrize(
    ("preset", "linears_in_fp8", "bf16_wgrads"),
    [("skip_kv", 160, 0), ("ffn_only", 96, 0), ("wgrad_bf16", 224, 224), ("large_only", 160, 0)],
)
def test_a_preset_does_to_llama3_8b_what_it_says(llama3_8b, preset, linears_in_fp8, bf16_wgrads):
    report = plan_conversion(llama3_8b, load_rules_file(preset))
    assert report.totals()["linears_in_fp8"] == linears_in_fp8
    assert sum(row.recipe is not None and row.recipe.wgrad == "bf16" for row in report.rows) == bf16_wgrads
    assert report.warnings == ()


def test_every_preset_is_tested():
    assert presets() == ["ffn_only", "large_only", "skip_kv", "wgrad_bf16"]


@pytest.mark.parametrize("preset", presets())
def test_a_preset_says_when_to_use_it(preset):
    head = (CONFIGS / "rules" / f"{preset}.toml").read_text().split("[[rules]]")[0]
    assert head.startswith("# ") and "Use it " in head
