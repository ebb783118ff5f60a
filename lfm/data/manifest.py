"""The manifest: commit marker and schema of a sharded data set.

    recipe.json      written first: everything that determines the shards' bytes. It claims the folder.
    000000.tar       a shard
    000000.columns.json   raw shards: what was learned of its samples, for the index
    000000.json      its record, written after it: the shard is done
    columns.parquet  the index of all samples, if pyarrow is installed (`lfm.data.columns`)
    near_duplicates.json  images that are nearly equal, if `lfm shard` was asked for them
    manifest.json    the merged records, written last: the data set is complete

Any process that finds all records writes the manifest, so that no process has to wait for another.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lfm import storage
from lfm.errors import ConfigError, DataError
from lfm.prefetch import map_ahead

VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.json"
_ONE = {"raw": "raw", "latents": "latent"}  # the adjective of each kind of shards
INDEX = "columns.parquet"
NEAR_DUPLICATES = "near_duplicates.json"
DROPPED = "dropped.json"  # see `lfm.data.dropped`
logger = logging.getLogger(__name__)

SHARD_FILES = (
    r"\d{6}\.(tar|json|columns\.json)|columns(-\d{6})?\.parquet|(near_duplicates|dropped|manifest|recipe)\.json"
)


# Limits of the numbers in files that others may have written, so that none asks for memory without end.
Count = Annotated[int, Field(ge=0, le=10**12)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
ClassId = Annotated[int, Field(ge=0, lt=10**8)]  # a class has 8 digits in a shard
Dimensions = Annotated[int, Field(ge=1, le=65_536)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reject(_Record):
    """A rejected sample: its source item and the reason."""

    source: str
    reason: str  # one or two words, by which rejects are counted
    detail: str = ""


class ShardRecord(_Record):
    """One shard: its tar, checksums and statistics."""

    name: str = Field(pattern=r"^\d{6}\.tar$")
    samples: Annotated[int, Field(ge=0, le=10**6)]  # a row has 6 digits in a key
    bytes: Bytes
    sha256: str
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    class_counts: tuple[Count, ...] = ()
    rejects: tuple[Reject, ...] = ()
    channel_sums: tuple[tuple[float, float], ...] = ()  # latents: sums of the values and of their squares, by channel
    values_per_channel: Count = 0


ColumnType = Literal["int", "float", "text", "bool"]
# The columns that every index has.
OWN_COLUMNS: dict[str, ColumnType] = {
    "key": "text",
    "class": "text",
    "source": "text",
    "width": "int",
    "height": "int",
}


class ColumnsRecord(_Record):
    """The index of a data set: its file, and the columns of its samples."""

    bytes: Bytes
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    types: Annotated[dict[str, ColumnType], Field(max_length=10_000)]
    file: str = Field(
        default=INDEX, pattern=r"^columns(-\d{6})?\.parquet$"
    )  # of a set that has grown with its number of shards


class ClassRecord(_Record):
    """One entry of the label map."""

    index: ClassId
    name: str
    count: Count


class AutoencoderRecord(_Record):
    """The autoencoder of the latents, since another one with the same shapes would decode them to noise."""

    name: str  # `embedded`, a path or a Hub id
    content_hash: str
    downsample_factor: Annotated[int, Field(ge=1, le=1024)]
    latent_channels: Annotated[int, Field(ge=1, le=1024)]
    scale_factor: Annotated[float, Field(gt=0, le=1e6)]
    shift: Annotated[float, Field(ge=-1e6, le=1e6)]


class Member(_Record):
    """One member of every latent sample: an array of fixed size at a fixed offset from the sample's start."""

    suffix: str
    dtype: str = Field(pattern=r"^[|<=]?(u1|u2|f2|f4|f8|S8)$")  # no other: an object is a pointer
    shape: Annotated[tuple[Dimensions, ...], Field(max_length=4)]
    offset: Bytes  # bytes from the sample's start to the data

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * int(self.dtype[-1])


def _not_too_deep(value: Any, levels: int = 50) -> Any:
    """Return a JSON value of at most so many levels: pydantic cannot write one of 256."""
    if levels == 0:
        raise ValueError("is nested too deeply")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _not_too_deep(child, levels - 1)
    return value


class VersionRecord(_Record):
    """An earlier version of a data set that has grown: its shards are the first ones, the rest is what its manifest held."""

    num_shards: Count
    digest: str
    classes: tuple[ClassRecord, ...] = ()
    labels: dict[Annotated[int, Field(ge=0, lt=2**16)], str] = {}
    recipe: Annotated[dict[str, Any], AfterValidator(_not_too_deep)]
    parent_digest: str | None = None
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()


class Manifest(_Record):
    """A complete data set of shards."""

    kind: Literal["raw", "latents"]
    version: Literal[1] = VERSION
    image_size: Pixels
    classes: tuple[ClassRecord, ...] = ()
    fields: tuple[Literal["mask", "segmentation"], ...] = ()  # that every sample has besides image and class
    labels: dict[Annotated[int, Field(ge=0, lt=2**16)], str] = {}  # names of the segmentations' class ids
    recipe: Annotated[dict[str, Any], AfterValidator(_not_too_deep)]
    parent_digest: str | None = None  # latents: the digest of the raw manifest
    autoencoder: AutoencoderRecord | None = None
    members: tuple[Member, ...] = ()  # latents: equal in all shards
    stride: Bytes = 0  # latents: bytes from one sample to the next
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    shards: tuple[ShardRecord, ...]
    columns: ColumnsRecord | None = None
    versions: Annotated[tuple[VersionRecord, ...], Field(max_length=10_000)] = ()  # earlier ones, the oldest first

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        """Check what shards, classes and members must satisfy together."""
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError(f"shards: {next(name for name in names if names.count(name) > 1)} is listed twice")
        if [entry.index for entry in self.classes] != list(range(len(self.classes))):
            raise ValueError("classes: their indices are not 0, 1, 2, ...")
        if len(self.channel_mean) != len(self.channel_std):
            raise ValueError("channel_mean and channel_std: of different lengths")
        ends = [version.num_shards for version in self.versions]
        if any(after <= before for before, after in itertools.pairwise([0, *ends, len(self.shards)])) and ends:
            raise ValueError("versions: each must have more shards than the one before it, and the newest has most")
        if self.kind == "latents" and "latent.npy" not in {member.suffix for member in self.members}:
            raise ValueError("members: latent.npy is missing")
        for member in self.members:
            if (member.suffix == "cls") != member.dtype.endswith("S8") or (member.suffix == "cls" and member.shape):
                raise ValueError(f"members: {member.suffix} is {member.dtype}; cls is of 8 digits, and nothing else")
            if member.suffix.startswith("latent") and (len(member.shape) != 3 or member.shape[0] % 2):
                raise ValueError(f"members: {member.suffix} is not of (2 channels, height, width)")
            if self.stride and (member.offset < 512 or member.offset + member.num_bytes > self.stride):
                raise ValueError(f"members: {member.suffix} reaches beyond its sample of {self.stride} bytes")
        return self

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
        """A hash of the content and the description of the whole data set, without its index."""
        # Keys that older manifests do not have are left out while they are empty, so that their digests stay.
        return digest([self.model_dump(mode="json", exclude={"columns", *([] if self.versions else ["versions"])})])


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
        if storage.is_local(folder) and not Path(folder).is_dir():
            if Path(folder).exists():
                raise DataError(f"{folder}: is a file; name a folder of shards that `{made_by}` made")
            raise DataError(f"{folder}: no such folder; make the shards with `{made_by}` first")
        if storage.exists(storage.join(folder, RECIPE)):
            raise DataError(f"{folder}: the shards are not complete; run the same `{made_by}` again to finish them")
        raise DataError(f"{folder}: no {MANIFEST} there; make the shards with `{made_by}` first")
    content = storage.read_json(path)
    if kind and isinstance(content, dict) and content.get("kind") != kind:
        held = _ONE.get(str(content.get("kind")), "other")
        raise DataError(f"{path}: holds {held} shards, {_ONE[kind]} ones are needed; make them with `{made_by}`")
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
    recipe = storage.as_stored(recipe)
    if names and not names & {RECIPE, MANIFEST}:
        raise ConfigError(f"{folder}: holds something else than files of lfm; choose another folder")
    if names and not overwrite:
        before, is_damaged = _recipe_before(folder, names)
        if before is not None and (changed := _changes(before, recipe)):
            raise ConfigError(
                f"{folder}: was made with different settings: {changed}; choose another folder or `overwrite`"
            )
        if not is_damaged:
            return
        if before is not None:
            return storage.write_json(path, recipe, sealed=True)
        if RECIPE not in names:
            raise ConfigError(f"{folder}: holds something else than files of lfm; choose another folder")
        if not all(re.fullmatch(owned, name) for name in names):
            raise ConfigError(f"{path}: damaged, beside files that are not of lfm; choose another folder")
        logger.warning("%s: damaged, and no manifest confirms what it was; making all shards again", path)
    for name in sorted(names, key=lambda name: name != MANIFEST):
        if re.fullmatch(owned, name):
            storage.remove(storage.join(folder, name))
    storage.write_json(path, recipe, sealed=True)


def _recipe_before(folder: str, names: set[str]) -> tuple[dict[str, Any] | None, bool]:
    """Return the recipe of an earlier run, from the manifest if its file is damaged, and whether that is so.

    Raises:
        ConfigError: the file is JSON, but no recipe.
    """
    path = storage.join(folder, RECIPE)
    if RECIPE in names:
        with contextlib.suppress(DataError):
            before = storage.read_json(path)
            if not isinstance(before, dict):
                raise ConfigError(f"{path}: is no recipe of lfm; choose another folder")
            return before, False
    if MANIFEST in names:
        with contextlib.suppress(DataError):
            return load(folder).recipe, True
    return None, True


def _changes(before: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Describe the differences between two recipes; empty if they are equal."""
    missing = object()
    return ", ".join(
        f"{key} ({_short(before.get(key))}, now {_short(recipe.get(key))})"
        for key in sorted({*before, *recipe})
        if before.get(key, missing) != recipe.get(key, missing)
    )


def commit(folder: str, record: ShardRecord) -> None:
    """Write the record of a finished shard, which marks it as done."""
    storage.write_json(storage.join(folder, _record_name(record.name)), record.model_dump(mode="json"), sealed=True)


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
    threads = 1 if storage.is_local(folder) else 16
    return tuple(map_ahead(lambda shard: _read_record(folder, shard, sizes.get(shard)), shards, threads))


def _read_record(folder: str, shard: str, size: int | None) -> ShardRecord:
    path = storage.join(folder, _record_name(shard))
    record = _parse(ShardRecord, path, storage.read_json(path))
    if (record.name, record.bytes) != (shard, size):
        raise DataError(
            f"{storage.join(folder, shard)}: {size} bytes, its record is of {record.name} and {record.bytes}; run the same "
            "command to make it again"
        )
    return record


def discard_damaged(
    folder: str, fits: Callable[[ShardRecord], bool] = lambda record: True, untouched: Collection[str] = ()
) -> None:
    """Remove the records that are damaged or do not fit their tars, so that these shards are made again.

    Other files of the folder are left alone.

    Args:
        fits: whether a record can be that of its shard in this data set.
        untouched: names of shards that are left alone.
    """
    sizes = {name: size for name, size in storage.sizes(folder).items() if re.fullmatch(SHARD_FILES, name)}

    def discard(shard: str) -> None:
        try:
            if not fits(_read_record(folder, shard, sizes[shard])):
                raise DataError(f"{storage.join(folder, _record_name(shard))}: its counts are not those of the shard")
        except DataError as error:
            logger.warning("%s: making the shard again", str(error).split(";")[0])
            storage.remove(storage.join(folder, _record_name(shard)))

    shards = [name for name in sizes if name.endswith(".tar") and _record_name(name) in sizes and name not in untouched]
    for _ in map_ahead(discard, shards, threads=1 if storage.is_local(folder) else 16):
        pass


def publish(folder: str, manifest: Manifest) -> None:
    """Write the manifest, which marks the data set as complete."""
    storage.sweep(folder)
    optional = {name for name in ("columns", "versions") if not getattr(manifest, name)}  # older manifests lack them
    content = manifest.model_dump(mode="json", exclude=optional)
    if manifest.columns and manifest.columns.file == INDEX:
        del content["columns"]["file"]
    storage.write_json(storage.join(folder, MANIFEST), content, sealed=True)


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
