"""Where the results of a script go, and how they are written."""

import argparse
import json
from pathlib import Path
from typing import Any

from launch import ROOT

RESULTS = ROOT / "outputs" / "results"


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option --out; results that the README quotes are put under scripts/results with it."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: outputs/results)")


def write_text(path: Path, text: str) -> None:
    """Make the file and its folder; a file that was there is whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """As `write_text`. Raises ValueError for NaN and Inf, which JSON has not."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
