"""Files of JSON lines: torn, killed in the middle, gone on with."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import torch

from blockfp8_titan.journal import Journal, read

RECORDS = [{"step": 1, "loss": 8.25}, {"step": 2, "text": "…é"}, {"step": 3, "list": [1, None, "x"]}]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "new" / "metrics.jsonl")


def test_what_is_appended_is_read(journal: Journal) -> None:
    assert read(journal.path) == []
    for record in RECORDS:
        journal.append(record)
    assert read(journal.path) == RECORDS
    assert [json.loads(line) for line in journal.path.read_text().splitlines()] == RECORDS


def test_values_without_json_are_made_plain(journal: Journal) -> None:
    journal.append(
        {"nan": math.nan, "deep": [{"inf": -math.inf}], "tensor": torch.tensor(1.5), "path": Path("a/b"), 3: True}
    )
    assert read(journal.path) == [
        {"nan": None, "deep": [{"inf": None}], "tensor": 1.5, "path": "a/b", "3": True},
    ]


def test_a_line_torn_anywhere_is_left_out_and_mended(journal: Journal) -> None:
    journal.append(*RECORDS)
    whole = journal.path.read_bytes()
    begin = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(begin, len(whole)):
        journal.path.write_bytes(whole[:end])
        assert read(journal.path) == RECORDS[:2], end
        journal.append(RECORDS[2])
        assert journal.path.read_bytes() == whole
    # A file that is nothing but a torn line.
    journal.path.write_bytes(whole[:3])
    assert read(journal.path) == []
    journal.append(*RECORDS)
    assert journal.path.read_bytes() == whole


def test_a_process_killed_while_it_writes_leaves_a_readable_file(journal: Journal) -> None:
    program = f"""
import itertools
from pathlib import Path
from journal import Journal
journal = Journal(Path({str(journal.path)!r}))
for step in itertools.count(1):
    journal.append({{"step": step, "long": "x" * 200_000}})
    if step == 3:
        print("begun", flush=True)
"""
    # Not from the package, which imports torch.
    folder = launch.ROOT / "blockfp8_titan"
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    steps = [record["step"] for record in read(journal.path)]
    assert len(steps) >= 3 and steps == list(range(1, len(steps) + 1))
    journal.supersede_from(3)
    journal.append({"step": 3})
    assert [record["step"] for record in read(journal.path)] == [1, 2, 3]


def test_later_steps_are_superseded_and_kept_elsewhere(journal: Journal) -> None:
    journal.supersede_from(1)
    assert not journal.path.exists()
    journal.append(*RECORDS)
    before = journal.path.read_bytes()
    journal.supersede_from(4)
    assert journal.path.read_bytes() == before and list(journal.path.parent.iterdir()) == [journal.path]
    with journal.path.open("a") as file:
        file.write('{"step": 4, "lo')
    journal.supersede_from(2)
    assert read(journal.path) == RECORDS[:1]
    superseded = journal.path.with_name("metrics.superseded.jsonl")
    assert read(superseded) == RECORDS[1:]
    journal.append({"step": 2, "loss": 7.0})
    journal.supersede_from(1)
    assert read(journal.path) == [] and read(superseded) == [*RECORDS[1:], RECORDS[0], {"step": 2, "loss": 7.0}]


def test_what_cannot_be_written_is_an_error_that_a_later_append_survives(journal: Journal) -> None:
    journal.path.mkdir(parents=True)
    with pytest.raises(OSError, match="metrics.jsonl"):
        journal.append(RECORDS[0])
    journal.path.rmdir()
    journal.append(RECORDS[1])
    assert read(journal.path) == RECORDS[1:2]


def test_a_step_that_is_no_number_supersedes_nothing(journal: Journal) -> None:
    journal.append({"step": None}, {"step": 5})
    journal.supersede_from(1)
    assert read(journal.path) == [{"step": None}]
