"""What `lfm encode` adds to complete latents: those of the shards by which the raw shards have grown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import MANIFEST, Manifest
from lfm.data.versions import before_growth, digests
from lfm.errors import DataError

RAW = "raw"  # key of a recipe: digest of the version of the raw shards


@dataclass(frozen=True)
class LatentGrowth:
    """Complete latents, and what they grow from."""

    base: Manifest  # the version that grows
    published: Manifest  # the newest version: `base`, or what this growth has made of it


def find_growth(dest: str, raw: Manifest, recipe: dict[str, Any]) -> LatentGrowth | None:
    """Return how the latents in a folder grow; None if there are none that are complete, or the raw shards have not grown.

    Args:
        raw: newest version of the raw shards.
        recipe: of all of its latents.
    """
    if not storage.exists(storage.join(dest, MANIFEST)):
        return None
    try:
        published = manifests.load(dest, "latents")
    except DataError:  # is made again from the records of the shards, unless it has versions
        if raw.versions:
            raise
        return None
    recipe = storage.as_stored(recipe)
    if published.recipe == recipe:
        base = before_growth(published, dest)
        return LatentGrowth(base, published) if base else None
    if {**published.recipe, RAW: recipe[RAW]} == recipe and published.parent_digest in digests(raw)[:-1]:
        return LatentGrowth(published, published)
    return None
