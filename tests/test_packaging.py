"""The content of a wheel: both packages, the autoencoder's weights, experiments and launch file, and nothing of tests/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY


@pytest.mark.slow
def test_a_wheel_holds_packages_autoencoder_experiments_and_launch_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("lfm", "pipelines", "configs", "launch"):
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
    experiments = {
        f"pipelines/{path.relative_to(REPOSITORY)}"
        for folder, suffixes in (("configs", (".yaml", ".json")), ("launch", (".py",)))
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert any(name.endswith(".safetensors") for name in assets)
    assert "pipelines/launch/train.py" in experiments and "pipelines/configs/parts/modern.yaml" in experiments
    assert names == ours | assets | experiments
    assert "lfm = pipelines.cli.main:main" in entry_points
