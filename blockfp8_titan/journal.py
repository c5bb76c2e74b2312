"""Files of JSON objects, one a line, that a process killed at any moment leaves readable.

An object is appended with its newline in one write. What follows the last newline is the remainder of a write that was cut short:
readers leave it out and the next append removes it. Nothing is synced to disk: a killed process loses nothing, a crashed host may.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends to one file, which one process at a time may do; the file and its folder are made by the first append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records at the end.

        NaN and infinities, which JSON does not have, become null.

        Raises:
            OSError: the file cannot be written; a later append mends what was left of this one.
        """
        self._append_lines(json.dumps(plain(record), allow_nan=False, ensure_ascii=False) for record in records)

    def supersede_from(self, step: int) -> None:
        """Move records whose "step" is this one or later to NAME.superseded.jsonl, as they are.

        What is kept replaces the file at once: killed in between, the process leaves the old file or the new one. In the first case
        the records may be in the other file already, and come there twice.
        """
        if not self.path.exists():
            return
        kept, superseded = [], []
        for line in _lines(self.path):
            record = _parse(line)
            if record is not None:
                is_later = isinstance(found := record.get("step"), int) and found >= step
                (superseded if is_later else kept).append(line)
        if not superseded:
            return
        Journal(self.path.with_suffix(".superseded.jsonl"))._append_lines(superseded)
        written = self.path.with_suffix(".part")
        written.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        written.replace(self.path)

    def _append_lines(self, lines: Iterable[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Opened each time: a failed write leaves no state behind, and logged steps are far between.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(file)
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file that a process may be writing or was killed writing; none where there is no file.

    A torn line is left out, and so is a line that is no JSON object.
    """
    if not path.exists():
        return []
    return [record for line in _lines(path) if (record := _parse(line)) is not None]


def _lines(path: Path) -> list[str]:
    """The lines that end; a torn one may end in half a character."""
    return path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _cut_torn_line(file: int) -> None:
    """Shorten an open file to its last newline."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
    os.ftruncate(file, end)


def plain(value: Any) -> Any:
    """The value in types that JSON has; a scalar tensor as its number, anything else unknown as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
