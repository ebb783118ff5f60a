"""Collections of real images outside the repository, which tests marked `real_data` read."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY

FOLDER = Path(os.environ.get("LFM_SHARED", REPOSITORY.parent / "shared")) / "data"


def unpack(name: str, destination: Path) -> Path:
    """Unpack the archive `name`.tar into `destination` and return the destination; skip the test if it is absent."""
    archive = FOLDER / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(f"no {name}.tar in {FOLDER}; LFM_SHARED names the folder above it")
    with tarfile.open(archive) as tar:
        tar.extractall(destination, filter="data")
    return destination
