"""The samples that were dropped from a data set: a list beside its manifest, to which entries are added at the end.

Shards stay as they are. A training that begins or resumes leaves out the samples of all entries; its record states how many
entries there were, so that it can be repeated.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.columns.selection import Selection
from lfm.data.manifest import DROPPED, Manifest
from lfm.errors import DataError


class DroppedSample(BaseModel):
    """A sample by its key, and its place in the shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(pattern=r"^\d{12}$")
    shard: str = Field(pattern=r"^\d{6}\.tar$")
    row: Annotated[int, Field(ge=0, lt=10**6)]  # number of the sample in its shard


class Drop(BaseModel):
    """An entry of the list: samples that were dropped at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str = ""
    samples: tuple[DroppedSample, ...]


def load_drops(folder: str) -> tuple[Drop, ...]:
    """Return the entries of a data set's list, the oldest first; none without a list.

    Raises:
        DataError: the list is damaged.
    """
    path = storage.join(folder, DROPPED)
    if not storage.exists(path):
        return ()
    content = storage.read_json(path)
    try:
        return tuple(map(Drop.model_validate, content["drops"]))
    except (ValidationError, TypeError, KeyError) as error:
        raise DataError(f"{path}: is no list of dropped samples; was it made by another version of lfm?") from error


def add_drop(folder: str, drop: Drop) -> None:
    """Add an entry to a data set's list."""
    drops = [*load_drops(folder), drop]
    content: dict[str, Any] = {"drops": [entry.model_dump(mode="json") for entry in drops]}
    storage.write_json(storage.join(folder, DROPPED), content, sealed=True)


def take_over_drops(source: str, folder: str) -> None:
    """Add the entries of the list of raw shards that the list of their latents does not have, which hold the same samples."""
    own = load_drops(folder)
    for drop in load_drops(source):
        if drop not in own:
            add_drop(folder, drop)


def drops_digest(drops: tuple[Drop, ...]) -> str | None:
    """Return a hash of the samples of entries; None of no entries."""
    places = [[(sample.shard, sample.row) for sample in drop.samples] for drop in drops]
    return manifests.digest(places) if drops else None


def without_drops(
    selection: Selection | None, manifest: Manifest, drops: tuple[Drop, ...], folder: str
) -> Selection | None:
    """Return the samples of a data set that are selected and not dropped; None for all.

    Args:
        selection: of all shards of the manifest; None for all samples.

    Raises:
        DataError: an entry names a sample that there is not.
    """
    numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
    sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
    places: set[tuple[int, int]] = set()
    for sample in (sample for drop in drops for sample in drop.samples):
        number = numbers.get(sample.shard)
        if number is None:  # of a later version
            continue
        if sample.row >= sizes[number]:
            raise DataError(f"{storage.join(folder, DROPPED)}: there is no sample {sample.key} in {sample.shard}")
        places.add((number, sample.row))
    if not places:
        return selection
    everything = Selection.of_all(sizes) if selection is None else selection
    return everything.without(np.array(sorted(places), np.int64))
