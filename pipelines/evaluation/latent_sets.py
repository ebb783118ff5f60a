"""Latents in shards for `lfm evaluate RUN --nearest LATENTS`: those that runs were trained on, and those held back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.latent_shards import LatentShard
from lfm.data.manifest import AutoencoderRecord, Manifest
from lfm.data.stream.data_history import with_views
from lfm.data.stream.mixture import LatentSource, single_source
from lfm.data.versions import SourceState, digests
from lfm.errors import ConfigError, DataError
from lfm.weights_file import WeightsHeader
from pipelines.common import factory, read_samples

IMAGE, MIRROR = "latent.npy", "latent_flip.npy"  # members that hold the posterior of an image and of its mirror image


@dataclass(frozen=True)
class LatentSet:
    """Some shards of latents; a shard is a block, and a row counts the samples of all of them."""

    folder: str
    manifest: Manifest  # of these shards
    cache: str | None = None  # folder for copies of remote shards

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of samples in each block."""
        return tuple(shard.samples for shard in self.manifest.shards)

    @property
    def views(self) -> tuple[str, ...]:
        """The members that hold a posterior of each sample: of the image and, if it is stored, of its mirror image."""
        suffixes = {member.suffix for member in self.manifest.members}
        return (IMAGE, MIRROR) if MIRROR in suffixes else (IMAGE,)

    def read(self, block: int, view: str = IMAGE) -> Tensor:
        """Return the scaled means of the posteriors of a block, float32 (M, C, h, w).

        Raises:
            DataError, StorageError: If the shard is damaged or cannot be read.
        """
        shard = self.manifest.shards[block]
        path = storage.join(self.folder, shard.name)
        with factory.cache(self.cache).open(path, shard.bytes, shard.crc32) as file:
            columns = LatentShard(file, shard.samples, self.manifest.members, self.manifest.stride, path).columns
        return self._scaled(columns[view][:])

    def pick(self, rows: Sequence[int]) -> Tensor:
        """Return the scaled means of the posteriors of some rows, float32 (B, C, h, w)."""
        columns = read_samples.read_columns(self.folder, self.manifest, list(rows), self.cache)
        return self._scaled(np.stack(columns["posterior"]))

    def key(self, row: int) -> str:
        """Return the shard of a row, and the row's number within it."""
        for shard in self.manifest.shards:
            if row < shard.samples:
                return f"{shard.name}, row {row}"
            row -= shard.samples
        raise IndexError(row)

    def _scaled(self, posteriors: np.ndarray) -> Tensor:
        """Return the scaled means of posteriors float16 (M, 2C, h, w)."""
        record = self.manifest.autoencoder
        assert record is not None, "checked when the set was opened"
        means = posteriors[:, : posteriors.shape[1] // 2].astype(np.float32)
        return (torch.from_numpy(means) - record.shift) * record.scale_factor


def open_latents(
    nearest: str, held_back: str | None, runs: Mapping[str, WeightsHeader], cache: str | None
) -> tuple[LatentSet, LatentSet]:
    """Return the latents that runs were trained on, and held-back ones.

    Args:
        nearest: folder or URL of the latents that the runs were trained on; the shards that they held back are left out.
        held_back: folder or URL of others; by default the shards that the runs held back.
        runs: the description of each run by its name.
        cache: folder for copies of remote shards.

    Raises:
        ConfigError: If there are no held-back latents, or the runs held back different ones.
        DataError: If there are no latents, or they do not fit the runs.
    """
    manifest = _load(nearest, runs)
    parts = {name: _parts(nearest, manifest, header) for name, header in runs.items()}
    name, (training, rest) = next(iter(parts.items()))
    for other, part in parts.items():
        if part != (training, rest):
            raise ConfigError(
                f"`nearest` {nearest}: {name} and {other} were trained on different shards of it; evaluate them one at a time"
            )
    if held_back is not None:
        others = _load(held_back, runs)
        if others.digest == manifest.digest:
            raise ConfigError(f"`held_back` {held_back}: holds the latents of `nearest`; name others, or leave it out")
        rest = LatentSource(held_back, others)
    sets = [LatentSet(part.folder, _without_empty_shards(part), cache) for part in (training, rest)]
    if not sets[1].manifest.num_samples:
        raise ConfigError(
            f"`nearest` {nearest}: {name} held none of it back (data.held_back), and the threshold needs images that it "
            "was not trained on; name latents of such images with `held_back`"
        )
    if sets[0].manifest.num_samples < 2:
        raise ConfigError(f"`nearest` {nearest}: holds fewer than two training samples; name others")
    return sets[0], sets[1]


def _load(folder: str, runs: Mapping[str, WeightsHeader]) -> Manifest:
    """Return the manifest of latents; raise DataError if they have not the autoencoder and the size of all runs."""
    manifest = manifests.load(folder, "latents")
    for name, header in runs.items():
        if _identity(manifest.autoencoder) != _identity(header.autoencoder):
            raise DataError(f"{folder}: its latents come from another autoencoder than those of {name}")
        if manifest.image_size != header.image_size:
            raise DataError(
                f"{folder}: its images have {manifest.image_size} pixels, those of {name} {header.image_size}"
            )
    return manifest


def _identity(record: AutoencoderRecord | None) -> tuple[Any, ...] | None:
    return None if record is None else (record.content_hash, record.scale_factor, record.shift)


def _parts(folder: str, manifest: Manifest, header: WeightsHeader) -> tuple[LatentSource, LatentSource]:
    """Return the part of latents that a run was trained on, and the part that it held back."""
    data = header.config.get("data") or {}
    own = next((source for source in data.get("sources", ()) if _are_same(source["shards"], folder)), None)
    is_only_source = header.manifest_digest in digests(manifest)  # wherever it is now
    if is_only_source:
        own = data
    if own is None:
        return LatentSource(folder, manifest), LatentSource(folder, manifest.model_copy(update={"shards": ()}))
    whole = single_source(folder, manifest, tuple(own.get("skip_shards", ())))
    if is_only_source:  # held-back shards are those of the version that the run began with
        versions = [segment.sources[0].digest for segment in header.data_history] or [header.manifest_digest]
        states = [SourceState(digest=digest, num_samples=0) for digest in versions]
        whole = replace(whole, sources=(with_views(whole.sources[0], states),))
    training, rest = whole.split(data.get("held_back", 0))
    return training.sources[0], rest.sources[0]


def _are_same(one: str, other: str) -> bool:
    """Return whether two paths or URLs name the same folder."""
    if storage.is_local(one) and storage.is_local(other):
        return Path(one).resolve() == Path(other).resolve()
    return one.rstrip("/") == other.rstrip("/")


def _without_empty_shards(source: LatentSource) -> Manifest:
    """Return the manifest of the shards that hold samples and are not left out."""
    sizes = zip(source.manifest.shards, source.shard_sizes(), strict=True)
    return source.manifest.model_copy(update={"shards": tuple(shard for shard, size in sizes if size)})
