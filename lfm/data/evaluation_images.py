"""Images to evaluate: raw shards, or a folder of files, in blocks that processes can read independently."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import Manifest
from lfm.data.raw_shards import read_raw
from lfm.data.sources.names import SUFFIXES
from lfm.data.transforms import Rejected, crop, decode
from lfm.errors import ConfigError, DataError, StorageError
from lfm.storage.cache import Cache
from lfm.types import RawSample

FILES_PER_BLOCK = 1000
SAMPLES = "samples.json"  # lists the images in a folder of `lfm sample`


class ImageSet(Protocol):
    """Images of one size in blocks."""

    @property
    def name(self) -> str:
        """Its path or URL."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""

    @property
    def rule(self) -> str | None:
        """The rule by which the images were resized and cropped; None if it is unknown."""

    @property
    def stored(self) -> str:
        """The file formats they were read from."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Which of mask and segmentation every image has."""

    @property
    def digest(self) -> str:
        """A hash of the content."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The number of images in each block."""

    def read(self, block: int) -> Iterator[RawSample]:
        """Yield the images of a block in order.

        Raises:
            DataError, StorageError: an image cannot be read.
        """


@dataclass(frozen=True)
class ShardedImages:
    """The images of raw shards; a shard is a block."""

    name: str
    manifest: Manifest
    cache: Cache

    @property
    def image_size(self) -> int:
        return self.manifest.image_size

    @property
    def rule(self) -> str | None:
        return self.manifest.recipe.get("crop")

    @property
    def stored(self) -> str:
        return self.manifest.recipe.get("image_format", "")

    @property
    def fields(self) -> tuple[str, ...]:
        return self.manifest.fields

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.manifest.shards)

    def read(self, block: int) -> Iterator[RawSample]:
        shard = self.manifest.shards[block]
        path = storage.join(self.name, shard.name)
        with self.cache.open(path, shard.bytes, shard.crc32) as stream:
            yield from read_raw(stream, path)


@dataclass(frozen=True)
class FolderImages:
    """The image files below a folder; the key of an image is its name without suffix.

    With a rule, the images are resized and cropped by it; without one, they must have the image size.
    """

    name: str
    files: tuple[str, ...]
    image_size: int
    rule: str | None
    fields: tuple[str, ...] = ()

    @property
    def stored(self) -> str:
        return ", ".join(sorted({name.rpartition(".")[2].lower() for name in self.files}))

    @cached_property
    def digest(self) -> str:
        sha256 = hashlib.sha256()
        for name in self.files:
            sha256.update(name.encode() + hashlib.sha256(storage.read_bytes(storage.join(self.name, name))).digest())
        return sha256.hexdigest()

    @property
    def blocks(self) -> tuple[int, ...]:
        return blocks_of(len(self.files))

    @cached_property
    def by_key(self) -> dict[str, str]:
        """The file of each key.

        Raises:
            DataError: two files have the same key.
        """
        files: dict[str, str] = {}
        for name in self.files:
            other = files.setdefault(_key(name), name)
            if other != name:
                raise DataError(f"{self.name}: {other} and {name} differ in their suffix alone; remove one of them")
        return files

    def read(self, block: int) -> Iterator[RawSample]:
        for name in self.files[block * FILES_PER_BLOCK : (block + 1) * FILES_PER_BLOCK]:
            yield self.image(name)

    def image(self, name: str) -> RawSample:
        """Read one of the files.

        Raises:
            DataError: it is no image, or of another size.
        """
        path = storage.join(self.name, name)
        try:
            image = decode(storage.read_bytes(path))
            pixels = crop(image, self.image_size, self.rule) if self.rule else np.asarray(image)
        except Rejected as error:
            raise DataError(f"{path}: {error}; repair or remove it") from error
        if pixels.shape != (self.image_size, self.image_size, 3):
            raise DataError(
                f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, others {self.image_size} x {self.image_size}; "
                "shard them first, or set `image_size` if they are real images"
            )
        return RawSample(_key(name), pixels)


def _key(name: str) -> str:
    return name.rpartition(".")[0]


def blocks_of(total: int) -> tuple[int, ...]:
    """Return the number of images in each block of `total` images."""
    return tuple(min(FILES_PER_BLOCK, total - start) for start in range(0, total, FILES_PER_BLOCK))


def open_images(
    path: str, cache: Cache, *, image_size: int | None = None, rule: str | None = None
) -> ShardedImages | FolderImages:
    """Open raw shards, a folder of image files, or the images of a folder of `lfm sample`.

    Args:
        image_size, rule: resize and crop the files of a folder to this size by this rule; not for shards.

    Raises:
        ConfigError: a size was given for shards.
        DataError, StorageError: there are no images, or shards are not complete.
    """
    if storage.exists(storage.join(path, manifests.RECIPE)) or storage.exists(storage.join(path, manifests.MANIFEST)):
        if image_size is not None:
            raise ConfigError(
                f"`image_size` {image_size}: {path} holds shards, whose images have one size; leave it out"
            )
        return ShardedImages(path, manifests.load(path, "raw"), cache)
    if storage.exists(storage.join(path, "weights.safetensors")):
        raise DataError(f"{path}: is a run, and holds no images to compare; name a folder of images, or of raw shards")
    if storage.exists(record := storage.join(path, SAMPLES)):
        names = _listed_images(record)
    else:
        names = [name for name in storage.find(path) if name.lower().endswith(SUFFIXES)]
    if not names:
        raise DataError(f"{path}: no images there; name a folder of images, or of raw shards")
    files = tuple(sorted(names))
    if image_size is not None:
        return FolderImages(path, files, image_size, rule)
    try:
        first = decode(storage.read_bytes(storage.join(path, files[0])))
    except Rejected as error:
        raise DataError(f"{storage.join(path, files[0])}: {error}; repair or remove it") from error
    return FolderImages(path, files, first.height, None)


def _listed_images(record: str) -> list[str]:
    """Return the files that the record of `lfm sample` lists, all of them in its own folder."""
    try:
        names = [entry["file"] for entry in storage.read_json(record).get("pictures", ())]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{record}: is not the record of `lfm sample`; remove it, or sample again") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise DataError(f"{record}: {name!r} is not the name of an image in its folder")
    return names


def pick(images: ImageSet, rows: Sequence[int]) -> list[np.ndarray]:
    """Return the images uint8 (H, W, 3) at `rows` in the order of the whole set, reading only their blocks."""
    wanted, start = set(rows), 0
    pixels: dict[int, np.ndarray] = {}
    for block, count in enumerate(images.blocks):
        if any(start <= row < start + count for row in wanted):
            for row, sample in enumerate(images.read(block), start):
                if row in wanted:
                    pixels[row] = sample.image
        start += count
    if missing := wanted - set(pixels):
        raise StorageError(f"{images.name}: has no image number {min(missing)}")
    return [pixels[row] for row in rows]
