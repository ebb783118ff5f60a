"""What `lfm sample` tells the model: classes by number, masks and maps from images or from shards."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.latent_shards import LatentShard, read_raw
from lfm.data.manifest import AutoencoderRecord, Manifest
from lfm.data.sources.source import unlabelled
from lfm.data.transforms import CROPS, Rejected, binary, crop, crop_ids, decode, decode_ids, decode_mask
from lfm.errors import ConfigError, DataError
from lfm.inference.condition_inputs import Conditions, encode_conditions, spatial_condition, with_classes
from lfm.inference.trained_model import TrainedModel
from lfm.training.run_folder import WeightsHeader
from pipelines.common import factory

if TYPE_CHECKING:
    from pipelines.sampling.sample_job import SampleConfig

MOST_NUMBERS = 1_000_000
MEMBERS = {
    "cls": "class_index",
    "latent.npy": "posterior",
    "masked.npy": "masked",
    "mask.npy": "mask",
    "seg.npy": "segmentation",
}


def numbers(flag: str, text: str) -> list[int]:
    """The numbers of a list such as 0-15 or 3,5,8-9.

    Raises:
        ConfigError: it is no such list, or names a number twice.
    """
    result: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{flag} {text}: must be numbers and ranges, as in 0-15 or 3,5,8-9, below {10**18:.0e}")
        named = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(result) + len(named) > MOST_NUMBERS:
            raise ConfigError(f"{flag} {text}: more than {MOST_NUMBERS:,} at once; give them in parts")
        result += named
    if len(set(result)) != len(result):
        raise ConfigError(f"{flag} {text}: names a number twice")
    return result


def read_conditions(config: SampleConfig, model: TrainedModel, num_seeds: int) -> tuple[Conditions, list[str]]:
    """What the model is told, and the names of the masks or maps.

    Raises:
        ConfigError, DataError: one line that names the flag, file or shard.
    """
    classes = None if config.class_index is None else numbers("--class-index", config.class_index)
    by_file = [f"--{kind}" for kind in ("image", "mask", "segmentation", "crop") if getattr(config, kind)]
    if config.shards is None:
        if config.rows is not None:
            raise ConfigError(f"--rows {config.rows}: says which of --shards; give those too")
        images, masks, maps = _from_files(config, model.header)
        names = [path.rsplit("/", 1)[-1] for path in config.image or config.segmentation]
        return encode_conditions(model.header, model.autoencoder, classes, images, masks, maps, names), names
    if by_file:
        raise ConfigError(f"--shards {config.shards}: has all that is told; leave out {' and '.join(by_file)}")
    return _from_shards(config, model, classes, num_seeds)


def _from_files(config: SampleConfig, header: WeightsHeader) -> list[np.ndarray | None]:
    """Images, masks and maps at the model's image size, with `--crop` each pixel where `lfm shard` would put it."""
    size, rule = header.image_size, config.crop or "centre"
    if rule not in CROPS:
        raise ConfigError(f"--crop {rule}: unknown; one of {', '.join(CROPS)}")
    if config.crop and not (config.image or config.mask or config.segmentation):
        raise ConfigError(f"--crop {rule}: there is no --image, --mask or --segmentation; leave it out")
    fill = unlabelled(header.labels)
    sizes: dict[int, tuple[int, int]] = {}  # of the first file for each image
    given: list[np.ndarray | None] = []
    for flag, paths, read, at_size in (
        ("--image", config.image, decode, lambda image: crop(image, size, rule)),
        ("--mask", config.mask, decode_mask, lambda mask: binary(crop(mask, size, rule))),
        (
            *("--segmentation", config.segmentation, lambda content: Image.fromarray(decode_ids(content))),
            lambda ids: crop_ids(np.asarray(ids), ids.size, size, rule, fill),
        ),
    ):
        arrays = []
        for number, path in enumerate(paths):
            try:
                opened = read(storage.read_bytes(path))
                arrays.append(at_size(opened))
            except Rejected as error:
                raise ConfigError(f"{flag} {path}: {error.reason}: {error.detail}") from error
            found = f"{flag} {path}: is {opened.width} x {opened.height} pixels"
            if config.crop is None and opened.size != (size, size):
                raise ConfigError(f"{found}, the model makes {size} x {size}; scale it first, or add --crop centre")
            if sizes.setdefault(number, opened.size) != opened.size:
                width, height = sizes[number]
                raise ConfigError(f"{found}, the image it belongs to {width} x {height}; make it as large")
        given.append(np.stack(arrays) if arrays else None)
    return given


def _from_shards(
    config: SampleConfig, model: TrainedModel, classes: list[int] | None, num_seeds: int
) -> tuple[Conditions, list[str]]:
    folder, shape = str(config.shards), model.header.model
    manifest = manifests.load(folder)
    rows = sample_rows(config.rows, folder, manifest, num_seeds)
    wanted = ["segmentation"] * bool(shape.num_labels) + ["mask"] * bool(shape.condition_channels)
    if not wanted:
        raise ConfigError(f"--shards {folder}: {model.name} takes no masks or maps; leave it out")
    if missing := [name for name in wanted if name not in manifest.fields]:
        raise DataError(f"{folder}: its samples have no {missing[0]}; name other shards")
    columns = gathered(folder, manifest, rows, config.cache)
    if classes is None and shape.num_classes and "class_index" in columns:
        if [entry.name for entry in manifest.classes] != [entry.name for entry in model.header.classes]:
            raise DataError(f"{folder}: its classes are not those of {model.name}; choose with --class-index")
        classes = [int(index) for index in columns["class_index"]]
    maps = np.stack(columns["segmentation"]) if "segmentation" in wanted else None
    names = [f"{folder} {row}" for row in rows]
    if "mask" not in wanted or manifest.kind == "raw":
        images, masks = (np.stack(columns[name]) if "mask" in wanted else None for name in ("image", "mask"))
        return encode_conditions(model.header, model.autoencoder, classes, images, masks, maps, names), names
    check_latents(folder, manifest, model)
    if config.composite:
        raise ConfigError(
            f"--shards {folder}: latents have no pixels to put back; name the raw shards, or add --no-composite"
        )
    return conditions_of_latents(model, columns, classes), names


def check_latents(folder: str, manifest: Manifest, model: TrainedModel) -> AutoencoderRecord:
    """The record of the autoencoder of some latents, which must be the model's, and hold all that it is told.

    Raises:
        DataError: it is another, or they do not.
    """
    record, shape = manifest.autoencoder, model.header.model
    if record is None or record.content_hash != model.autoencoder.content_hash:
        raise DataError(f"{folder}: its latents are of another autoencoder than those of {model.name}")
    members = {member.suffix for member in manifest.members}
    for takes, suffix, what in (
        (shape.condition_channels, "masked.npy", "masks"),
        (shape.num_labels, "seg.npy", "segmentations"),
    ):
        if takes and suffix not in members:
            raise DataError(f"{folder}: its latents have no {what}, which {model.name} takes; name others")
    return record


def conditions_of_latents(model: TrainedModel, columns: dict[str, list[Any]], classes: list[int] | None) -> Conditions:
    """What the samples of latent shards tell the model, one of each part for each of them."""
    shape, spatial = model.header.model, None
    if shape.condition_channels:
        masked, mask = (torch.from_numpy(np.stack(columns[name])) for name in ("masked", "mask"))
        spatial = spatial_condition(model.autoencoder, masked, mask[:, None])
    maps = np.stack(columns["segmentation"]) if shape.num_labels is not None else None
    return with_classes(Conditions(spatial=spatial, segmentation=maps), classes, shape.num_classes)


def sample_rows(text: str | None, folder: str, manifest: Manifest, most: int) -> list[int]:
    """The samples of some shards that `--rows` names; without it the first, `most` if there are as many.

    Raises:
        ConfigError: there are not so many.
    """
    if text is None:
        return list(range(min(most, manifest.num_samples)))
    rows = numbers("--rows", text)
    if max(rows) >= manifest.num_samples:
        raise ConfigError(
            f"--rows: {folder} holds {manifest.num_samples:,} samples, 0 is the first, there is no {max(rows)}"
        )
    return rows


def gathered(folder: str, manifest: Manifest, rows: list[int], cache_folder: str | None) -> dict[str, list[Any]]:
    """The samples of these numbers, in this order, by the names of their fields."""
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    cache, found = factory.cache(cache_folder), {}
    for index, group in groupby(sorted(rows), key=lambda row: int(np.searchsorted(ends, row, side="right"))):
        shard, first = manifest.shards[index], int(ends[index]) - manifest.shards[index].samples
        inside = {row - first: row for row in group}
        path = storage.join(folder, shard.name)
        local = cache.fetch(path, shard.bytes, shard.crc32)
        if manifest.kind == "raw":
            with local.open("rb") as stream:
                for place, sample in enumerate(read_raw(stream, path)):
                    if place in inside:
                        found[inside[place]] = vars(sample)
        else:
            columns = LatentShard(local, shard.samples, manifest.members, manifest.stride).columns
            values = {MEMBERS[name]: columns[name][np.array(list(inside))] for name in MEMBERS if name in columns}
            for place, row in enumerate(inside.values()):
                found[row] = {name: value[place] for name, value in values.items()}
    return {name: [found[row][name] for row in rows] for name in found[rows[0]]}
