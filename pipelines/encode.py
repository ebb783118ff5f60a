"""`lfm encode`: raw shards -> latent shards of the same names.

A shard in is a shard out, so every process works by itself: it takes its part of the shards, leaves out those that are
done, and whoever finds all records there writes the manifest. Under torchrun or the deepspeed launcher every rank runs
this; after a crash the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch

from lfm import storage
from lfm.autoencoder import EMBEDDED, Autoencoder, check_storable
from lfm.data import manifest as manifests
from lfm.data.manifest import Manifest, ShardRecord
from lfm.data.shards import latent_layout, latent_members, read_raw, write_tar
from lfm.errors import DataError
from lfm.types import LatentSample, RawSample
from lfm.world import World
from pipelines import factory
from pipelines.progress import Progress


@dataclass(frozen=True)
class EncodeConfig:
    """What `lfm encode` is told."""

    raw: str
    dest: str
    autoencoder: str = EMBEDDED
    flips: bool = False
    batch_size: int = 32
    precision: str = "fp32"
    cache: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class EncodeResult:
    """The data set that is there now; None after a dry run, or while other ranks have shards to finish."""

    plan: str
    manifest: Manifest | None


def run(config: EncodeConfig, world: World) -> EncodeResult:
    """Encode this rank's part of the raw shards that are not done.

    Raises:
        ConfigError, DataError, StorageError: nothing half-written is visible, and the same command continues.
    """
    raw = manifests.load(config.raw, "raw")
    autoencoder = factory.autoencoder(config.autoencoder, world, config.precision)
    latent_shape = (autoencoder.latent_channels, *[autoencoder.latent_size(raw.image_size)] * 2)
    summary = (
        f"{raw.num_samples:,} pictures in {len(raw.shards)} shards -> latents of {latent_shape} in {config.dest}"
        f"{', mirrored too' if config.flips else ''}, by {autoencoder.name} on {autoencoder.device}"
    )
    if config.dry_run:
        return EncodeResult(summary, None)
    recipe = _recipe(config, raw, autoencoder)
    if world.is_main:
        manifests.claim(config.dest, recipe, overwrite=config.overwrite)
    else:
        factory.wait_for(storage.join(config.dest, manifests.RECIPE), recipe)
    done = manifests.done(config.dest)
    mine = raw.shards[world.rank :: world.size]
    todo = [shard for shard in mine if shard.name not in done]
    total, before = sum(shard.samples for shard in mine), sum(shard.samples for shard in mine if shard.name in done)
    cache = factory.cache(config.cache)
    with Progress("encode", total, "pictures", done=before, quiet=not world.is_main) as bar:
        for shard in todo:
            _encode_shard(config, autoencoder, raw, shard, cache, bar)
    return EncodeResult(summary, _publish_if_complete(config, raw, autoencoder, recipe, latent_shape))


class _Sums:
    """Counts latents as they pass, and adds up their means by channel."""

    def __init__(self, channels: int) -> None:
        self.samples, self.values = 0, 0
        self.by_channel = np.zeros((channels, 2))  # of values and of their squares

    def watch(self, samples: Iterable[LatentSample]) -> Iterator[LatentSample]:
        """The samples as they come."""
        for sample in samples:
            mean = sample.posterior[: len(self.by_channel)].astype(np.float64)
            self.by_channel += np.stack([mean.sum((1, 2)), (mean**2).sum((1, 2))], axis=1)
            self.samples, self.values = self.samples + 1, self.values + mean[0].size
            yield sample


def _encode_shard(
    config: EncodeConfig,
    autoencoder: Autoencoder,
    raw: Manifest,
    shard: ShardRecord,
    cache: storage.Cache,
    bar: Progress,
) -> None:
    """Encode one raw shard, write the latent shard and then its record."""
    raw_path = storage.join(config.raw, shard.name)
    local = cache.fetch(raw_path, shard.bytes, shard.crc32, verify_local=True)
    sums = _Sums(autoencoder.latent_channels)
    with storage.writing(storage.join(config.dest, shard.name)) as temporary, local.open("rb") as stream:
        pictures = _checked(read_raw(stream, raw_path), raw, raw_path)
        latents = sums.watch(_encode(config, autoencoder, pictures, bar))
        write_tar(temporary, (latent_members(latent) for latent in latents))
        if sums.samples != shard.samples:
            raise DataError(
                f"{raw_path}: holds {sums.samples} samples, its record says {shard.samples}; shard it again"
            )
        checksums = storage.checksums(temporary)
    record = ShardRecord(
        name=shard.name,
        samples=sums.samples,
        **asdict(checksums),
        class_counts=shard.class_counts,
        channel_sums=tuple((float(total), float(squares)) for total, squares in sums.by_channel),
        values_per_channel=sums.values,
    )
    manifests.commit(config.dest, record)


def _checked(samples: Iterable[RawSample], raw: Manifest, path: str) -> Iterator[RawSample]:
    """The samples as they come, all of the same size and with the same members, as a constant stride needs."""
    for sample in samples:
        if sample.image.shape != (raw.image_size, raw.image_size, 3):
            raise DataError(
                f"{path}: sample {sample.key} is {sample.image.shape}, not of size {raw.image_size}; shard again"
            )
        if raw.classes and sample.class_index is None:
            raise DataError(f"{path}: sample {sample.key} has no class; shard again")
        yield sample


def _encode(
    config: EncodeConfig, autoencoder: Autoencoder, samples: Iterator[RawSample], bar: Progress
) -> Iterator[LatentSample]:
    while batch := list(islice(samples, config.batch_size)):
        yield from _encode_batch(autoencoder, batch, config.flips)
        bar.advance(len(batch))


def _encode_batch(autoencoder: Autoencoder, batch: list[RawSample], flips: bool) -> Iterator[LatentSample]:
    images = torch.from_numpy(np.stack([sample.image for sample in batch])).permute(0, 3, 1, 2).contiguous()
    keys = [sample.key for sample in batch]
    posteriors = [_stored(autoencoder, images, keys)]
    if flips:  # the mirrored latent would not be the latent of the mirrored picture
        posteriors.append(_stored(autoencoder, images.flip(3), keys))
    for sample, *stored in zip(batch, *posteriors, strict=True):
        yield LatentSample(sample.key, stored[0], stored[1] if flips else None, sample.class_index)


def _stored(autoencoder: Autoencoder, images: torch.Tensor, keys: list[str]) -> np.ndarray:
    """Posteriors as the shards hold them: float16 (B, 2C, h, w), mean and then std."""
    posterior = autoencoder.encode(images)
    check_storable(posterior, keys)
    return torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float16).cpu().numpy()


def _publish_if_complete(
    config: EncodeConfig, raw: Manifest, autoencoder: Autoencoder, recipe: dict, latent_shape: tuple[int, ...]
) -> Manifest | None:
    if not {shard.name for shard in raw.shards} <= manifests.done(config.dest):
        return None
    records = manifests.records(config.dest, [shard.name for shard in raw.shards])
    sums = np.sum([record.channel_sums for record in records], axis=0) / sum(r.values_per_channel for r in records)
    members, stride = latent_layout(latent_shape, classes=bool(raw.classes), flips=config.flips)
    manifest = Manifest(
        kind="latents",
        image_size=raw.image_size,
        classes=raw.classes,
        recipe=recipe,
        parent_digest=raw.digest,
        autoencoder=factory.autoencoder_record(autoencoder),
        members=members,
        stride=stride,
        channel_mean=tuple(sums[:, 0].tolist()),
        channel_std=tuple(np.sqrt(sums[:, 1] - sums[:, 0] ** 2).tolist()),
        shards=records,
    )
    manifests.publish(config.dest, manifest)
    return manifest


def _recipe(config: EncodeConfig, raw: Manifest, autoencoder: Autoencoder) -> dict:
    """Everything that decides the shards' bytes."""
    return {
        "kind": "latents",
        "raw": raw.digest,
        "autoencoder": autoencoder.content_hash,
        "flips": config.flips,
        "precision": config.precision,
    }
