"""The versions of a data set that has grown.

A data set grows by shards at its end, and the older shards stay as they are. So a version is the first shards of the newest
manifest, with what its own manifest held besides them. The digest of a version is that of the manifest which it had; it names
the version in the records of trainings.
"""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lfm import storage
from lfm.data.manifest import RECIPE, Manifest, VersionRecord
from lfm.errors import DataError

Join = Literal["next_pass", "at_once"]
Count = Annotated[int, Field(ge=0, lt=2**63)]
_OF_VERSION = ("classes", "labels", "recipe", "parent_digest", "channel_mean", "channel_std")


class SourceState(BaseModel):
    """What a training reads of one data set: a version, without the samples that were dropped until then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str  # of the version
    num_samples: Count  # that are read in a pass over the version, held-back ones included
    num_drops: Count = 0  # first entries of the list of dropped samples that hold
    drops: str | None = None  # digest of these
    selected: str | None = None  # digest of what `where` selects in the version; None without it


class Segment(BaseModel):
    """What a training reads from one sample of the global order on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_sample: Count
    join: Join = "next_pass"  # how new samples join a pass that has begun
    sources: Annotated[tuple[SourceState, ...], Field(min_length=1)]


def with_version_before(manifest: Manifest, before: Manifest) -> Manifest:
    """Return the manifest of a data set that has grown from `before`, with the list of its versions.

    Raises:
        DataError: its first shards are others than those of `before`.
    """
    if manifest.shards[: len(before.shards)] != before.shards:
        raise DataError("a data set grows by shards at its end, and the shards before them are others")
    fields = {name: getattr(before, name) for name in _OF_VERSION}
    record = VersionRecord(num_shards=len(before.shards), digest=before.digest, **fields)
    return manifest.model_copy(update={"versions": (*before.versions, record)})


def digests(manifest: Manifest) -> list[str]:
    """Return the digests of all versions, the oldest first."""
    return [*(version.digest for version in manifest.versions), manifest.digest]


def at_version(manifest: Manifest, digest: str, folder: str) -> Manifest:
    """Return the manifest that the version of this digest had; its `columns` are those of the newest version.

    Raises:
        DataError: there is no such version, or its shards are not what they were; names `folder`.
    """
    if digest == manifest.digest:
        return manifest
    for number, version in enumerate(manifest.versions):
        if version.digest == digest:
            fields = {name: getattr(version, name) for name in _OF_VERSION}
            shards, before = manifest.shards[: version.num_shards], manifest.versions[:number]
            cut = manifest.model_copy(update={**fields, "shards": shards, "versions": before})
            if cut.digest != digest:
                raise DataError(
                    f"{folder}: the first {version.num_shards} shards are not those of version {digest[:12]}"
                )
            return cut
    raise DataError(f"{folder}: has no version {digest[:12]}; its versions are {_short(digests(manifest))}")


def before_growth(manifest: Manifest, folder: str) -> Manifest | None:
    """Return the version before that of a manifest, or None if the data set has not grown."""
    return at_version(manifest, manifest.versions[-1].digest, folder) if manifest.versions else None


def begin_growth(folder: str, recipe: dict[str, Any], published: Manifest) -> bool:
    """Begin or resume to let a complete data set grow by what `recipe` describes; its manifest stays in place until the end.

    Shards of another growth, which was not finished, are removed. Returns whether it begins.
    """
    path, recipe = storage.join(folder, RECIPE), storage.as_stored(recipe)
    names = storage.find(
        folder
    )  # before the recipe is read: what another process makes by this recipe is not among them
    if RECIPE in names:
        with contextlib.suppress(DataError):
            if storage.read_json(path) == recipe:
                return False
    published_names = {shard.name.removesuffix(".tar") for shard in published.shards}
    for name in sorted(names, key=lambda name: not name.endswith(".json")):  # a record says that its shard is done
        if re.fullmatch(r"\d{6}\.(tar|json|columns\.json)", name) and name.split(".")[0] not in published_names:
            storage.remove(storage.join(folder, name))
    storage.write_json(path, recipe, sealed=True)
    return True


def check_present(folder: str, manifest: Manifest) -> None:
    """Check that all shards of a data set that is to grow have the sizes of their records.

    Raises:
        DataError: one has not; names it.
    """
    sizes = storage.sizes(folder)
    for shard in manifest.shards:
        if sizes.get(shard.name) != shard.bytes:
            raise DataError(
                f"{storage.join(folder, shard.name)}: has {sizes.get(shard.name, 0):,} bytes, its record says {shard.bytes:,}; "
                "restore it, since a data set grows without making its shards again"
            )


def _short(names: list[str]) -> str:
    return ", ".join(name[:12] for name in names)
