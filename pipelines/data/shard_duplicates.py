"""Near duplicates among the images of `lfm shard`: every image is hashed before any is packed.

    DEST/.work/hashes-RECIPE-000003.npy   the hashes of the images of a shard, kept until the set is complete
    DEST/near_duplicates.json             the images that are near duplicates, each with the earlier one that it is near to

Which image is earlier is decided by the order of the source, so the result is the same for any number of processes and parts.
Parts share the work: each begins with the images of its own shards, and reads the hashes that another one has written.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import NEAR_DUPLICATES
from lfm.data.near_duplicates import (
    HASHED_SIZE,
    MOST_BITS,
    NO_IMAGE,
    NearDuplicate,
    near_duplicates,
    perceptual_hash,
)
from lfm.data.sources.names import storable
from lfm.data.sources.source import About, Source
from lfm.data.transforms import Rejected, crop
from lfm.errors import StorageError, printable
from pipelines.common import image_files
from pipelines.common.processes import map_processes
from pipelines.common.progress import Progress
from pipelines.data.shard_claims import WORK

NUM_LISTED, NUM_SHOWN = 5, 16  # pairs in the report and on the sheet
TILE = 96  # pixels of an image on the sheet


@dataclass(frozen=True)
class HashJob:
    """The images of one shard."""

    source: Source  # its items are those of the shard
    crop: str
    required_fields: frozenset[str]  # of each item: those without one are rejected, and no image is near to them
    path: str | None  # of the file for the hashes; None writes none


def find_near_duplicates(
    source: Source,
    parts: Sequence[Sequence[int]],
    rule: str,
    required_fields: frozenset[str],
    dest: str | None,
    own: slice,
    workers: int,
) -> list[NearDuplicate]:
    """Return the near duplicates of earlier images, by their numbers in the source.

    Args:
        parts: the numbers of the images of each shard.
        rule: by which images are cropped, of `CROPS`.
        required_fields: of each item; those without one of them are left out.
        dest: folder whose hidden files share the hashes with other processes; None writes nothing.
        own: the shards to begin with.
        workers: number of processes.
    """
    items = [tuple(source.items[index] for index in part) for part in parts]
    paths: list[str | None] = [None] * len(parts)
    if dest is not None:
        name = manifests.digest([rule, *([[item.image for item in part] for part in items])])[:16]
        paths = [storage.join(dest, WORK, f"hashes-{name}-{number:06d}.npy") for number in range(len(parts))]
    numbers = list(range(len(parts)))
    ordered = [*numbers[own], *numbers[: own.start], *numbers[own.stop :]]
    hashes = np.tile(NO_IMAGE, (len(source.items), 1))
    jobs = []
    for number in ordered:
        of_shard = replace(source, items=items[number], about=About())
        jobs.append((number, HashJob(of_shard, rule, required_fields, paths[number])))
    with Progress("hash", len(source.items), "images") as progress:
        for number, of_part in map_processes(_run, jobs, workers):
            hashes[np.array(parts[number], np.int64)] = of_part
            progress.advance(len(of_part))
    return near_duplicates(hashes)


def _run(job: tuple[int, HashJob]) -> tuple[int, np.ndarray]:
    return job[0], _hash_images(job[1])


def _hash_images(job: HashJob) -> np.ndarray:
    """Return the hashes of a job's images, uint64 (images, 2), from its file if there is a whole one; else write it."""
    if job.path is not None and storage.exists(job.path):
        before = _load(job.path)
        if before is not None and before.shape == (len(job.source.items), 2):
            return before
    hashes = np.tile(NO_IMAGE, (len(job.source.items), 1))
    for row, item in enumerate(job.source.items):
        if any(getattr(item, name) is None for name in job.required_fields):
            continue
        try:
            image = crop(job.source.decode_item(item).image, HASHED_SIZE, job.crop)
        except Rejected:
            continue  # also when it is packed, with its reason
        hashes[row] = perceptual_hash(image)
    if job.path is not None:
        buffer = io.BytesIO()
        np.save(buffer, hashes)
        storage.write_bytes(job.path, buffer.getvalue(), flush=False)
    return hashes


def _load(path: str) -> np.ndarray | None:
    try:
        hashes = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except (ValueError, EOFError, OSError, StorageError):
        return None
    return hashes if hashes.dtype == np.uint64 else None


def describe_near_duplicates(source: Source, copies: list[NearDuplicate]) -> str:
    """Return the number of near duplicates and the first of them, as a line of the plan."""
    text = f"{len(copies):,} of {len(source.items):,} images, at most {MOST_BITS} of 64 bits from an earlier one"
    shown = [
        f"{_name(source, each.image)} like {_name(source, each.earlier)} ({each.bits})" for each in copies[:NUM_LISTED]
    ]
    more = f" and {len(copies) - NUM_LISTED:,} more" if len(copies) > NUM_LISTED else ""
    return f"  {'copies':<11}{printable(text + (': ' + ', '.join(shown) + more if shown else ''))}"


def write_report(dest: str, source: Source, copies: list[NearDuplicate]) -> None:
    """Write the list of near duplicates into the folder of the shards."""
    pairs = [
        {"image": _name(source, each.image), "earlier": _name(source, each.earlier), "bits": each.bits}
        for each in copies
    ]
    storage.write_json(storage.join(dest, NEAR_DUPLICATES), {"images": len(source.items), "near_duplicates": pairs})


def sheet_name(sheet: str) -> str:
    """Return the file for the sheet of near duplicates, beside that of the plan."""
    stem, dot, suffix = sheet.rpartition(".")
    return f"{stem}-near-duplicates.{suffix}" if dot and "/" not in suffix else f"{sheet}-near-duplicates.png"


def save_pairs(source: Source, copies: list[NearDuplicate], rule: str, path: str) -> None:
    """Write a sheet of the first near duplicates, each beside the earlier image."""
    if not copies:
        return
    tiles = [
        np.concatenate([_tile(source, each.earlier, rule), _tile(source, each.image, rule)], axis=1)
        for each in copies[:NUM_SHOWN]
    ]
    image_files.save(image_files.grid(np.stack(tiles)), path)


def _tile(source: Source, index: int, rule: str) -> np.ndarray:
    return crop(source.decode_item(source.items[index]).image, TILE, rule)


def _name(source: Source, index: int) -> str:
    return storable(source.items[index].image)
