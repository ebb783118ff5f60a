"""Latents whose samples have a column of known values."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from lfm.data import manifest as manifests
from lfm.data.columns.column_index import write_index
from lfm.data.manifest import INDEX, Manifest


def with_scores(folder: Path, target: Path, factor: float = 1.0) -> Manifest:
    """Copy latents, and give the samples a column `score` of 0, 1, 2, ... times a factor."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    manifest = manifests.load(str(target))
    assert manifest.columns is not None
    columns = pq.read_table(folder / INDEX).to_pydict()
    columns["score"] = [factor * number for number in range(manifest.num_samples)]
    record = write_index(str(target), [columns], {**manifest.columns.types, "score": "float"})
    manifest = manifest.model_copy(update={"columns": record})
    manifests.publish(str(target), manifest)
    return manifest
