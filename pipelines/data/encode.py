"""`lfm encode`: raw shards -> latent shards of the same names.

A shard in is a shard out, so every process works by itself: it takes its part of the shards, then what others have left,
and whoever finds all records there writes the manifest. Under a launcher every rank runs this; a rank that dies is
replaced by the others, or by the same command. Reading and decoding run ahead of the network, and the network ahead of
the writing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch

from lfm import storage
from lfm.autoencoder import Autoencoder, check_storable
from lfm.data import manifest as manifests
from lfm.data.latent_shards import latent_layout, latent_members, read_raw, write_tar
from lfm.data.manifest import Manifest, ShardRecord
from lfm.data.masks import at_latent_size, hide
from lfm.errors import DataError
from lfm.prefetch import prefetch
from lfm.types import LatentSample, RawSample
from lfm.world import World
from pipelines.common import factory
from pipelines.common.progress import Progress
from pipelines.data.data_options import EncodeConfig

AHEAD = 3  # batches that wait before and behind the network


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
    storage.require_apart(config.raw, config.dest)
    raw = manifests.load(config.raw, "raw")
    autoencoder = factory.autoencoder(config.autoencoder, world, config.precision)
    latent_shape = (autoencoder.latent_channels, *[autoencoder.latent_size(raw.image_size)] * 2)
    summary = (
        f"{raw.num_samples:,} images in {len(raw.shards)} shards -> latents of {latent_shape} in {config.dest}"
        f"{', mirrored too' if config.flips else ''}, by {autoencoder.name} on {autoencoder.device}"
    )
    if config.dry_run:
        return EncodeResult(summary, None)
    recipe = _recipe(config, raw, autoencoder)
    if world.is_main or not config.overwrite:  # all claim the same; but only one may remove
        manifests.claim(config.dest, recipe, overwrite=config.overwrite)
    else:
        factory.wait_for(storage.join(config.dest, manifests.RECIPE), recipe)
    sizes = {shard.name: shard.samples for shard in raw.shards}
    before = sum(sizes[name] for name in manifests.done(config.dest))
    with Progress("encode", raw.num_samples, "images", done=before, quiet=not world.is_main) as bar:
        batches = prefetch(_batches(config, raw, world), AHEAD)
        encoded = prefetch(_encoded(autoencoder, batches, config.flips), AHEAD)
        with closing(batches), closing(encoded):
            for _, latents in groupby(encoded, key=lambda batch: batch[0].name):
                _write(config, autoencoder, latents, bar)
                bar.done = sum(sizes[name] for name in manifests.done(config.dest))  # by all ranks
    return EncodeResult(summary, _publish_if_complete(config, raw, autoencoder, recipe))


def _todo(dest: str, raw: Manifest, world: World) -> Iterator[ShardRecord]:
    """The shards that are not done when their turn comes: this rank's part, then, in an order of its own, what the others
    have not done. Of those some are in work, and are done twice, to equal bytes; but a dead rank's are done too."""
    first = {shard.name for shard in raw.shards[world.rank :: world.size]}
    order = np.random.default_rng(world.rank).permutation(len(raw.shards))
    for mine in (True, False):
        done = manifests.done(dest)
        for shard in [raw.shards[index] for index in (range(len(order)) if mine else order)]:
            if (shard.name in first) == mine and shard.name not in done and not manifests.is_done(dest, shard.name):
                yield shard


def _batches(config: EncodeConfig, raw: Manifest, world: World) -> Generator[tuple[ShardRecord, list[RawSample]]]:
    """The images of every shard that is to do, in batches, the last one of a shard smaller or empty."""
    cache = factory.cache(config.cache)
    for shard in _todo(config.dest, raw, world):
        path = storage.join(config.raw, shard.name)
        local = cache.fetch(path, shard.bytes, shard.crc32, verify_local=True)
        with local.open("rb") as stream:
            samples = _checked(read_raw(stream, path, threads=config.threads), raw, path)
            count, full = 0, True
            while full:  # at the end of a shard comes a part of a batch, or none of it
                batch = list(islice(samples, config.batch_size))
                count, full = count + len(batch), len(batch) == config.batch_size
                yield shard, batch
        if count != shard.samples:
            raise DataError(f"{path}: holds {count} samples, its record says {shard.samples}; shard it again")


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


def _write(
    config: EncodeConfig,
    autoencoder: Autoencoder,
    batches: Iterator[tuple[ShardRecord, list[LatentSample]]],
    bar: Progress,
) -> None:
    """Write one latent shard from its batches, and then its record."""
    sums = _Sums(autoencoder.latent_channels)
    shard, first = next(batches)

    def samples() -> Iterator[LatentSample]:
        for _, batch in chain([(shard, first)], batches):
            yield from batch
            bar.advance(min(len(batch), bar.total - bar.done))  # another rank may be at this shard too

    with storage.writing(storage.join(config.dest, shard.name)) as temporary:
        write_tar(temporary, map(latent_members, sums.watch(samples())))
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
        for name in (*raw.fields, *["class_index"] * bool(raw.classes)):
            if getattr(sample, name) is None:
                raise DataError(f"{path}: sample {sample.key} has no {name}; shard again")
        ids = sample.segmentation
        if ids is not None and ids.max() >= raw.num_labels:
            raise DataError(f"{path}: sample {sample.key} has the class id {ids.max()}, above all labels; shard again")
        yield sample if ids is None else replace(sample, segmentation=ids.astype(_ids_dtype(raw)))


def _ids_dtype(raw: Manifest) -> type[np.unsignedinteger]:
    return np.uint8 if raw.num_labels <= 256 else np.uint16


def _template(raw: Manifest, autoencoder: Autoencoder, flips: bool) -> LatentSample:
    """A sample of the shape that all have."""
    channels, size = autoencoder.latent_channels, autoencoder.latent_size(raw.image_size)
    moments, mean = (np.zeros((count, size, size), np.float16) for count in (2 * channels, channels))
    masks, maps = "mask" in raw.fields, "segmentation" in raw.fields
    return LatentSample(
        key="0",
        posterior=moments,
        posterior_flip=moments if flips else None,
        class_index=0 if raw.classes else None,
        mask=np.zeros((size, size), np.uint8) if masks else None,
        masked=mean if masks else None,
        masked_flip=mean if masks and flips else None,
        segmentation=np.zeros((raw.image_size, raw.image_size), _ids_dtype(raw)) if maps else None,
    )


def _encoded(
    autoencoder: Autoencoder, batches: Iterable[tuple[ShardRecord, list[RawSample]]], flips: bool
) -> Generator[tuple[ShardRecord, list[LatentSample]]]:
    for shard, batch in batches:
        yield shard, _encode_batch(autoencoder, batch, flips) if batch else []


def _encode_batch(autoencoder: Autoencoder, batch: list[RawSample], flips: bool) -> list[LatentSample]:
    images = np.stack([sample.image for sample in batch])
    keys = [sample.key for sample in batch]
    columns: dict[str, Any] = {"key": keys, "class_index": [sample.class_index for sample in batch]}
    columns |= _posteriors(autoencoder, images, keys, "posterior", flips)
    if batch[0].segmentation is not None:
        columns["segmentation"] = [sample.segmentation for sample in batch]
    if batch[0].mask is not None:
        masks = np.stack([np.asarray(sample.mask) for sample in batch])
        columns["mask"] = at_latent_size(masks, autoencoder.downsample_factor)
        masked = _posteriors(autoencoder, hide(images, masks), keys, "masked", flips)
        columns |= {name: stored[:, : autoencoder.latent_channels] for name, stored in masked.items()}
    rows = zip(*columns.values(), strict=True)
    return [LatentSample(**dict(zip(columns, row, strict=True))) for row in rows]


def _posteriors(
    autoencoder: Autoencoder, images: np.ndarray, keys: list[str], name: str, flips: bool
) -> dict[str, np.ndarray]:
    """What is stored of images uint8 (B, H, W, 3) and of their mirrors, by field: the mirrored latent would not be the
    latent of the mirrored image."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    stored = {name: _stored(autoencoder, pixels, keys)}
    return stored | ({f"{name}_flip": _stored(autoencoder, pixels.flip(3), keys)} if flips else {})


def _stored(autoencoder: Autoencoder, images: torch.Tensor, keys: list[str]) -> np.ndarray:
    """Posteriors as the shards hold them: float16 (B, 2C, h, w), mean and then std."""
    posterior = autoencoder.encode(images)
    check_storable(posterior, keys)
    return torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float16).cpu().numpy()


def _publish_if_complete(
    config: EncodeConfig, raw: Manifest, autoencoder: Autoencoder, recipe: dict
) -> Manifest | None:
    if not {shard.name for shard in raw.shards} <= manifests.done(config.dest):
        return None
    records = manifests.records(config.dest, [shard.name for shard in raw.shards])
    sums = np.sum([record.channel_sums for record in records], axis=0) / sum(r.values_per_channel for r in records)
    members, stride = latent_layout(_template(raw, autoencoder, config.flips))
    manifest = Manifest(
        kind="latents",
        image_size=raw.image_size,
        classes=raw.classes,
        fields=raw.fields,
        labels=raw.labels,
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
    """Everything that decides the shards' bytes, but for the last bits, in which devices and batch sizes differ."""
    return {
        "kind": "latents",
        "raw": raw.digest,
        "crop": raw.recipe.get("crop"),  # told with every image made of these latents
        "autoencoder": autoencoder.content_hash,
        "flips": config.flips,
        "precision": config.precision,
    }
