"""`lfm inspect`: what is in a folder of shards, whether it is whole, and a sheet of its images.

On the sheet a hole is tinted red, and a map lies over its image in one colour for each class id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.latent_shards import LatentShard, read_raw
from lfm.data.manifest import Manifest, ShardRecord
from lfm.data.stream.sample_order import Order
from lfm.errors import ConfigError, DataError, StorageError
from lfm.storage.cache import Cache
from lfm.types import RawSample
from lfm.world import World
from pipelines.common import factory, image_files
from pipelines.common.progress import Progress
from pipelines.data.data_options import InspectConfig

SHEET = "sheet.png"
HOLE = np.array([255, 0, 0])


@dataclass(frozen=True)
class InspectResult:
    """What was found, for people."""

    report: str


def run(config: InspectConfig, world: World) -> InspectResult:
    """Describe the shards of a folder and write a sheet of their first images.

    Raises:
        DataError: they are incomplete, or with `verify` not what their manifest lists; all damaged shards are named.
    """
    manifest = manifests.load(config.path, "latents" if config.plan else None)
    if config.plan:
        if config.verify or config.raw or config.autoencoder or config.out != SHEET:
            raise ConfigError("--plan: says what training reads, and nothing else; leave --verify, --raw, --out out")
        return InspectResult("\n".join(_plan(config, manifest)))
    if (config.at, config.seed, config.window, config.skip_shard) != (0, 0, 8, ()):
        raise ConfigError("--at, --seed, --window and --skip-shard: tell of the plan of training; add --plan")
    cache = factory.cache(config.cache)
    if manifest.kind == "raw" and (config.raw or config.autoencoder):
        raise ConfigError(f"--raw, --autoencoder: are for latents; {config.path} holds raw shards")
    if config.verify:
        _verify(config, manifest, cache)
    images: Iterator[np.ndarray] = map(overlaid, _raw_samples(config.path, manifest, cache))
    if manifest.kind == "latents":
        images = _decoded_images(config, manifest, cache, world)
    shown = np.stack(list(islice(images, config.num)))
    lines = [*_description(manifest), f"the first {len(shown)} images: {config.out}"]
    if config.raw:
        originals = _originals(config, manifest, cache, len(shown))
        lines.append(_likeness(originals, shown))
        shown = np.stack([originals, shown], axis=1).reshape(-1, *shown.shape[1:])  # each original before its likeness
    image_files.save(image_files.grid(shown, enlarge=max(1, 128 // manifest.image_size)), config.out)
    return InspectResult("\n".join([*lines, *(["every shard is what the manifest lists"] if config.verify else [])]))


def _originals(config: InspectConfig, manifest: Manifest, cache: Cache, count: int) -> np.ndarray:
    """The first images that the latents were encoded from: uint8 (B, H, W, 3)."""
    raw = manifests.load(str(config.raw), "raw")
    if raw.digest != manifest.parent_digest:
        raise DataError(f"--raw {config.raw}: {config.path} was encoded from other shards; name those")
    return np.stack([sample.image for sample in islice(_raw_samples(str(config.raw), raw, cache), count)])


def _likeness(originals: np.ndarray, decoded: np.ndarray) -> str:
    import torch

    from lfm.metrics.paired import psnr, ssim

    first, second = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (originals, decoded))
    found = {"PSNR": psnr(first, second), "SSIM": ssim(first, second)}
    return ", ".join(f"{name} {value.mean():.3f} (least {value.min():.3f})" for name, value in found.items())


def _description(manifest: Manifest) -> Iterator[str]:
    size = sum(shard.bytes for shard in manifest.shards)
    yield (
        f"{manifest.kind} shards: {manifest.num_samples:,} samples of {manifest.image_size} x {manifest.image_size} pixels "
        f"in {len(manifest.shards)} shards, {size / 1e6:,.1f} MB ({size / max(1, manifest.num_samples) / 1e3:.1f} kB each)"
    )
    yield from (f"  class {entry.index:>4} {entry.name}: {entry.count:,}" for entry in manifest.classes)
    for reason, count in Counter(reject.reason for reject in manifest.rejects).most_common():
        first = next(reject for reject in manifest.rejects if reject.reason == reason)
        yield f"  rejected {count:,} {reason}, such as {first.source}"
    if record := manifest.autoencoder:
        yield f"  autoencoder {record.name} ({record.content_hash[:12]}), scale factor {record.scale_factor:g}"
        for channel, (mean, std) in enumerate(zip(manifest.channel_mean, manifest.channel_std, strict=True)):
            yield f"  channel {channel}: mean {mean:+.3f}, deviation {std:.3f}"
    yield from (f"  {key}: {value}" for key, value in manifest.recipe.items() if key != "labels")
    yield f"  digest {manifest.digest}"


def _plan(config: InspectConfig, manifest: Manifest) -> Iterator[str]:
    """The samples that training reads from sample `at` on, in the global order."""
    import torch

    from lfm.data.random_draws import draw
    from lfm.data.stream.latent_stream import shard_sizes

    sizes = shard_sizes(manifest, config.skip_shard, config.path)
    if not sum(sizes):
        raise DataError(f"{config.path}: holds no samples")
    order = Order(sizes, config.seed, config.window)
    numbers = range(config.at, config.at + config.num)
    flips = draw(config.seed, torch.tensor(numbers)).flip.tolist()
    has_flips = any(member.suffix == "latent_flip.npy" for member in manifest.members)
    for number, shard, row, flip in zip(numbers, *order.at(config.at, config.num), flips, strict=True):
        mirrored = ", mirrored" if flip and has_flips else ""
        epoch = number // order.num_samples
        yield f"sample {number:,}: epoch {epoch}, {manifest.shards[shard].name} row {row}{mirrored}"


def _verify(config: InspectConfig, manifest: Manifest, cache: Cache) -> None:
    damaged = []
    with Progress("verify", len(manifest.shards), "shards") as bar:
        for shard in manifest.shards:
            path = storage.join(config.path, shard.name)
            try:
                if storage.checksums(cache.fetch(path, shard.bytes, shard.crc32)).sha256 != shard.sha256:
                    damaged.append(f"{path}: checksum")
            except (DataError, StorageError) as error:
                damaged.append(str(error).split(";")[0])
            bar.advance(1)
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise DataError(f"{'; '.join(damaged[:5])}{more}: remove these and their records, and make them again")


def _raw_samples(folder: str, manifest: Manifest, cache: Cache) -> Iterator[RawSample]:
    for shard in manifest.shards:
        path = storage.join(folder, shard.name)
        with cache.fetch(path, shard.bytes, shard.crc32).open("rb") as stream:
            yield from read_raw(stream, path)


def overlaid(sample: RawSample) -> np.ndarray:
    """A sample's image under its map and its mask: uint8 (H, W, 3)."""
    image = sample.image.astype(np.float64)
    if sample.segmentation is not None:
        image = 0.5 * image + 0.5 * image_files.colours(sample.segmentation)
    if sample.mask is not None:
        image = np.where(sample.mask[..., None] == 1, 0.4 * image + 0.6 * HOLE, image)
    return image.round().astype(np.uint8)


def _decoded_images(config: InspectConfig, manifest: Manifest, cache: Cache, world: World) -> Iterator[np.ndarray]:
    import torch

    record = manifest.autoencoder
    if record is None:
        raise DataError(f"{config.path}: the manifest names no autoencoder; encode again")
    autoencoder = factory.matching_autoencoder(record, config.autoencoder, world, config.path)
    for shard in manifest.shards:
        for means in _means(config, manifest, shard, cache):
            latents = (torch.from_numpy(means.astype(np.float32)) - record.shift) * record.scale_factor
            yield from autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()


def _means(config: InspectConfig, manifest: Manifest, shard: ShardRecord, cache: Cache) -> Iterator[np.ndarray]:
    """The posterior means of a shard in small batches: float16 (B, C, h, w)."""
    path = cache.fetch(storage.join(config.path, shard.name), shard.bytes, shard.crc32)
    posterior = LatentShard(path, shard.samples, manifest.members, manifest.stride).columns["latent.npy"]
    for start in range(0, shard.samples, 16):
        moments = posterior[slice(start, start + 16)]
        yield moments[:, : moments.shape[1] // 2]
