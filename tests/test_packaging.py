"""The content of a wheel: both packages, the autoencoder's weights, and nothing of launch/ or tests/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY


@pytest.mark.slow
def test_a_wheel_holds_both_packages_and_the_embedded_autoencoder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("lfm", "pipelines"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    ours = {
        str(path.relative_to(REPOSITORY))
        for folder in ("lfm", "pipelines")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assets = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "lfm" / "assets").rglob("*") if path.is_file()
    }
    assert any(name.endswith(".safetensors") for name in assets)
    assert names == ours | assets
    assert "lfm = pipelines.cli.main:main" in entry_points
