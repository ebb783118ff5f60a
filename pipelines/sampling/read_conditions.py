"""What `lfm sample` tells the model: classes by number, masks and maps from images or from shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.sources.source import unlabelled
from lfm.data.transforms import CROPS, Rejected, binary, crop, crop_ids, decode, decode_ids, decode_mask
from lfm.errors import ConfigError, DataError
from lfm.inference.condition_inputs import Conditions, encode_conditions
from lfm.inference.trained_model import TrainedModel
from lfm.training.run_folder import WeightsHeader
from pipelines.common.number_lists import parse_indices
from pipelines.common.read_samples import check_latents, conditions_of_latents, read_columns, sample_rows

if TYPE_CHECKING:
    from pipelines.sampling.sample_job import SampleConfig


def read_conditions(config: SampleConfig, model: TrainedModel, num_seeds: int) -> tuple[Conditions, list[str]]:
    """What the model is told, and the names of the masks or maps.

    Raises:
        ConfigError, DataError: one line that names the flag, file or shard.
    """
    classes = None if config.class_index is None else parse_indices("--class-index", config.class_index)
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
    columns = read_columns(folder, manifest, rows, config.cache)
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
