"""The manifest: commit marker and schema of a sharded data set.

    recipe.json      written first: everything that determines the shards' bytes. It claims the folder.
    000000.tar       a shard
    000000.json      its record, written after it: the shard is done
    manifest.json    the merged records, written last: the data set is complete

Any process that finds all records writes the manifest, so that no process has to wait for another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from lfm import storage
from lfm.errors import ConfigError, DataError
from lfm.prefetch import map_ahead

VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
SHARD_FILES = r"\d{6}\.(tar|json)|manifest\.json|recipe\.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reject(_Record):
    """A rejected sample: its source item and the reason."""

    source: str
    reason: str  # one or two words, by which rejects are counted
    detail: str = ""


class ShardRecord(_Record):
    """One shard: its tar, checksums and statistics."""

    name: str = Field(pattern=r"^\d{6}\.tar$")
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    crc32: int
    class_counts: tuple[int, ...] = ()
    rejects: tuple[Reject, ...] = ()
    channel_sums: tuple[tuple[float, float], ...] = ()  # latents: sums of the values and of their squares, by channel
    values_per_channel: int = 0


class ClassRecord(_Record):
    """One entry of the label map."""

    index: int
    name: str
    count: int


class AutoencoderRecord(_Record):
    """The autoencoder of the latents, since another one with the same shapes would decode them to noise."""

    name: str  # `embedded`, a path or a Hub id
    content_hash: str
    downsample_factor: int
    latent_channels: int
    scale_factor: float
    shift: float


class Member(_Record):
    """One member of every latent sample: an array of fixed size at a fixed offset from the sample's start."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the sample's start to the data


class Manifest(_Record):
    """A complete data set of shards."""

    kind: Literal["raw", "latents"]
    version: Literal[1] = VERSION
    image_size: PositiveInt
    classes: tuple[ClassRecord, ...] = ()
    fields: tuple[Literal["mask", "segmentation"], ...] = ()  # that every sample has besides image and class
    labels: dict[int, str] = {}  # names of the segmentations' class ids
    recipe: dict[str, Any]
    parent_digest: str | None = None  # latents: the digest of the raw manifest
    autoencoder: AutoencoderRecord | None = None
    members: tuple[Member, ...] = ()  # latents: equal in all shards
    stride: int = 0  # latents: bytes from one sample to the next
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    shards: tuple[ShardRecord, ...]

    @property
    def num_labels(self) -> int:
        """An upper bound of the class ids: ids are below it, but not all of them need be labels."""
        return 1 + max(self.labels, default=-1)

    @property
    def num_samples(self) -> int:
        """Over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def rejects(self) -> list[Reject]:
        """Over all shards."""
        return [reject for shard in self.shards for reject in shard.rejects]

    @property
    def digest(self) -> str:
        """A hash of the content and the description of the whole data set."""
        return digest([self.model_dump(mode="json")])


def digest(values: Iterable[Any]) -> str:
    """Return the sha256 of the values' canonical JSON, one per line."""
    total = hashlib.sha256()
    for value in values:
        total.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return total.hexdigest()


def load(folder: str, kind: Literal["raw", "latents"] | None = None) -> Manifest:
    """Return the manifest of `folder`.

    Raises:
        DataError: there is none (the data set is not complete), it is of another kind, or it is not readable.
    """
    path = storage.join(folder, MANIFEST)
    made_by = {"raw": "lfm shard", "latents": "lfm encode", None: "lfm shard` or `lfm encode"}[kind]
    if not storage.exists(path):
        if storage.exists(storage.join(folder, RECIPE)):
            raise DataError(f"{folder}: the shards are not complete; run the same `{made_by}` again to finish them")
        raise DataError(f"{folder}: no {MANIFEST} there; make the shards with `{made_by}` first")
    content = storage.read_json(path)
    if kind and isinstance(content, dict) and content.get("kind") != kind:
        raise DataError(
            f"{path}: holds {content.get('kind')} shards, {kind} ones are needed; make them with `{made_by}`"
        )
    return _parse(Manifest, path, content)


def claim(folder: str, recipe: dict[str, Any], *, overwrite: bool, owned: str = SHARD_FILES) -> None:
    """Start or resume making the data set that `recipe` describes in `folder`.

    Args:
        folder: path or URL.
        recipe: everything that determines the content.
        overwrite: remove the files of an earlier data set first, but no others.
        owned: pattern of the names of files that may be removed.

    Raises:
        ConfigError: the folder holds a data set with different settings, or other files; nothing is changed.
    """
    path = storage.join(folder, RECIPE)
    # One listing, since other processes may claim the folder meanwhile.
    names = set(storage.find(folder)) if storage.exists(folder) else set()
    recipe = json.loads(json.dumps(recipe))  # as it will be read back: without tuples
    if RECIPE in names:
        changed = _changes(path, recipe)
        if not changed and not overwrite:
            return
        if not overwrite:
            raise ConfigError(
                f"{folder}: was made with different settings: {changed}; choose another folder or `overwrite`"
            )
    elif names:
        raise ConfigError(f"{folder}: holds something else than files of lfm; choose another folder")
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if re.fullmatch(owned, name):
            storage.remove(storage.join(folder, name))
    storage.write_json(path, recipe)


def _changes(path: str, recipe: dict[str, Any]) -> str:
    """Describe the differences between a recipe and the one in the file; empty if they are equal."""
    try:
        before = storage.read_json(path)
    except DataError:
        return f"{RECIPE} is not readable"
    if not isinstance(before, dict):
        return f"{RECIPE} is no recipe of lfm"
    missing = object()
    return ", ".join(
        f"{key} ({_short(before.get(key))}, now {_short(recipe.get(key))})"
        for key in sorted({*before, *recipe})
        if before.get(key, missing) != recipe.get(key, missing)
    )


def commit(folder: str, record: ShardRecord) -> None:
    """Write the record of a finished shard, which marks it as done."""
    storage.write_json(storage.join(folder, _record_name(record.name)), record.model_dump(mode="json"))


def done(folder: str) -> set[str]:
    """Return the names of the shards that are done, by one listing."""
    names = storage.sizes(folder)
    return {name for name in names if name.endswith(".tar") and _record_name(name) in names}


def is_done(folder: str, shard: str) -> bool:
    """Return whether one shard is done, without a listing."""
    return all(storage.exists(storage.join(folder, name)) for name in (shard, _record_name(shard)))


def records(folder: str, shards: list[str]) -> tuple[ShardRecord, ...]:
    """Return the records of shards that are done, each checked against the size of its tar.

    Raises:
        DataError: a record is damaged or does not fit its tar; names the file to remove.
    """
    sizes = storage.sizes(folder)

    def read(shard: str) -> ShardRecord:
        path = storage.join(folder, _record_name(shard))
        try:
            record = _parse(ShardRecord, path, storage.read_json(path))
        except DataError as error:
            raise DataError(f"{error} Remove it and run the same command to make the shard again") from error
        if sizes.get(shard) != record.bytes:
            raise DataError(
                f"{storage.join(folder, shard)}: {sizes.get(shard)} bytes, its record says {record.bytes}; remove it "
                "and run the same command to make it again"
            )
        return record

    return tuple(map_ahead(read, shards, threads=1 if storage.is_local(folder) else 16))


def publish(folder: str, manifest: Manifest) -> None:
    """Write the manifest, which marks the data set as complete."""
    storage.sweep(folder)
    storage.write_json(storage.join(folder, MANIFEST), manifest.model_dump(mode="json"))


def _record_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _parse(model: Any, path: str, content: Any) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg'].lower()}; was it made by another version of lfm?") from error
