"""`lfm encode`: raw shards -> latent shards of the same names.

Each raw shard becomes one latent shard, so processes work independently: each encodes its part of the shards and then
those that no other process has begun (see `shard_claims`). When all shards are done, the manifest is written. Under a
launcher every rank runs this stage; the shards of a rank that dies are encoded by the others, or by the same command.
Reading and decoding run ahead of the network in one thread, and the network runs ahead of writing in another.
"""

from __future__ import annotations

import logging
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lfm import storage
from lfm.autoencoder import Autoencoder
from lfm.data import manifest as manifests
from lfm.data.columns.column_index import copy_index
from lfm.data.dropped import take_over_drops
from lfm.data.latent_shards import latent_layout, latent_members
from lfm.data.manifest import Manifest, ShardRecord
from lfm.data.raw_shards import read_raw
from lfm.data.tar import BLOCK
from lfm.data.versions import begin_growth, check_present, with_version_before
from lfm.errors import ConfigError, DataError
from lfm.prefetch import prefetch
from lfm.training.memory_forecast import TensorMemory
from lfm.types import LatentSample, RawSample
from lfm.world import World
from pipelines.common import factory
from pipelines.common.forecasts import free_bytes, gigabytes, kept_by_malloc, listed, median_seconds
from pipelines.common.progress import Progress
from pipelines.data import shard_claims
from pipelines.data.data_options import EncodeConfig
from pipelines.data.encode_images import ImageEncoder, checked
from pipelines.data.growth.latent_growth import LatentGrowth, find_growth
from pipelines.data.shard_claims import ShardClaims
from pipelines.data.shard_set import complete_records, write_shard

BATCHES_AHEAD = 3  # that wait before and behind the network
POLL_SECONDS = 1.0  # between attempts to claim a shard of another process
ATTEMPTS_BEFORE_NOTE = 10
PROCESS_BYTES = 455_000_000  # of libraries on a CPU, measured: the peak of encoding single images of 64 pixels
BATCH_SECONDS = 3.0  # of the images whose rate is taken for that of all


@dataclass(frozen=True)
class EncodeResult:
    """The plan in words and the complete data set; no manifest after a dry run."""

    plan: str
    manifest: Manifest | None


@dataclass(frozen=True)
class RawBatch:
    """Consecutive samples of one raw shard; only the last batch of a shard is smaller than the others, or empty."""

    shard: ShardRecord
    samples: list[RawSample]
    is_last: bool


@dataclass(frozen=True)
class EncodedBatch:
    """The latent samples of a `RawBatch`."""

    shard: ShardRecord
    samples: list[LatentSample]
    is_last: bool


def run(config: EncodeConfig, world: World) -> EncodeResult:
    """Encode the shards that are not done, together with the other ranks.

    Raises:
        ConfigError, DataError, StorageError: no shard is visible that is not whole; the same command resumes.
    """
    if config.rate and not config.dry_run:
        raise ConfigError("`rate`: is for `dry_run`; leave it out, or set that")
    storage.require_apart(config.raw, config.dest)
    raw = manifests.load(config.raw, "raw")
    autoencoder = factory.autoencoder(config.autoencoder, world, config.precision)
    if raw.image_size % autoencoder.downsample_factor:
        raise ConfigError(
            f"{config.raw}: its images have {raw.image_size} pixels, which {autoencoder.name} cannot divide by "
            f"{autoencoder.downsample_factor}; make the shards again with another `lfm shard --image-size`"
        )
    encoder = ImageEncoder(autoencoder, config.flips)
    recipe = _recipe(config, raw, autoencoder)
    growth = None if config.overwrite else find_growth(config.dest, raw, recipe)
    summary = _summary(config, raw, autoencoder, growth)
    if config.dry_run:
        num_ranks = config.num_gpus or max(world.size, torch.cuda.device_count())
        return EncodeResult("\n".join([summary, *_forecast(config, raw, encoder, num_ranks)]), None)
    if growth:
        check_present(config.dest, growth.base)
        begin_growth(config.dest, recipe, growth.published)
    else:
        _begin(config, recipe, world)
    base_shards = {shard.name for shard in growth.base.shards} if growth else set()
    sizes = {shard.name: shard.samples for shard in raw.shards}
    if world.is_main:
        manifests.discard_damaged(
            config.dest,
            lambda record: (
                record.samples == sizes.get(record.name) and len(record.channel_sums) == autoencoder.latent_channels
            ),
            base_shards,
        )

    def samples_done() -> int:  # by all ranks
        return sum(sizes[name] for name in manifests.done(config.dest))

    claims = ShardClaims(config.dest)
    batches = prefetch(_raw_batches(config, raw, world, claims), BATCHES_AHEAD)
    encoded = prefetch(_encoded_batches(encoder, batches), BATCHES_AHEAD)
    progress = Progress("encode", raw.num_samples, "images", done=samples_done(), quiet=not world.is_main)
    # The claims are closed first: that ends the wait for shards of other processes in the thread that reads.
    with progress, closing(batches), closing(encoded), claims:
        for first in encoded:
            _write(config.dest, autoencoder.latent_channels, first, encoded, progress)
            claims.withdraw(first.shard.name)
            if world.is_main:
                progress.done = samples_done()
    return EncodeResult(summary, _publish_if_complete(config, raw, encoder, recipe, growth))


def _summary(config: EncodeConfig, raw: Manifest, autoencoder: Autoencoder, growth: LatentGrowth | None) -> str:
    size = autoencoder.latent_size(raw.image_size)
    grows = f", which has {len(growth.base.shards)} of the shards and grows" if growth else ""
    return (
        f"{raw.num_samples:,} images in {len(raw.shards)} shards -> latents of "
        f"{(autoencoder.latent_channels, size, size)} in {config.dest}"
        f"{', mirrored too' if config.flips else ''}, by {autoencoder.name} on {autoencoder.device}{grows}"
    )


def _forecast(config: EncodeConfig, raw: Manifest, encoder: ImageEncoder, num_ranks: int) -> list[str]:
    """Return memory, disk space and hours that encoding will take, in lines."""
    device, free = encoder.autoencoder.device, ""
    if storage.is_local(config.dest):
        free = f"; {gigabytes(free_bytes(Path(config.dest)))} are free"
    rate = config.rate or num_ranks * measured_rate(config, raw, encoder)
    origin = "given" if config.rate else f"{num_ranks} times that of one batch on {device}"
    place = "GPU memory" if device.type == "cuda" else "memory"
    return [
        f"  {place} of a process, forecast: {listed(memory(config, raw, encoder))}",
        f"  disk, forecast: {gigabytes(disk_bytes(raw, encoder))}{free}",
        f"  time, forecast: {raw.num_samples / rate / 3600:,.3g} h at {rate:,.3g} images/s ({origin})",
    ]


def memory(config: EncodeConfig, raw: Manifest, encoder: ImageEncoder) -> dict[str, int]:
    """Return the bytes of one process by part: on a GPU in its memory, else of the whole process.

    The activations are those of a batch without memory (torch's FakeTensorMode); nothing is computed.
    """
    model = encoder.autoencoder.model
    weights = [*model.parameters(), *model.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(config.batch_size, 3, raw.image_size, raw.image_size, dtype=torch.uint8)
        with TensorMemory(weights) as counted:
            encoder.autoencoder.encode(images)
    parts = {"autoencoder": sum(tensor.nbytes for tensor in weights), "activations": counted.peak}
    if encoder.autoencoder.device.type == "cuda":
        return parts
    num_batches = 2 * BATCHES_AHEAD + 2  # with those at both ends of the network
    return {"process": PROCESS_BYTES, "images": num_batches * images.nbytes} | parts | kept_by_malloc(counted.peak)


def disk_bytes(raw: Manifest, encoder: ImageEncoder) -> int:
    """Return the size of the latent shards, as tars are written: padded to records after two empty blocks."""
    _, stride = latent_layout(encoder.example(raw))
    sizes = (shard.samples * stride + 2 * BLOCK for shard in raw.shards)
    return sum(-(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE for size in sizes)


def measured_rate(
    config: EncodeConfig, raw: Manifest, encoder: ImageEncoder, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the images per second of one process, from encoding a batch, or fewer images if it takes many seconds."""

    def seconds(num_images: int) -> float:
        images = np.zeros((num_images, raw.image_size, raw.image_size, 3), np.uint8)
        mask = np.zeros(images.shape[1:3], np.uint8) if "mask" in raw.fields else None
        batch = [RawSample(str(number), image, mask=mask) for number, image in enumerate(images)]
        return median_seconds(lambda: encoder.encode(batch), encoder.autoencoder.device, clock)

    num_images = min(config.batch_size, max(1, int(BATCH_SECONDS / seconds(1))))
    return num_images / seconds(num_images)


def _begin(config: EncodeConfig, recipe: dict[str, Any], world: World) -> None:
    """Claim the folder. To overwrite, only rank 0 removes the old shards, and the other ranks wait for it."""
    if not config.overwrite:
        manifests.claim(config.dest, recipe, overwrite=False)
    elif world.is_main:
        manifests.claim(config.dest, recipe, overwrite=True)
        shard_claims.clear_work(config.dest)
        shard_claims.announce_restart(config.dest, world)
    else:
        shard_claims.wait_for_restart(config.dest, world)


def _shards_to_encode(config: EncodeConfig, raw: Manifest, world: World, claims: ShardClaims) -> Iterator[ShardRecord]:
    """Yield shards that are not done, each claimed for this process, until all shards of the data set are done.

    This rank's part comes first. The others' shards follow in an order of its own, so that two ranks seldom try the same
    one. A shard with a live claim of another process is tried again until it is done or the claim has expired.
    """
    own = world.slice_of(len(raw.shards))
    others = [*raw.shards[: own.start], *raw.shards[own.stop :]]
    np.random.default_rng(world.rank).shuffle(others)
    claimed_by_others = yield from _claimable(config.dest, list(raw.shards[own]), claims)
    remaining = claimed_by_others + others
    for attempt in count():
        remaining = yield from _claimable(config.dest, remaining, claims)
        if attempt == ATTEMPTS_BEFORE_NOTE:
            logging.getLogger(__name__).warning(
                "%d shards are claimed by other processes; waiting until they are done or the claims expire",
                len(remaining),
            )
        if not remaining or claims.wait(POLL_SECONDS):
            return


def _claimable(
    dest: str, shards: list[ShardRecord], claims: ShardClaims
) -> Generator[ShardRecord, None, list[ShardRecord]]:
    """Yield the shards that are not done and could be claimed; return those that other processes have claimed."""
    done = manifests.done(dest)
    claimed_by_others = []
    for shard in shards:
        if shard.name in done:
            continue
        if not claims.claim(shard.name):
            claimed_by_others.append(shard)
        elif manifests.is_done(dest, shard.name):  # by a process that has withdrawn its claim since the listing
            claims.withdraw(shard.name)
        else:
            yield shard
    return claimed_by_others


def _raw_batches(config: EncodeConfig, raw: Manifest, world: World, claims: ShardClaims) -> Generator[RawBatch]:
    """Read and decode the shards to encode in batches."""
    cache = factory.cache(config.cache)
    for shard in _shards_to_encode(config, raw, world, claims):
        path = storage.join(config.raw, shard.name)
        with cache.open(path, shard.bytes, shard.crc32) as stream:
            samples = checked(read_raw(stream, path, threads=config.threads), raw, path)
            num_samples, is_last = 0, False
            while not is_last:
                batch = list(islice(samples, config.batch_size))
                num_samples, is_last = num_samples + len(batch), len(batch) < config.batch_size
                if is_last and num_samples != shard.samples:
                    raise DataError(
                        f"{path}: holds {num_samples} samples, its record says {shard.samples}; shard it again"
                    )
                yield RawBatch(shard, batch, is_last)


def _encoded_batches(encoder: ImageEncoder, batches: Iterator[RawBatch]) -> Generator[EncodedBatch]:
    for batch in batches:
        yield EncodedBatch(batch.shard, encoder.encode(batch.samples), batch.is_last)


class ChannelSums:
    """The number of latents, and the sums over their posterior means by channel, from which the manifest's statistics come."""

    def __init__(self, channels: int) -> None:
        self.samples, self.values_per_channel = 0, 0
        self.totals, self.squares = np.zeros(channels), np.zeros(channels)

    def add(self, sample: LatentSample) -> None:
        """Add one latent."""
        mean = sample.posterior[: len(self.totals)].astype(np.float64)
        self.totals += mean.sum((1, 2))
        self.squares += (mean**2).sum((1, 2))
        self.samples, self.values_per_channel = self.samples + 1, self.values_per_channel + mean[0].size


def _write(dest: str, channels: int, first: EncodedBatch, batches: Iterator[EncodedBatch], progress: Progress) -> None:
    """Write one latent shard from `first` and the batches that follow it in `batches`."""
    shard, sums = first.shard, ChannelSums(channels)

    def members() -> Iterator[dict[str, Any]]:
        batch = first
        while True:
            for sample in batch.samples:
                sums.add(sample)
                yield latent_members(sample)
            progress.advance(len(batch.samples))
            if batch.is_last:
                return
            batch = next(batches)

    def description() -> dict[str, Any]:
        return {
            "samples": sums.samples,
            "class_counts": shard.class_counts,
            "channel_sums": tuple(zip(sums.totals.tolist(), sums.squares.tolist(), strict=True)),
            "values_per_channel": sums.values_per_channel,
        }

    write_shard(dest, shard.name, members(), description)


def _publish_if_complete(
    config: EncodeConfig, raw: Manifest, encoder: ImageEncoder, recipe: dict[str, Any], growth: LatentGrowth | None
) -> Manifest | None:
    records = complete_records(config.dest, [shard.name for shard in raw.shards])
    if records is None:
        return None
    num_values = sum(record.values_per_channel for record in records)
    sums = np.sum([record.channel_sums for record in records], axis=0) / num_values
    mean, mean_square = sums[:, 0], sums[:, 1]
    members, stride = latent_layout(encoder.example(raw))
    if raw.columns is not None:  # the shards hold the samples of the raw shards, in their order
        copy_index(config.raw, config.dest, raw.columns, factory.cache(config.cache))
    manifest = Manifest(
        kind="latents",
        image_size=raw.image_size,
        classes=raw.classes,
        fields=raw.fields,
        labels=raw.labels,
        recipe=recipe,
        parent_digest=raw.digest,
        autoencoder=factory.autoencoder_record(encoder.autoencoder),
        members=members,
        stride=stride,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(np.sqrt(mean_square - mean**2).tolist()),
        shards=records,
        columns=raw.columns,
    )
    if growth:
        manifest = with_version_before(manifest, growth.base)
    take_over_drops(config.raw, config.dest)
    manifests.publish(config.dest, manifest)
    shard_claims.clear_claims(config.dest)
    return manifest


def _recipe(config: EncodeConfig, raw: Manifest, autoencoder: Autoencoder) -> dict[str, Any]:
    """Everything that decides the shards' bytes, except that devices and batch sizes differ in the last bits."""
    return {
        "kind": "latents",
        "raw": raw.digest,
        "crop": raw.recipe.get("crop"),  # recorded with every image that is made from these latents
        "autoencoder": autoencoder.content_hash,
        "flips": config.flips,
        "precision": autoencoder.precision,
    }
