"""The report of runs and comparisons: what is read, what the page says, that it stands alone."""

import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import page
import pytest
import report
import subjects
import torch.nn as nn
from launch import ROOT
from runs import BF16
from subjects import Group, Subject, flatten

from blockfp8_titan import Rule, convert_model
from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.journal import Journal

RESULTS = ROOT / "scripts" / "results"
VERSIONS = {"torch": "2.11.0", "triton": None}
HARDWARE = {"platform": "Linux", "gpus": ["NVIDIA H100", "NVIDIA H100"], "driver": "1.2"}


def write_run(
    folder: Path,
    converters: list[str],
    factor: float = 1.0,
    steps: int = 40,
    resumed_at: int | None = None,
    **config: Any,
) -> Path:
    """A run's folder as blockfp8_titan.metrics leaves it."""
    tables = {"model": {"name": "llama3", "converters": converters}, "training": {"seq_len": 64, **config}}
    tables["job"] = {"dump_folder": str(folder)}
    about = {"world_size": 2, "versions": VERSIONS, "hardware": HARDWARE, "config": tables}
    for number, first in enumerate([1, *([resumed_at] if resumed_at else [])]):
        Journal(folder / "runs.jsonl").append({"run": f"r{number}", "first_step": first, **about})
    for step in range(1, steps + 1):
        begins = step in (1, resumed_at)
        record = {
            "step": step,
            "loss": factor * (3 + 5 / step),
            "grad_norm": 1 + 1 / step,
            "tps": 10.0 if begins else 1000 * factor + step % 5,
            "memory_gib": 40 + step / 10,
            "run": f"r{int(bool(resumed_at) and step >= resumed_at)}",
        }
        Journal(folder / "metrics.jsonl").append(record)
    if converters == ["blockwise_fp8"]:
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(128, 256)] * 1), "output": nn.Linear(128, 32)})
        found = convert_model(model, [Rule("output", "skip", "the head stays")])
        (folder / "blockwise_fp8_conversion.json").write_text(found.to_json())
    return folder


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    return write_run(tmp_path / "bf16", [])


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return write_run(tmp_path / "fp8", ["blockwise_fp8"], 1.001, resumed_at=21)


class Page(HTMLParser):
    """Checks that elements nest, and collects text and what is loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset") and value]
        self.loads += [tag] * (tag in ("script", "link", "iframe"))
        if tag not in ("meta", "wbr", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def make(tmp_path: Path, *runs: Path, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """HTML and Markdown."""
    assert report.main([*map(str, runs), "--out", str(tmp_path / "new" / "r.v1"), *options]) == 0
    return (tmp_path / "new" / "r.v1.html").read_text(), (tmp_path / "new" / "r.v1.md").read_text()


# What is read


def test_a_run_folder_is_read(fp8: Path) -> None:
    subject = subjects.of_folder(fp8, "fp8")
    assert (subject.converter, subject.is_base, subject.hardware["processes"]) == ("blockwise_fp8", False, 2)
    assert list(subject.loss) == list(range(1, 41)) and subject.memory == pytest.approx(44)
    # The slow first records of both starts are left out.
    assert subject.speed.low > 1000 and subject.speed.tps == pytest.approx(1003) and subject.speed.high <= 1005
    assert subject.config["training.seq_len"] == "64" and subject.remark == "started 2 times, at steps 1, 21"
    assert [row.fqn for row in subject.conversion.rows] == ["layers.0", "output"]


def test_a_torn_and_diverged_run_is_read(bf16: Path) -> None:
    Journal(bf16 / "metrics.jsonl").append({"step": 41, "loss": math.nan, "grad_norm": math.inf, "run": "r0"})
    with (bf16 / "metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "lo')
    subject = subjects.of_folder(bf16, "bf16")
    assert max(subject.loss) == 41 and math.isnan(subject.loss[41]) and math.isnan(subject.grad_norm[41])


def test_a_conversion_that_cannot_be_read_is_named(fp8: Path) -> None:
    path = fp8 / "blockwise_fp8_conversion.json"
    for text in (path.read_text()[:-40], '{"rows": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{path}: is no conversion report of this version"):
            subjects.of_folder(fp8, "fp8")


@pytest.mark.parametrize(
    ("converters", "recipe", "name"),
    [
        ([], None, "bf16"),
        (["blockwise_fp8"], None, "blockwise_fp8"),
        (["quantize.linear.float8"], None, "float8_tensorwise"),
        (["quantize.linear.float8"], "rowwise", "float8_rowwise"),
        (["quantize.linear.float8", "save_scaled_mm"], "rowwise", "float8_rowwise+saved"),
        (["quantize.linear.float8", "real_rope"], None, "float8_tensorwise+rope"),
        (["real_rope"], None, "bf16+rope"),
        (["blockwise_fp8", "real_rope"], None, "blockwise_fp8,real_rope"),
        (["torchao_blockwise", "save_scaled_mm"], None, "torchao_blockwise+saved"),
        (
            ["quantize.linear.float8", "real_rope", "save_scaled_mm"],
            None,
            "quantize.linear.float8,real_rope,save_scaled_mm",
        ),
        (["mine", "other"], None, "mine,other"),
    ],
)
def test_runs_are_told_by_their_converters(converters: list[str], recipe: str | None, name: str) -> None:
    config = {"model": {"converters": converters}, "quantize": {"linear": {"float8": {"recipe_name": recipe}}}}
    assert subjects._converter_of(config) == name


def test_overrides_are_settings() -> None:
    words = ["--a.b=c=d", "--compile.enable", "--compile.no-enable", "--metrics.no-enable_wandb", "--a.note=1"]
    assert subjects.from_overrides(words) == {
        "a.b": "c=d",
        "compile.enable": "false",
        "metrics.enable_wandb": "false",
        "a.note": "1",
    }


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "bf16", tmp_path / "b" / "bf16"]
    assert [name for _, name in subjects._named(paths)] == ["a/bf16", "b/bf16"]
    assert [name for _, name in subjects._named([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    with pytest.raises(ValueError, match="the same run twice"):
        subjects._named([paths[0], paths[0]])


def test_other_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"summary": 3}')
    (tmp_path / "torn.json").write_text('{"summ')
    for name, words in [
        ("empty", "there is no step in metrics.jsonl"),
        ("other.json", "must be the JSON that compare_loss.py or compare_throughput.py wrote"),
        ("torn.json", "readable JSON file"),
        ("missing", "neither a run's folder"),
    ]:
        with pytest.raises(SystemExit):
            report.main([str(tmp_path / name)])
        assert f"{name}: " in (error := capsys.readouterr().err) and words in error


# What is said


def test_two_runs_are_compared(tmp_path: Path, bf16: Path, fp8: Path) -> None:
    html, markdown = make(tmp_path, bf16, fp8, options=("--title", "A <b> title"))
    page_ = Page(html)
    assert page_.loads == [] and "url(" not in html and "@import" not in html and "A <b>" not in html
    assert "A <b> title" in page_.texts and markdown.startswith("# A <b> title")
    loss = 1.001 * sum(3 + 5 / step for step in range(37, 41)) / 4
    norm = sum(1 + 1 / step for step in range(37, 41)) / 4
    assert f"| fp8 | 40 | {loss:.4f} | +0.100% | ✓ yes | {norm:.4f} |" in markdown
    assert "1,003 | 1.001 | 44.0 GiB | 1.000 |" in markdown
    for text in ("+0.100%", "✓ yes", "Training loss", "Peak memory of a process", "2 × NVIDIA H100", "the head stays"):
        assert text in page_.texts
    assert "fp8: started 2 times, at steps 1, 21" in markdown
    assert "1 of 2 Linears in fp8" in markdown and "1 of 2 Linears in fp8" in html
    # Of the settings, the converters alone differ; versions are those of all runs.
    settings = markdown.split("### Settings that differ")[1].split("##")[0]
    assert re.findall(r"^\| (\w+\.\S+) \|", settings, re.MULTILINE) == ["model.converters"]
    assert "|  | all runs |" in markdown


def test_defaults_of_the_section_that_bf16_lacks_do_not_differ() -> None:
    section = flatten({"blockwise_fp8": asdict(BlockwiseFP8(wgrad="fp8_block"))})
    base, ours = Subject("bf16", BF16, True, config={"a.b": "1"}), Subject("fp8", "blockwise_fp8", False)
    ours.config = {"a.b": "1", **section}
    _, table = report.settings(Group("g", [base, ours]))
    assert table.rows == [("blockwise_fp8.wgrad", "—", "fp8_block")]


def test_a_run_beyond_the_threshold_is_told(tmp_path: Path, bf16: Path) -> None:
    far = write_run(tmp_path / "far", ["blockwise_fp8"], 1.004)
    nan = write_run(tmp_path / "nan", ["blockwise_fp8"], math.nan)
    html, markdown = make(tmp_path, bf16, far, nan)
    assert "+0.400% | ✗ no" in markdown and '<td class="bad">✗ no</td>' in html
    assert "| not finite | not finite | ✗ no |" in markdown
    assert "✓ yes" in make(tmp_path, bf16, far, options=("--threshold", "0.005"))[1]


def test_a_run_alone_is_set_against_the_defaults(tmp_path: Path, fp8: Path) -> None:
    html, markdown = make(tmp_path, fp8)
    Page(html)
    assert "Settings other than torchtitan's defaults" in markdown and "| training.seq_len | 64 | 2048 |" in markdown
    assert "gap to bf16" not in markdown


def test_runs_on_other_machines_have_columns_of_their_own(tmp_path: Path, bf16: Path, fp8: Path) -> None:
    Journal(fp8 / "runs.jsonl").append({"run": "r2", "versions": {"torch": "2.13.0"}, "hardware": {"cpus": 2}})
    assert "| torch | 2.11.0 | 2.13.0 |" in make(tmp_path, bf16, fp8)[1]


@pytest.mark.parametrize(
    "name", sorted(path.stem for kind in ("loss", "e2e") for path in RESULTS.glob(f"{kind}_*.json"))
)
def test_the_projects_results_make_a_report(tmp_path: Path, name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    html, markdown = make(tmp_path, RESULTS / f"{name}.json")
    assert Page(html).loads == []
    summary = result["summary"]
    rows = summary if isinstance(summary, list) else [{"arm": arm, **row} for arm, row in summary.items()]
    for row in rows:
        assert re.search(rf"^\| {re.escape(row['arm'])} \|.*\b{row['tps']:,.0f} \|", markdown, re.MULTILINE)
    for gpu in result["hardware"].get("gpus", [])[:1]:  # none where it ran on CPUs
        assert f"× {gpu}" in markdown
    assert result["versions"]["torch"] in markdown


def test_a_failed_arm_is_told(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "e2e_8b.json").read_text())
    ours = result["summary"][1]
    arm = {key: ours[key] for key in ("group", "arm", "converter", "nproc")}
    result["summary"][1] = {**arm, "rounds": 0, "failure": "OutOfMemoryError"}
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert f"{ours['arm']}: failed: OutOfMemoryError" in make(tmp_path, tmp_path / "r.json")[1]


def test_runs_of_other_lengths_get_no_verdict() -> None:
    base = Subject("bf16", BF16, True, loss={step: 8.0 for step in range(1, 101)})
    long = Subject("fp8", "blockwise_fp8", False, loss={step: 8.0 if step <= 100 else 99.0 for step in range(1, 1001)})
    table, note = report.overview(Group("g", [base, long]), 0.0025)
    assert not any("✓" in cell or "%" in cell for cell in table.rows[1])
    assert note.text == "fp8 is logged to step 1,000 and bf16 to 100: their ends are not compared."


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"config": {"training.seq_len": "128", "debug.seed": "1"}}, "training.seq_len is 128 and 64"),
        ({"config": {"optimizer.lr": "0.1", "debug.seed": "1"}}, "optimizer.lr is 0.1 and 0.01"),
        ({"tokens_per_step": 512.0}, "tokens a step are 512 and 256"),
        ({"config": {"debug.seed": "2"}}, "debug.seed is 2 and 1"),
        ({}, ""),
        ({"config": {"model.converters": "[]", "job.dump_folder": "x", "debug.seed": "1"}}, ""),
    ],
)
def test_runs_that_learn_something_else_get_no_verdict(changed: dict, words: str) -> None:
    common = {"loss": {step: 8.0 for step in range(1, 101)}, "tokens_per_step": 256.0}
    config = {"training.seq_len": "64", "optimizer.lr": "0.01", "debug.seed": "1", "model.converters": "['a']"}
    base = Subject("bf16", BF16, True, **common, config=config)
    ours = Subject("fp8", "blockwise_fp8", False, **{**common, "config": config} | changed)
    table, *notes = report.overview(Group("g", [base, ours]), 0.0025)
    assert any("✓" in cell for cell in table.rows[1]) == (not words)
    assert [note.text for note in notes] == (
        [f"fp8 does not learn what bf16 does: {words}. Their losses are not compared."] if words else []
    )


def test_runs_without_a_seed_begin_with_other_weights() -> None:
    common = {"loss": {step: 8.0 for step in range(1, 101)}, "config": {"debug.seed": "null"}}
    subjects_ = [Subject("bf16", BF16, True, **common), Subject("fp8", "blockwise_fp8", False, **common)]
    table, note = report.overview(Group("g", subjects_), 0.0025)
    assert "✓" not in "".join(table.rows[1]) and "debug.seed is not set" in note.text


@pytest.mark.parametrize("name", ["e2e_8b", "e2e_8b_choices", "e2e_8b_8l_hooks"])
def test_ratios_and_percentiles_are_those_of_the_result(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    groups = subjects.groups_of([RESULTS / f"{name}.json"])
    cells = {row[0]: row for group in groups for row in report.overview(group, 0.0025)[0].rows}
    found = {subject.name: subject for group in groups for subject in group.subjects}
    for row in result["summary"]:
        assert f"{row['tps_ratio']:.3f}" in cells[row["arm"]]
        tps = [
            value
            for run in result["runs"]
            if run["arm"] == row["arm"] and run["speed"]
            for step, value in run["speed"].get("steps", [])
            if step > result["skip"]
        ]
        speed = found[row["arm"]].speed
        assert (speed.low is None) == (len(tps) < 2)
        if speed.low is not None:
            assert min(tps) <= speed.low <= speed.tps <= speed.high <= max(tps)


# Pieces


def test_lines_are_drawn_where_their_points_are() -> None:
    line = page.Line("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 4.0), (4, 3.0)], "#000")
    html = page.Chart("t", [line], band=(2.0, 3.0), unit="%").html()
    path = re.search(r'<path d="(M[^"]+L[^"]+)"', html)[1]
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    assert path.count("M") == 2 and [x for x, _ in points] == [0, 250, 750, 1000]
    # y from 1 to 4 with a margin of 4 %.
    assert [y for _, y in points] == pytest.approx([1000 * (4.12 - y) / 3.24 for y in (1, 2, 4, 3)], abs=0.06)
    band = ElementTree.fromstring(re.search(r"<rect[^>]+/>", html)[0])
    assert float(band.get("y")) == pytest.approx(1000 * 1.12 / 3.24, abs=0.06)
    assert ">4%</i>" in html
    assert page.Chart("t", [page.Line("a", [(1, math.nan)], "#000")]).html() == ""


def test_long_lines_are_thinned() -> None:
    line = page.Line("a", [(i, float(i % 7)) for i in range(50_000)], "#000")
    assert 900 < page.Chart("t", [line]).html().count("L") <= 1000


def test_a_thinned_line_keeps_its_spikes_gaps_and_ends() -> None:
    values = {2503: 9.0, 3001: -9.0, 4111: math.nan}
    points = [(i, values.get(i, 0.5)) for i in range(1, 5001)]
    kept = page.Chart("t", [])._thinned(points)
    assert len(kept) < 1100 and {2503, 3001, 4111} <= {x for x, _ in kept} and kept == sorted(kept)
    assert kept[0][0] < 20 and kept[-1][0] > 4980


def test_a_point_alone_is_a_dot() -> None:
    line = page.Line("a", [(1, math.nan), (2, 3.0), (3, math.nan), (4, 1.0), (5, 2.0)], "#000")
    html = page.Chart("t", [line]).html()
    assert re.search(r'<path d="M250\.0 [\d.]+h0" stroke="#000" stroke-width="6" stroke-linecap="round"', html)
    assert re.search(r'<path d="M750\.0 [\d.]+L1000\.0 [\d.]+" fill="none"', html)


def test_flat_and_single_lines_have_ticks() -> None:
    for points in ([(1, 5.0)], [(1, 5.0), (2, 5.0)], [(1, 0.0), (2, 0.0)]):
        assert page.Chart("t", [page.Line("a", points, "#000")]).html().count('class="y"') >= 2
    assert page.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert page.log_ticks(0, 0.5) == pytest.approx([1, 2, 3])
    assert page.log_ticks(-0.5, 1) == pytest.approx([0.5, 1, 2, 5, 10])


def test_bars_have_the_length_of_their_values() -> None:
    html = page.Bars("t", [page.Bar("a", 50, "50", "#111", 45, 55), page.Bar("b", 100, "100", "#222")]).html()
    assert "width:50.00%" in html and "width:100.00%" in html and "left:45.00%;width:10.00%" in html


def test_a_heat_map_has_a_cell_for_each_row_and_column() -> None:
    rows = [("<a>", {1: 10.0, 5: 10.0, 9: 35.0}), ("b", {5: 29.0, 9: math.nan})]
    html = page.HeatMap("t", rows, (20, 24, 26, 28, 30, 31), " dB").html()
    assert 'viewBox="0 0 3 2"' in html and "&lt;a&gt;" in html and "below 20 dB" in html and "from 31 dB" in html
    cells = {color: path for path, color in re.findall(r'<path d="([^"]+)" stroke="([^"]+)"', html)}
    # What is missing or not finite stays grey.
    assert cells == {page.HEAT[0]: "M0 0.5h2", page.HEAT[-1]: "M2 0.5h1", page.HEAT[4]: "M1 1.5h1"}
    assert page.HeatMap("t", [], (20, 24, 26, 28, 30, 31)).html() == ""


def test_what_is_not_finite_is_black_and_hides_behind_nothing() -> None:
    values = {step: 35.0 for step in range(1000)} | {500: -math.inf}
    html = page.HeatMap("t", [("a", values)], (20, 24, 26, 28, 30, 31), worst="NaN or Inf").html()
    assert f'<path d="M55 0.5h1" stroke="{page.WORST}"' in html and "NaN or Inf</span>" in html
    values[500] = 35.0
    assert "NaN or Inf" not in page.HeatMap("t", [("a", values)], (20, 24, 26, 28, 30, 31), worst="NaN or Inf").html()


def test_many_columns_share_cells_that_show_the_lowest() -> None:
    values = {step: 35.0 for step in range(1000)} | {500: 1.0}
    html = page.HeatMap("t", [("a", values)], (20, 24, 26, 28, 30, 31)).html()
    assert 'viewBox="0 0 112 1"' in html and f'<path d="M55 0.5h1" stroke="{page.HEAT[0]}"' in html


def test_cells_are_escaped() -> None:
    table = page.Table(("a", "b"), [("<x>", "p|q")])
    assert "&lt;x&gt;" in table.html() and "p\\|q" in table.markdown()
