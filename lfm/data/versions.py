"""The versions of a data set that has grown.

A data set grows by shards at its end, and the older shards stay as they are. So a version is the first shards of the newest
manifest, with what its own manifest held besides them. The digest of a version is that of the manifest which it had; it names
the version in the records of trainings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lfm.data.manifest import Manifest, VersionRecord
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


def _short(names: list[str]) -> str:
    return ", ".join(name[:12] for name in names)
