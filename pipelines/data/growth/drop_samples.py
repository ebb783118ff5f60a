"""`lfm data drop`: withdraw samples from a data set by a list beside its manifest, without making a shard again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.columns.column_index import rows_by_shard
from lfm.data.columns.selection import select
from lfm.data.dropped import Drop, DroppedSample, add_drop, load_drops
from lfm.data.manifest import DROPPED, Manifest
from lfm.data.tar import read_tar
from lfm.errors import ConfigError, DataError
from lfm.storage.cache import Cache
from pipelines.common import factory
from pipelines.data.data_options import DropConfig


@dataclass(frozen=True)
class DropResult:
    """What is withdrawn, or was, in one line."""

    plan: str
    num_dropped: int


def run(config: DropConfig) -> DropResult:
    """Add an entry to the list of dropped samples of a data set, unless all of the samples are in it already.

    Raises:
        ConfigError: no sample is named, or a key or the condition is wrong.
        DataError: a sample is not in the data set, or nothing would be left.
    """
    manifest = manifests.load(config.shards)
    cache = factory.cache(config.cache)
    keys = list(dict.fromkeys([*config.keys, *_keys_of_file(config.keys_file)]))
    if not keys and config.where is None:
        raise ConfigError("`keys`: name samples to withdraw by their keys, or set `keys_file` or `where`")
    samples = _by_key(config.shards, manifest, keys, cache)
    if config.where is not None:
        samples += _by_condition(config, manifest, cache)
    before = {sample for drop in load_drops(config.shards) for sample in drop.samples}
    new = tuple(sample for sample in dict.fromkeys(samples) if sample not in before)
    total = len(before) + len(new)
    if total >= manifest.num_samples:
        raise DataError(
            f"{config.shards}: no sample would be left of {manifest.num_samples:,}; remove the folder instead"
        )
    plan = (
        f"{len(new):,} samples withdrawn from {config.shards}, {total:,} of {manifest.num_samples:,} in all; listed in "
        f"{storage.join(config.shards, DROPPED)}"
    )
    if new and not config.dry_run:
        add_drop(config.shards, Drop(reason=config.reason, samples=new))
    return DropResult(plan, len(new))


def _keys_of_file(path: str | None) -> list[str]:
    if path is None:
        return []
    if not storage.exists(path):
        raise ConfigError(f"`keys_file` {path}: no such file; name a text file with one key a line")
    return storage.read_bytes(path).decode("utf-8-sig", "replace").split()


def _by_key(folder: str, manifest: Manifest, keys: Iterable[str], cache: Cache) -> list[DroppedSample]:
    """Find samples by their keys in the shards that the keys name."""
    records = {shard.name: shard for shard in manifest.shards}
    by_shard: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if not re.fullmatch(r"\d{12}", key):
            raise ConfigError(f"`keys` {key}: is no key of a sample, which has 12 digits, such as 000012000345")
        by_shard[f"{key[:6]}.tar"].append(key)
    samples = []
    for name, of_shard in by_shard.items():
        path = storage.join(folder, name)
        if name not in records:
            raise DataError(f"{path}: there is no such shard, and so no sample {of_shard[0]}")
        with cache.open(path, records[name].bytes, records[name].crc32) as stream:
            rows = {members["__key__"]: row for row, members in enumerate(read_tar(stream, path))}
        for key in of_shard:
            if key not in rows:
                raise DataError(f"{path}: has no sample {key}; name keys that are in it")
            samples.append(DroppedSample(key=key, shard=name, row=rows[key]))
    return samples


def _by_condition(config: DropConfig, manifest: Manifest, cache: Cache) -> list[DroppedSample]:
    """Find the samples that `where` holds for, by the index of columns."""
    assert config.where is not None
    selection = select(config.shards, manifest, config.where, cache, "`where`")
    parts = np.split(selection.rows, np.cumsum(selection.counts)[:-1])
    samples = []
    for shard, part, rows in zip(manifest.shards, parts, rows_by_shard(config.shards, manifest, cache), strict=True):
        samples += [DroppedSample(key=rows["key"][row], shard=shard.name, row=row) for row in part.tolist()]
    return samples
