"""The version of the code that is recorded with what it made."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import lfm
from pipelines.common.provenance import code_version
from tests.support.commands import REPOSITORY


def test_a_checkout_names_its_commit() -> None:
    assert re.fullmatch(re.escape(lfm.__version__) + r"( \(\S+\))?", code_version())


def test_an_installation_inside_another_repository_does_not_name_its_commit(tmp_path: Path) -> None:
    """As in a virtual environment within a project of the user's own."""
    installed = tmp_path / "project" / ".venv" / "site-packages"
    for package in ("lfm", "pipelines"):
        shutil.copytree(REPOSITORY / package, installed / package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path / "project"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True)
    script = "import lfm; from pipelines.common.provenance import code_version; print(lfm.__file__, code_version())"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)},
    )
    file, version = result.stdout.strip().split(" ", 1)
    assert Path(file) == installed / "lfm" / "__init__.py"
    assert version == lfm.__version__
