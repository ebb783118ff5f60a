"""Read chosen samples of raw or latent shards, and the conditions that latent shards hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lfm import storage
from lfm.data.latent_shards import LATENT_MEMBERS, LatentShard
from lfm.data.manifest import AutoencoderRecord, Manifest, ShardRecord
from lfm.data.raw_shards import read_raw
from lfm.errors import ConfigError, DataError
from lfm.inference.condition_inputs import Conditions, spatial_condition, with_classes
from lfm.inference.trained_model import TrainedModel
from lfm.storage.cache import Cache
from pipelines.common import factory
from pipelines.common.number_lists import parse_indices


def sample_rows(text: str | None, folder: str, manifest: Manifest, default_count: int) -> list[int]:
    """Return the rows of a data set that `text` names, by default the first `default_count`.

    A row is the number of a sample in the order of the shards, counted from 0.

    Raises:
        ConfigError: the text is not a list of numbers, or the data set has fewer samples.
    """
    if text is None:
        return list(range(min(default_count, manifest.num_samples)))
    rows = parse_indices("rows", text)
    if max(rows) >= manifest.num_samples:
        raise ConfigError(f"`rows` {max(rows)}: out of range; {folder} has rows 0 to {manifest.num_samples - 1:,}")
    return rows


def read_columns(folder: str, manifest: Manifest, rows: list[int], cache_folder: str | None) -> dict[str, list[Any]]:
    """Return the fields of the samples `rows` as lists by field name, in the order of `rows`.

    The names are those of `RawSample` or `LatentSample`. Only the shards that hold one of the rows are read.

    Raises:
        DataError, StorageError: a shard is damaged or cannot be read.
    """
    cache, wanted = factory.cache(cache_folder), np.array(rows)
    samples: dict[int, dict[str, Any]] = {}
    first = 0
    for shard in manifest.shards:
        inside = wanted[(wanted >= first) & (wanted < first + shard.samples)] - first
        if len(inside):
            values = _read_shard(folder, manifest, shard, inside, cache)
            samples |= {first + row: value for row, value in values.items()}
        first += shard.samples
    return {field: [samples[row][field] for row in rows] for field in samples[rows[0]]}


def _read_shard(
    folder: str, manifest: Manifest, shard: ShardRecord, rows: np.ndarray, cache: Cache
) -> dict[int, dict[str, Any]]:
    """Return some samples of one shard, each a dictionary of its fields, by row within the shard."""
    path = storage.join(folder, shard.name)
    with cache.open(path, shard.bytes, shard.crc32) as file:
        if manifest.kind == "raw":
            wanted = set(rows.tolist())
            return {row: vars(sample) for row, sample in enumerate(read_raw(file, path)) if row in wanted}
        columns = LatentShard(file, shard.samples, manifest.members, manifest.stride).columns
    values = {LATENT_MEMBERS[suffix]: column[rows] for suffix, column in columns.items()}
    return {
        row: {field: column[position] for field, column in values.items()} for position, row in enumerate(rows.tolist())
    }


def check_latents(folder: str, manifest: Manifest, model: TrainedModel) -> AutoencoderRecord:
    """Check that latent shards fit a model, and return the record of their autoencoder.

    Raises:
        DataError: the latents come from another autoencoder or image size, or lack a condition that the model takes.
    """
    record, shape = manifest.autoencoder, model.header.model
    if record is None or record.content_hash != model.autoencoder.content_hash:
        raise DataError(f"{folder}: its latents come from another autoencoder than those of {model.name}")
    if manifest.image_size != model.header.image_size:
        raise DataError(
            f"{folder}: its latents are of images of {manifest.image_size} pixels, {model.name} makes "
            f"{model.header.image_size}; choose other latents"
        )
    suffixes = {member.suffix for member in manifest.members}
    if shape.condition_channels and "masked.npy" not in suffixes:
        raise DataError(f"{folder}: its latents have no masks, which {model.name} takes; choose other latents")
    if shape.condition_channels and model.header.missing_pixels != "grey":
        raise DataError(
            f"{folder}: its masked images are grey, those of {model.name} black; name raw shards, if the command takes them"
        )
    if shape.num_labels and "seg.npy" not in suffixes:
        raise DataError(f"{folder}: its latents have no segmentations, which {model.name} takes; choose other latents")
    return record


def conditions_of_latents(model: TrainedModel, columns: dict[str, list[Any]], classes: list[int] | None) -> Conditions:
    """Return the conditions that the samples of latent shards hold, one row for each sample.

    Args:
        model: the model that takes them.
        columns: from `read_columns`.
        classes: class index of each sample; None for all classes of the model.
    """
    shape, spatial, segmentations = model.header.model, None, None
    if shape.condition_channels:
        masked, mask = (torch.from_numpy(np.stack(columns[field])) for field in ("masked", "mask"))
        spatial = spatial_condition(model.autoencoder, masked, mask[:, None])
    if shape.num_labels is not None:
        segmentations = np.stack(columns["segmentation"])
    return with_classes(Conditions(spatial=spatial, segmentation=segmentations), classes, shape.num_classes)
