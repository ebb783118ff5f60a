"""What `lfm shard` adds to a complete data set: the images whose names and contents it does not have, as new shards.

The shards before say which images they hold, so the plan is a function of the source, as that of a new set is: any part can
make its shards at any time, and repeat. Until all are done, the manifest before stays in place.

    DEST/.work/contents-VERSION.npy    digests of the samples of the version that grows, sorted
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.columns.column_index import rows_by_shard
from lfm.data.manifest import MANIFEST, OWN_COLUMNS, RECIPE, Manifest, ShardRecord
from lfm.data.raw_shards import content_digest
from lfm.data.sources.names import storable
from lfm.data.sources.source import Source
from lfm.data.tar import read_tar
from lfm.data.versions import before_growth, begin_growth
from lfm.errors import ConfigError, DataError, StorageError
from lfm.storage.cache import Cache
from pipelines.data.shard_claims import WORK, clear_work
from pipelines.data.shard_columns import read_facts

KNOWN_CONTENT = "known content"  # reason of rejects that do not count against `max_rejected`
GROWN_FROM = "grown_from"  # in a recipe: digest of the version that grows
MAY_CHANGE = {"pictures", "source", "labels", GROWN_FROM}  # keys of a recipe


@dataclass(frozen=True)
class Growth:
    """A complete data set, and what a source adds to it."""

    dest: str
    base: Manifest  # the version that grows
    published: Manifest  # the newest version: `base`, or what this growth has made of it
    source: Source  # with the classes of the set before its own; the images that the set has come first
    num_known: int  # images of the source that the set has
    recipe: dict[str, Any]

    @property
    def new(self) -> range:
        """Numbers of the images in `source` that the set does not have."""
        return range(self.num_known, len(self.source.items))

    @property
    def first_shard(self) -> int:
        """Number of the first new shard."""
        return 1 + max((int(shard.name[:6]) for shard in self.base.shards), default=-1)

    @cached_property
    def contents(self) -> str:
        """Path of the file with the digests of the contents of all samples; written when it is first needed."""
        path = storage.join(self.dest, WORK, f"contents-{self.base.digest[:16]}.npy")
        if not storage.exists(path):
            digests = [digest for shard in self.base.shards for digest in _contents(self.dest, shard)]
            buffer = io.BytesIO()
            np.save(buffer, np.unique(np.array(digests, np.uint64)))
            storage.write_bytes(path, buffer.getvalue(), flush=False)
        return path


def find_growth(dest: str, source: Source, recipe_of: Callable[[Source], dict[str, Any]]) -> Growth | None:
    """Return what a source adds to the set in a folder; None if there is no complete set, or it does not grow.

    Args:
        recipe_of: returns the recipe of a new set of a source.

    Raises:
        ConfigError: the set has classes, masks or segmentations and the source has not, or the other way round.
        DataError: the manifest is damaged.
    """
    published = _published(dest)
    if published is None:
        return None
    merged = _with_classes_of(published, source)
    recipe = storage.as_stored(recipe_of(merged))
    keys = {key for key in {*published.recipe, *recipe} if published.recipe.get(key) != recipe.get(key)}
    if not keys or not keys <= MAY_CHANGE:
        return None
    is_made = keys == {GROWN_FROM}
    base = before_growth(published, dest) if is_made else published
    if base is None:
        return None
    _check_fits(dest, base, source, recipe)
    known = {reject.source for reject in base.rejects} | {
        name for rows in rows_of(dest, base) for name in rows["source"]
    }
    items = sorted(merged.items, key=lambda item: storable(item.image) not in known)  # stable
    num_known = sum(storable(item.image) in known for item in items)
    ordered = replace(merged, items=tuple(items))
    return Growth(dest, base, published, ordered, num_known, recipe | {GROWN_FROM: base.digest})


def give_up_growth(dest: str, recipe: dict[str, Any]) -> None:
    """Remove what an unfinished growth has made of the complete set of a recipe, whose source is again what it was."""
    published = _published(dest)
    is_of_recipe = published is not None and published.recipe == storage.as_stored(recipe)
    if published is not None and is_of_recipe and begin_growth(dest, published.recipe, published):
        clear_work(dest)


def _published(dest: str) -> Manifest | None:
    """Return the manifest of a set; None if there is none, or it is damaged and the set has never grown, so that it is renewed.

    Raises:
        DataError: it is damaged, and the set has grown.
    """
    if not storage.exists(storage.join(dest, MANIFEST)):
        return None
    try:
        return manifests.load(dest, "raw")
    except DataError:
        recipe: Any = None
        with contextlib.suppress(DataError, StorageError):
            recipe = storage.read_json(storage.join(dest, RECIPE))
        if isinstance(recipe, dict) and GROWN_FROM in recipe:
            raise
        return None


def _with_classes_of(manifest: Manifest, source: Source) -> Source:
    """Return a source whose classes are those of a set, and then its own others."""
    names = [entry.name for entry in manifest.classes]
    own = [storable(name) for name in source.class_names]
    merged = [*names, *(name for name in own if name not in names)]
    places = [merged.index(name) for name in own]
    if places == list(range(len(merged))):
        return source
    items = tuple(
        item if item.class_index is None else replace(item, class_index=places[item.class_index])
        for item in source.items
    )
    return replace(source, class_names=tuple(merged), items=items)


def _check_fits(dest: str, base: Manifest, source: Source, recipe: dict[str, Any]) -> None:
    ours = {*base.fields, *(["class"] if base.classes else [])}
    theirs = {*source.fields, *(["mask"] if recipe["masks"] else []), *(["class"] if source.class_names else [])}
    if ours != theirs:
        repair = "choose another folder" + (
            ", or `classes` none" if theirs - ours == {"class"} and ours <= theirs else ""
        )
        raise ConfigError(
            f"{dest}: its samples have {', '.join(sorted(ours)) or 'images only'}, and those of {source.root} have "
            f"{', '.join(sorted(theirs)) or 'images only'}; {repair}"
        )
    before, after = base.recipe.get("labels") or {}, recipe["labels"] or {}
    if changed := [
        key for key, name in before.items() if after.get(key) != name and name != key
    ]:  # a number is no name
        raise ConfigError(
            f"{dest}: label {changed[0]} of its segmentations is {before[changed[0]]}, and {after.get(changed[0])} in "
            f"{source.root}; choose another folder"
        )


def rows_of(dest: str, manifest: Manifest) -> Iterator[dict[str, list[Any]]]:
    """Yield the rows of each shard: those of the index, or without one what the samples themselves say of their images."""
    if manifest.columns is not None and OWN_COLUMNS.keys() <= manifest.columns.types.keys():
        yield from rows_by_shard(dest, manifest, Cache())
        return
    for shard in manifest.shards:
        rows: dict[str, list[Any]] = {name: [] for name in ("key", "class", "source", "width", "height")}
        for members in _members(dest, shard):
            try:
                metadata = json.loads(members["json"])
                class_index = int(members["cls"]) if "cls" in members else None
                values = (
                    members["__key__"],
                    None if class_index is None else manifest.classes[class_index].name,
                    str(metadata["source"]),
                    int(metadata["width"]),
                    int(metadata["height"]),
                )
            except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
                path = storage.join(dest, shard.name)
                raise DataError(
                    f"{path}: sample {members['__key__']} does not say what it is; make it again"
                ) from error
            for of_column, value in zip(rows.values(), values, strict=True):
                of_column.append(value)
        yield rows


def _contents(dest: str, shard: ShardRecord) -> list[int]:
    """Return the digests of the contents of a shard's samples: as they were noted, or read from the shard."""
    noted = read_facts(dest, shard)
    if noted is not None and "content" in noted:
        return noted["content"]
    return [content_digest(members) for members in _members(dest, shard)]


def _members(dest: str, shard: ShardRecord) -> Iterator[dict[str, Any]]:
    path = storage.join(dest, shard.name)
    with Cache().open(path, shard.bytes, shard.crc32) as stream:
        yield from read_tar(stream, path)


@lru_cache(maxsize=1)  # in each worker process
def known_contents(path: str) -> np.ndarray:
    """Return the sorted digests of a file of `Growth.contents`, uint64."""
    return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)


def is_known(path: str, content: int) -> bool:
    """Return whether a digest is one of those of a file."""
    known = known_contents(path)
    place = int(np.searchsorted(known, np.uint64(content)))
    return place < len(known) and int(known[place]) == content
