"""Image collections as people have them: a source is a list of items and the store that reads them.

What the items are is a pure function of the collection's file names (of its keys or rows, where it is a data base), so
every process that reads the source sees the same list.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data.sources import readers
from lfm.data.transforms import Rejected, decode, decode_ids, decode_mask, paint
from lfm.errors import ConfigError, DataError, StorageError
from lfm.types import SourceItem

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SPLIT = re.compile(r"(train|training|val|valid|validation|test)(20\d\d)?", re.IGNORECASE)
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class DecodedItem:
    """What there is of one item, at its original size."""

    image: Image.Image  # RGB
    segmentation: np.ndarray | None  # uint8 or uint16 (H, W), class ids
    mask: Image.Image | None  # mode L, white = hole


@dataclass(frozen=True)
class Source:
    """The items of one source in the order of their names; a plain value, so that any process can read from it."""

    root: str
    items: tuple[SourceItem, ...]
    class_names: tuple[str, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)  # class ids that maps may hold, by name; empty: any
    layout: str = "folder"
    read: Callable[[str, str], bytes | np.ndarray] = readers.file

    def decode_item(self, item: SourceItem) -> DecodedItem:
        """Read and decode one item.

        Raises:
            Rejected: something of it cannot be used; a reason that concerns its map or mask begins with that word.
        """
        with _about(""):
            image = decode(self.read(self.root, item.image))
        ids, mask = None, None
        with _about("map "):
            if isinstance(item.segmentation, tuple):
                ids = paint((class_id, self._bytes(name)) for class_id, name in item.segmentation)
                if ids.shape[1] * image.height != ids.shape[0] * image.width:
                    raise Rejected("of another shape", _sizes(ids.shape[::-1], image.size))
            elif item.segmentation is not None:
                ids = decode_ids(self._bytes(item.segmentation))
                if ids.shape[::-1] != image.size:
                    raise Rejected("of another size", _sizes(ids.shape[::-1], image.size))
            if ids is not None and self.labels and (unknown := sorted(set(np.unique(ids).tolist()) - set(self.labels))):
                raise Rejected("with unknown ids", ", ".join(map(str, unknown[:5])))
        with _about("mask "):
            if item.mask is not None:
                mask = decode_mask(self._bytes(item.mask))
                if mask.size != image.size:
                    raise Rejected("of another size", _sizes(mask.size, image.size))
        return DecodedItem(image, ids, mask)

    @cached_property
    def fields(self) -> set[Literal["mask", "segmentation"]]:
        """What images of it have beside their class: `mask`, `segmentation`."""
        return {
            name for name in ("mask", "segmentation") if any(getattr(item, name) is not None for item in self.items)
        }

    @property
    def unlabelled(self) -> int:
        """The class id around a padded map."""
        return unlabelled(self.labels)

    def _bytes(self, name: str) -> bytes:
        content = self.read(self.root, name)
        if not isinstance(content, bytes):
            raise Rejected("not an image", f"{name}: raw pixels")
        return content


def unlabelled(labels: dict[int, str]) -> int:
    """The class id that stands for no class, else 0."""
    return next((class_id for class_id, name in labels.items() if name == UNLABELLED), 0)


@contextlib.contextmanager
def _about(part: str) -> Iterator[None]:
    try:
        yield
    except Rejected as error:
        raise Rejected(f"{part}{error.reason}", error.detail) from error
    except StorageError as error:
        raise Rejected(f"{part}unreadable", str(error)) from error


def _sizes(found: tuple[int, ...], wanted: tuple[int, int]) -> str:
    return f"{found[0]} x {found[1]} pixels, the image {wanted[0]} x {wanted[1]}"


@dataclass(frozen=True)
class Tree:
    """The files of a folder, listed once: names relative to `root`, sorted."""

    root: str
    names: tuple[str, ...]

    def at(self, folder: str) -> Tree:
        """The part of the tree below a folder; the tree itself for "".

        Raises:
            StorageError: there is nothing.
        """
        if not folder:
            return self
        names = tuple(name[len(folder) + 1 :] for name in self.names if name.startswith(f"{folder}/"))
        if not names:
            raise StorageError(f"{storage.join(self.root, folder)}: no such folder")
        return Tree(storage.join(self.root, folder), names)

    def has(self, pattern: str) -> bool:
        """Whether a regular expression occurs in a name."""
        return any(map(re.compile(pattern).search, self.names))

    def holds(self, folder: str) -> bool:
        """Whether there is an image below a folder."""
        return any(name.startswith(f"{folder}/") for name in self.images)

    @cached_property
    def images(self) -> list[str]:
        """The names of the images."""
        return [name for name in self.names if name.lower().endswith(SUFFIXES)]


def choose_split(root: str, splits: set[str], split: str | None) -> str:
    """The chosen one of a source's splits; its only one where none was chosen.

    Raises:
        ConfigError: there are several, or others.
    """
    if split in splits or (split is None and len(splits) == 1):
        return split or min(splits)
    raise ConfigError(f"{root}: holds the splits {', '.join(sorted(splits))}; choose one, as in --split {min(splits)}")


def of_split(tree: Tree, names: list[str], split: str | None) -> list[str]:
    """Those of some files whose path has the split as a word, as in val-00000.parquet or train.lmdb/data.mdb.

    Raises:
        ConfigError: there are several splits and none was chosen, or the chosen one is not there.
    """
    words = {name: set(re.split(r"[/._-]", name)) for name in names}
    splits = {word for found in words.values() for word in found if SPLIT.fullmatch(word)}
    if split is None:
        if splits:
            choose_split(tree.root, splits, split)
        return names
    if not (chosen := [name for name in names if split in words[name]]):
        raise ConfigError(f"{tree.root}: no split {split} there; {', '.join(sorted(splits)) or 'it has none'}")
    return chosen


def folder(tree: Tree, split: str | None) -> Source:
    """Images in folders: the first folder's name is the class; without folders there are no classes.

    Raises:
        ConfigError: the folder holds splits and none was chosen, or not the chosen one.
        DataError: there are no images, or some lie in class folders and some do not.
    """
    tree = tree.at(split or "")
    root, paths = tree.root, tree.images
    if not paths:
        raise DataError(f"{root}: no images there ({', '.join(SUFFIXES[:4])}, ...); name the folder that holds them")
    tops = {path.split("/")[0] for path in paths if "/" in path}
    if not tops:
        return Source(root, tuple(SourceItem(path) for path in paths))
    loose = [path for path in paths if "/" not in path]
    if not split and not loose and all(map(SPLIT.fullmatch, tops)):
        return folder(tree, choose_split(root, tops, split))
    if loose:
        raise DataError(
            f"{storage.join(root, loose[0])}: lies beside the class folders; move it into one, or leave it out"
        )
    class_names = tuple(sorted(tops))
    index = {name: number for number, name in enumerate(class_names)}
    return Source(root, tuple(SourceItem(path, index[path.split("/")[0]]) for path in paths), class_names)
