"""The sdist and the wheel: built without a network, complete, and usable away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import launch
import pytest

pytest.importorskip("hatchling", reason="builds with hatchling, which the extra [test] brings")

USE = """
from importlib.metadata import version
import blockfp8_titan
from blockfp8_titan.rules import load_rules_file
print(blockfp8_titan.__file__)
print(blockfp8_titan.__version__ == version("blockfp8-titan"))
print(len(load_rules_file("skip_kv")) > 0)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(build, cwd=launch.ROOT, check=True)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is thereby shown to be complete."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(sdist)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def tracked(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(launch.ROOT).as_posix() for path in (launch.ROOT / folder).rglob(pattern)}


def test_sdist_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = tracked("blockfp8_titan", "*.py") | tracked("configs", "*.toml") | tracked("tests", "*.py")
    assert expected | {"pyproject.toml", "README.md", "scripts/demo.sh", "blockfp8_titan/py.typed"} <= names


def test_wheel_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"blockfp8_titan/{name}" for name in tracked("configs", "*.toml")}
    assert tracked("blockfp8_titan", "*.py") | configs | {"blockfp8_titan/py.typed"} <= names
    assert all(name.startswith(("blockfp8_titan/", "blockfp8_titan-")) for name in names)
    assert any(name.endswith(".dist-info/licenses/blockfp8_titan/LICENSE") for name in names)


def test_an_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    used = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    file, version_matches, preset_loads = used.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    assert version_matches == "True"
    assert preset_loads == "True"
