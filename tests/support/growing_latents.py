"""Latents that grow: copies of a data set of which the first shards are an earlier version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from lfm.data import manifest as manifests
from lfm.data.columns.column_index import write_index
from lfm.data.manifest import INDEX, Manifest
from lfm.data.versions import with_version_before


def first_version(source: Path, folder: Path, num_shards: int) -> Manifest:
    """Make a data set of the first shards of `source`, which can grow by the others."""
    shutil.copytree(source, folder)
    manifest = _first_shards(source, folder, num_shards)
    manifests.publish(str(folder), manifest)
    return manifest


def grow(source: Path, folder: Path, num_shards: int) -> Manifest:
    """Let a data set of `first_version` grow to the first shards of `source`."""
    before = manifests.load(str(folder))
    manifest = with_version_before(_first_shards(source, folder, num_shards), before)
    manifests.publish(str(folder), manifest)
    return manifest


def _first_shards(source: Path, folder: Path, num_shards: int) -> Manifest:
    """Write the index of the first shards, and return their manifest."""
    whole = manifests.load(str(source))
    assert whole.columns is not None
    shards = whole.shards[:num_shards]
    rows = pq.read_table(source / INDEX).slice(0, sum(shard.samples for shard in shards)).to_pydict()
    columns = write_index(str(folder), [rows], whole.columns.types)
    return whole.model_copy(update={"shards": shards, "columns": columns})
