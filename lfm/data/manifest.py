"""What says that a data set of shards is there, whole, and what it is.

    recipe.json      written first: everything that decides the shards' bytes. It claims the folder.
    000000.tar       a shard
    000000.json      its record, written after it: its presence means that the shard is done
    manifest.json    the records merged, written last: its presence means that the data set is complete

Whoever finds every record there writes the manifest, so that no process need wait for another.
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
    """A source that is not in the shards, and why."""

    source: str
    reason: str  # a word or two, to count by
    detail: str = ""


class ShardRecord(_Record):
    """One shard: a plain tar, and what is known of its content."""

    name: str = Field(pattern=r"^\d{6}\.tar$")
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    crc32: int
    class_counts: tuple[int, ...] = ()
    rejects: tuple[Reject, ...] = ()
    channel_sums: tuple[tuple[float, float], ...] = ()  # latents: sum of values and of squares, by channel
    values_per_channel: int = 0


class ClassRecord(_Record):
    """One entry of the label map."""

    index: int
    name: str
    count: int


class AutoencoderRecord(_Record):
    """Which autoencoder the latents are of: another one with the same shapes would decode them to rubbish."""

    name: str  # `embedded`, a path or a hub id
    content_hash: str
    downsample_factor: int
    latent_channels: int
    scale_factor: float
    shift: float


class Member(_Record):
    """One file of each latent sample: data of fixed size, at a fixed place in the sample's stretch of the tar."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the data, in bytes from the sample's start


class Manifest(_Record):
    """A complete data set of shards."""

    kind: Literal["raw", "latents"]
    version: Literal[1] = VERSION
    image_size: PositiveInt
    classes: tuple[ClassRecord, ...] = ()
    fields: tuple[Literal["mask", "segmentation"], ...] = ()  # what every sample has beside image and class
    labels: dict[int, str] = {}  # class ids of the segmentations, by name
    recipe: dict[str, Any]
    parent_digest: str | None = None  # latents: of the raw manifest
    autoencoder: AutoencoderRecord | None = None
    members: tuple[Member, ...] = ()  # latents: constant over all shards
    stride: int = 0  # latents: bytes from one sample to the next
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    shards: tuple[ShardRecord, ...]

    @property
    def num_labels(self) -> int:
        """How many ids a segmentation may hold: they are below it, but need not all be labels."""
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
        """A hash of the whole data set's content and description."""
        return digest([self.model_dump(mode="json")])


def digest(values: Iterable[Any]) -> str:
    """The sha256 of the values' canonical JSON, a line each."""
    total = hashlib.sha256()
    for value in values:
        total.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return total.hexdigest()


def load(folder: str, kind: Literal["raw", "latents"] | None = None) -> Manifest:
    """The manifest of `folder`, of one kind or any.

    Raises:
        DataError: there is none (the data set is not complete), it is of the other kind, or it is not readable.
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
    """Begin or continue in `folder` what `recipe` describes; `overwrite` begins anew.

    Args:
        folder: path or URL.
        recipe: everything that decides what will be there.
        overwrite: remove what was there, but nothing that is not ours.
        owned: matches the names of the files that are ours.

    Raises:
        ConfigError: the folder holds something made otherwise, or something else; nothing is changed.
    """
    path = storage.join(folder, RECIPE)
    names = set(storage.find(folder)) if storage.exists(folder) else set()  # one look: others may claim it meanwhile
    recipe = json.loads(json.dumps(recipe))  # as it reads back: no tuples
    if RECIPE in names:
        changed = _changes(path, recipe)
        if not changed and not overwrite:
            return
        if not overwrite:
            raise ConfigError(f"{folder}: was made otherwise: {changed}; choose another folder or --overwrite")
    elif names:
        raise ConfigError(f"{folder}: holds something else, not made by lfm; choose another folder")
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if re.fullmatch(owned, name):
            storage.remove(storage.join(folder, name))
    storage.write_json(path, recipe)


def _changes(path: str, recipe: dict[str, Any]) -> str:
    """In words, what a recipe has that is not in the file, and the other way round; empty where they are equal."""
    try:
        before = storage.read_json(path)
    except DataError:
        return f"{RECIPE} is not readable"
    if not isinstance(before, dict):
        return f"{RECIPE} is no recipe of lfm"
    nothing = object()
    return ", ".join(
        f"{key} ({_short(before.get(key))}, now {_short(recipe.get(key))})"
        for key in sorted({*before, *recipe})
        if before.get(key, nothing) != recipe.get(key, nothing)
    )


def commit(folder: str, record: ShardRecord) -> None:
    """Publish the record of a shard that is already in place."""
    storage.write_json(storage.join(folder, _record_name(record.name)), record.model_dump(mode="json"))


def done(folder: str) -> set[str]:
    """The names of the shards that are done, by one listing."""
    names = storage.sizes(folder)
    return {name for name in names if name.endswith(".tar") and _record_name(name) in names}


def is_done(folder: str, shard: str) -> bool:
    """Whether one shard is done, without a listing."""
    return all(storage.exists(storage.join(folder, name)) for name in (shard, _record_name(shard)))


def records(folder: str, shards: list[str]) -> tuple[ShardRecord, ...]:
    """The records of shards that are done, each checked against the size of its tar.

    Raises:
        DataError: names the file to remove, so that the same command makes the shard again.
    """
    sizes = storage.sizes(folder)

    def read(shard: str) -> ShardRecord:
        path = storage.join(folder, _record_name(shard))
        try:
            record = _parse(ShardRecord, path, storage.read_json(path))
        except DataError as error:
            raise DataError(f"{error} Remove it, and the same command makes the shard again") from error
        if sizes.get(shard) != record.bytes:
            raise DataError(
                f"{storage.join(folder, shard)}: {sizes.get(shard)} bytes, its record says {record.bytes}; remove it, "
                "and the same command makes it again"
            )
        return record

    return tuple(map_ahead(read, shards, threads=1 if storage.is_local(folder) else 16))


def publish(folder: str, manifest: Manifest) -> None:
    """Write the manifest; from now on the data set is complete."""
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
