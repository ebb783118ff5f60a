"""`lfm inspect`: describe a folder of shards, verify them, and save a sheet of their first images.

On the sheet, holes of masks are tinted red, and a segmentation is laid over its image in one colour per class id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.dropped import Drop, load_drops
from lfm.data.evaluation_images import ShardedImages
from lfm.data.latent_shards import LatentShard
from lfm.data.manifest import Manifest, ShardRecord
from lfm.errors import ConfigError, DataError, StorageError, printable
from lfm.storage.cache import Cache
from lfm.types import RawSample
from lfm.weights_file import WEIGHTS
from lfm.world import World
from pipelines.common import factory, image_files
from pipelines.common.progress import Progress
from pipelines.data.data_options import InspectConfig
from pipelines.data.inspect_mixture import describe_columns, describe_mixed_sources, describe_size, is_mixture

HOLE = np.array([255, 0, 0])
SMALLEST_SIDE = 128  # of an image on the sheet: smaller ones are enlarged
SHEET_OF = "sheet_of"  # key of a sheet's note: the folder whose images it shows
DECODED_TOGETHER = 16
DAMAGED_SHOWN = 5


@dataclass(frozen=True)
class InspectResult:
    """The description as lines of text."""

    report: str


def run(config: InspectConfig, world: World) -> InspectResult:
    """Describe the shards of a folder, or of several, or list the samples that training reads from one.

    Raises:
        ConfigError: an option is set that would not be used, or an experiment is wrong.
        DataError: the set is incomplete, or (with `verify`) differs from its manifest; names the damaged shards.
    """
    if is_mixture(config):
        return InspectResult("\n".join(describe_mixed_sources(config)))
    if storage.exists(storage.join(config.path, WEIGHTS)):
        raise ConfigError(f"{config.path}: is a run; `lfm status` describes it, name a folder of shards here")
    manifest = manifests.load(config.path, "latents" if config.plan else None)
    _refuse_unused_options(config, manifest)
    if config.plan:
        return InspectResult("\n".join(_training_order(config, manifest)))
    out = _sheet_file(config)
    cache = factory.cache(config.cache)
    lines = [*_description(manifest, load_drops(config.path)), *describe_columns(config.path, manifest, cache)]
    if config.verify:
        _verify(config, manifest, cache)
        lines.append("every shard equals its record in the manifest")
    if manifest.kind == "raw":
        images = np.stack([overlaid(sample) for sample in _first_samples(config.path, manifest, cache, config.num)])
    else:
        images = np.stack(list(islice(_decoded_images(config, manifest, cache, world), config.num)))
    lines.append(f"the first {len(images)} images: {out}")
    if config.raw is not None:
        originals = _originals(config.raw, config.path, manifest, cache, len(images))
        lines.append(_similarity(originals, images))
        images = np.stack([originals, images], axis=1).reshape(-1, *images.shape[1:])  # each original before its copy
    if config.interpolations is not None:
        lines.append(_interpolations(config, manifest, cache, world))
    sheet = image_files.grid(images, enlarge=max(1, SMALLEST_SIDE // manifest.image_size))
    image_files.save(sheet, out, note={SHEET_OF: config.path})
    return InspectResult("\n".join(lines))


def _refuse_unused_options(config: InspectConfig, manifest: Manifest) -> None:
    used = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    of_the_order = used & {"at", "seed", "window", "skip_shard", "held_back"}
    of_latents = used & {"raw", "autoencoder", "interpolations"}
    of_the_sheet = of_latents | used & {"verify", "out", "overwrite"}
    if config.plan and of_the_sheet:
        raise ConfigError(f"{_named(of_the_sheet)}: not used with `plan`, which only lists samples; leave it out")
    if not config.plan and of_the_order:
        raise ConfigError(f"{_named(of_the_order)}: only used with `plan`; add it")
    if manifest.kind == "raw" and of_latents:
        raise ConfigError(f"{_named(of_latents)}: only used for latents; {config.path} holds raw shards")


def _sheet_file(config: InspectConfig) -> str:
    """Return the file to save the sheet in.

    Raises:
        ConfigError: it exists, is no sheet of this folder, and `overwrite` is not set.
    """
    out = config.out or f"sheet-{'-'.join(_last_names(config.path))}.png"
    image_files.require_png("out", out)
    if not config.overwrite and storage.exists(out):
        note = image_files.note(out)
        owner = note.get(SHEET_OF) if isinstance(note, dict) else None
        if owner != config.path:
            content = f"a sheet of {printable(str(owner))}" if owner else "a file that is no sheet of these shards"
            raise ConfigError(f"{out}: exists and is {content}; choose another `out`, or set `overwrite`")
    return out


def _last_names(path: str) -> list[str]:
    """Return the last two names of a path or URL, or that of the folder itself if it has none."""
    names = [name for name in path.rpartition("://")[2].split("/") if name not in ("", ".", "..")]
    return names[-2:] or [Path(path).resolve().name or "root"]


def _named(options: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(options))


def _description(manifest: Manifest, drops: tuple[Drop, ...]) -> Iterator[str]:
    yield describe_size(manifest)
    for entry in manifest.classes:
        yield f"  class {entry.index:>4} {entry.name}: {entry.count:,}"
    for reason, count in Counter(reject.reason for reject in manifest.rejects).most_common():
        first = next(reject for reject in manifest.rejects if reject.reason == reason)
        yield f"  rejected {count:,} {reason}, such as {first.source}"
    if record := manifest.autoencoder:
        yield f"  autoencoder {record.name} ({record.content_hash[:12]}), scale factor {record.scale_factor:g}"
        for channel, (mean, std) in enumerate(zip(manifest.channel_mean, manifest.channel_std, strict=True)):
            yield f"  channel {channel}: mean {mean:+.3f}, deviation {std:.3f}"
    for key, value in manifest.recipe.items():
        if key != "labels":
            yield f"  {key}: {value}"
    for version in manifest.versions:
        yield f"  version before {version.digest}: the first {version.num_shards:,} shards"
    yield f"  digest {manifest.digest}"
    for drop in drops:
        yield f"  {len(drop.samples):,} samples dropped{f': {drop.reason}' if drop.reason else ''}"


def _training_order(config: InspectConfig, manifest: Manifest) -> Iterator[str]:
    """One line for each sample that training reads from sample number `at` on, in the global order."""
    import torch

    from lfm.data.random_draws import draw
    from lfm.data.stream.data_history import order_of, state_of, with_views
    from lfm.data.stream.mixture import LatentSource, Mixture

    source = LatentSource(config.path, manifest, skip_shards=config.skip_shard, drops=load_drops(config.path))
    whole = Mixture((with_views(source, [state_of(source)]),), manifest)
    training, _ = whole.split(config.held_back)
    (source,), shard_records = training.sources, training.manifest.shards
    if not source.num_samples:
        raise DataError(f"{config.path}: no samples; leave fewer shards out")
    order = order_of(training, config.seed, config.window)
    shards, rows = order.at(config.at, config.num)
    numbers = range(config.at, config.at + config.num)
    flips = draw(config.seed, torch.tensor(numbers)).flip.tolist()
    has_flips = any(member.suffix == "latent_flip.npy" for member in manifest.members)
    for number, shard, row, flip in zip(numbers, shards, rows, flips, strict=True):
        mirrored = ", mirrored" if flip and has_flips else ""
        epoch = number // source.num_samples
        yield f"sample {number:,}: epoch {epoch}, {shard_records[shard].name} row {row}{mirrored}"


def _verify(config: InspectConfig, manifest: Manifest, cache: Cache) -> None:
    """Compare size and checksums of every shard with its record."""
    damaged = []
    with Progress("verify", len(manifest.shards), "shards") as progress:
        for shard in manifest.shards:
            path = storage.join(config.path, shard.name)
            try:
                with cache.open(path, shard.bytes, shard.crc32) as file:
                    if storage.checksums(Path(file.name)).sha256 != shard.sha256:
                        damaged.append(f"{path}: checksum")
            except (DataError, StorageError) as error:
                damaged.append(str(error).split(";")[0])
            progress.advance(1)
    if damaged:
        more = f" and {len(damaged) - DAMAGED_SHOWN} more" if len(damaged) > DAMAGED_SHOWN else ""
        raise DataError(
            f"{'; '.join(damaged[:DAMAGED_SHOWN])}{more}: remove these shards and their records, and make them again"
        )


def _first_samples(folder: str, manifest: Manifest, cache: Cache, count: int) -> Iterator[RawSample]:
    images = ShardedImages(folder, manifest, cache)
    return islice(chain.from_iterable(map(images.read, range(len(images.blocks)))), count)


def overlaid(sample: RawSample) -> np.ndarray:
    """A sample's image under its segmentation and its mask: uint8 (H, W, 3)."""
    image = sample.image.astype(np.float64)
    if sample.segmentation is not None:
        image = 0.5 * image + 0.5 * image_files.colours(sample.segmentation)
    if sample.mask is not None:
        image = np.where(sample.mask[..., None] == 1, 0.4 * image + 0.6 * HOLE, image)
    return image.round().astype(np.uint8)


def _decoded_images(config: InspectConfig, manifest: Manifest, cache: Cache, world: World) -> Iterator[np.ndarray]:
    """Yield the images that the autoencoder decodes from the posterior means: uint8 (H, W, 3)."""
    import torch

    record = manifest.autoencoder
    if record is None:
        raise DataError(f"{config.path}: the manifest names no autoencoder; encode again")
    autoencoder = factory.matching_autoencoder(record, config.autoencoder, world, config.path)
    for shard in manifest.shards:
        for means in _posterior_means(config.path, manifest, shard, cache):
            latents = (torch.from_numpy(means.astype(np.float32)) - record.shift) * record.scale_factor
            yield from autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()


def _interpolations(config: InspectConfig, manifest: Manifest, cache: Cache, world: World) -> str:
    """Return the distance of decoded interpolations of the first latents, in words."""
    import torch

    from lfm.metrics import features
    from pipelines.data.latent_interpolations import interpolation_distance

    record, count = manifest.autoencoder, min(config.interpolations or 0, manifest.num_samples)
    if record is None or count < 2:
        raise DataError(f"{config.path}: `interpolations` needs two latents and their autoencoder")
    autoencoder = factory.matching_autoencoder(record, config.autoencoder, world, config.path)
    network = features.load(features.FD_LITE, autoencoder.device)
    shards = (_posterior_means(config.path, manifest, shard, cache) for shard in manifest.shards)
    means = np.concatenate(
        list(islice(chain.from_iterable(shards), -(-count // DECODED_TOGETHER) + len(manifest.shards)))
    )
    latents = (torch.from_numpy(means[:count].astype(np.float32)) - record.shift) * record.scale_factor
    originals = None
    if config.raw is not None:
        images = _originals(config.raw, config.path, manifest, cache, count)
        originals = torch.from_numpy(images).permute(0, 3, 1, 2)
    result = interpolation_distance(autoencoder, latents, originals, network)
    others = "the decoded latents" if originals is None else "the images"
    itself = "" if originals is None else f" (decoded latents: {result.reconstructed:.4f})"
    return f"decoded interpolations of {count} latents: KID {result.interpolated:.4f} to {others}{itself}"


def _posterior_means(folder: str, manifest: Manifest, shard: ShardRecord, cache: Cache) -> Iterator[np.ndarray]:
    """Yield the posterior means of a shard in small batches: float16 (B, C, h, w)."""
    with cache.open(storage.join(folder, shard.name), shard.bytes, shard.crc32) as file:
        posterior = LatentShard(file, shard.samples, manifest.members, manifest.stride).columns["latent.npy"]
    for start in range(0, shard.samples, DECODED_TOGETHER):
        moments = posterior[start : start + DECODED_TOGETHER]
        yield moments[:, : moments.shape[1] // 2]


def _originals(raw: str, latents: str, manifest: Manifest, cache: Cache, count: int) -> np.ndarray:
    """The first images of the raw shards that the latents were encoded from: uint8 (B, H, W, 3)."""
    raw_manifest = manifests.load(raw, "raw")
    if raw_manifest.digest != manifest.parent_digest:
        raise DataError(f"`raw` {raw}: {latents} was encoded from other shards; name those")
    return np.stack([sample.image for sample in _first_samples(raw, raw_manifest, cache, count)])


def _similarity(originals: np.ndarray, decoded: np.ndarray) -> str:
    """The mean and the smallest PSNR and SSIM of image pairs, in words."""
    import torch

    from lfm.metrics.paired import psnr, ssim

    first, second = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (originals, decoded))
    values = {"PSNR": psnr(first, second), "SSIM": ssim(first, second)}
    return ", ".join(f"{name} {value.mean():.3f} (smallest {value.min():.3f})" for name, value in values.items())
