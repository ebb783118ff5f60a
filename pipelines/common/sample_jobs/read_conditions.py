"""Read the conditions of `lfm sample`: classes from text, masks and segmentations from image files or shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.sources.source import unlabelled
from lfm.data.transforms import Rejected, binary, crop, crop_ids, decode, decode_ids, decode_mask
from lfm.errors import ConfigError, DataError
from lfm.inference.condition_inputs import Conditions, encode_conditions
from lfm.inference.trained_model import TrainedModel
from pipelines.common.class_names import resolve_classes
from pipelines.common.read_samples import check_latents, conditions_of_latents, read_columns, sample_rows
from pipelines.common.sample_jobs.sample_options import SampleConfig

FileOption = Literal["image", "mask", "segmentation"]


def read_conditions(config: SampleConfig, model: TrainedModel, num_seeds: int) -> tuple[Conditions, list[str]]:
    """Read the conditions that the options name, and check that the model takes them.

    Args:
        config: the options.
        model: the model to condition.
        num_seeds: the number of rows of the shards to read where `rows` is None.

    Returns:
        conditions: at the model's image size.
        names: the file or shard row of each mask or segmentation; empty if there are none.

    Raises:
        ConfigError, DataError: an option, file or shard does not fit the model.
    """
    classes = None
    if config.class_index is not None:
        if model.header.model.num_classes is None:
            raise ConfigError(
                f"`class_index` {config.class_index}: the model was trained without classes; leave it out"
            )
        classes = resolve_classes(config.class_index, model.header.classes)
    if config.shards is not None:
        options = {"image": config.image, "mask": config.mask, "segmentation": config.segmentation, "crop": config.crop}
        if excluded := [f"`{option}`" for option, value in options.items() if value]:
            raise ConfigError(f"`shards` {config.shards}: cannot be combined with {' and '.join(excluded)}")
        return _read_shards(config, config.shards, model, classes, num_seeds)
    if config.rows is not None:
        raise ConfigError(f"`rows` {config.rows}: selects rows of `shards`; name the shards too")
    return _read_files(config, model, classes)


@dataclass
class _FileReader:
    """Reads images, masks and segmentations that belong to each other, and checks that their sizes agree."""

    image_size: int
    crop: str | None
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)  # width and height of the first file by position

    def read(
        self,
        option: FileOption,
        paths: tuple[str, ...],
        decode_file: Callable[[bytes], Image.Image],
        crop_file: Callable[[Image.Image], np.ndarray],
    ) -> np.ndarray | None:
        """Return the files as one array (N, H, W, ...) at the image size; None if there are none."""
        arrays = []
        for position, path in enumerate(paths):
            try:
                image = decode_file(storage.read_bytes(path))
                arrays.append(crop_file(image))
            except Rejected as error:
                raise ConfigError(f"`{option}` {path}: {error.reason}: {error.detail}") from error
            self._check_size(f"`{option}` {path}", position, image.size)
        return np.stack(arrays) if arrays else None

    def _check_size(self, name: str, position: int, size: tuple[int, int]) -> None:
        width, height = size
        if self.crop is None and size != (self.image_size, self.image_size):
            raise ConfigError(
                f"{name}: is {width} x {height} pixels, the model makes {self.image_size} x {self.image_size}; "
                "scale it first, or set `crop` to centre"
            )
        expected = self.sizes.setdefault(position, size)
        if size != expected:
            raise ConfigError(
                f"{name}: is {width} x {height} pixels, but its image {expected[0]} x {expected[1]}; make them equal"
            )


def _read_files(config: SampleConfig, model: TrainedModel, classes: list[int] | None) -> tuple[Conditions, list[str]]:
    """Read conditions from image files; with `crop`, each pixel is placed where `lfm shard` would place it."""
    header, rule = model.header, config.crop or "centre"
    size, fill = header.image_size, unlabelled(header.labels)
    if config.crop and not (config.image or config.mask or config.segmentation):
        raise ConfigError(f"`crop` {rule}: there is no `image`, `mask` or `segmentation`; leave it out")
    _check_task(config, model)
    reader = _FileReader(size, config.crop)
    images = reader.read("image", config.image, decode, lambda image: crop(image, size, rule))
    masks = reader.read("mask", config.mask, decode_mask, lambda mask: binary(crop(mask, size, rule)))
    segmentations = reader.read(
        "segmentation",
        config.segmentation,
        lambda content: Image.fromarray(decode_ids(content)),
        lambda ids: crop_ids(np.asarray(ids), ids.size, size, rule, fill),
    )
    names = [path.rsplit("/", 1)[-1] for path in config.image or config.segmentation]
    return encode_conditions(header, model.autoencoder, classes, images, masks, segmentations, names), names


def _check_task(config: SampleConfig, model: TrainedModel) -> None:
    """Refuse files of a task that the model was not trained for, and the absence of those that it needs."""
    shape = model.header.model
    if shape.condition_channels and not (config.image and config.mask):
        raise ConfigError("the model was trained to inpaint: set `image` and `mask`, or `shards`")
    if not shape.condition_channels and (config.image or config.mask):
        raise ConfigError("`image` and `mask`: the model was not trained to inpaint; leave them out")
    if shape.num_labels and not config.segmentation:
        raise ConfigError("the model was trained on segmentation maps: set `segmentation`, or `shards`")
    if not shape.num_labels and config.segmentation:
        raise ConfigError("`segmentation`: the model was not trained on segmentation maps; leave it out")
    if len(config.image) != len(config.mask):
        raise ConfigError(f"`mask`: {len(config.mask)} for {len(config.image)} images; give as many")


def _read_shards(
    config: SampleConfig, folder: str, model: TrainedModel, classes: list[int] | None, num_seeds: int
) -> tuple[Conditions, list[str]]:
    """Read conditions from raw or latent shards: masks, segmentations, and classes unless `classes` is set."""
    shape, manifest = model.header.model, manifests.load(folder)
    needs_masks, needs_segmentations = shape.condition_channels > 0, shape.num_labels is not None
    if not (needs_masks or needs_segmentations):
        raise ConfigError(f"`shards` {folder}: {model.name} takes no masks or segmentations; leave it out")
    for name, is_needed in (("mask", needs_masks), ("segmentation", needs_segmentations)):
        if is_needed and name not in manifest.fields:
            raise DataError(f"{folder}: its samples have no {name}; name other shards")
    rows = sample_rows(config.rows, folder, manifest, num_seeds)
    columns = read_columns(folder, manifest, rows, config.cache)
    if classes is None and shape.num_classes and "class_index" in columns:
        if [record.name for record in manifest.classes] != [record.name for record in model.header.classes]:
            raise DataError(f"{folder}: its classes are not those of {model.name}; choose with `class_index`")
        classes = [int(index) for index in columns["class_index"]]
    names = [f"{folder} {row}" for row in rows]
    if needs_masks and manifest.kind == "latents":
        check_latents(folder, manifest, model)
        if config.composite:
            raise ConfigError(
                f"`shards` {folder}: latents have no pixels to put back; name the raw shards, or add --no-composite"
            )
        return conditions_of_latents(model, columns, classes), names
    images = np.stack(columns["image"]) if needs_masks else None
    masks = np.stack(columns["mask"]) if needs_masks else None
    segmentations = np.stack(columns["segmentation"]) if needs_segmentations else None
    return encode_conditions(model.header, model.autoencoder, classes, images, masks, segmentations, names), names
