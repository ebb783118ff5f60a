"""Image collections as a list of items and a function that reads them.

The items depend only on the collection's file names (or keys, or rows of tables), so every process that reads a source sees
the same list.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data.palettes import Colours
from lfm.data.sources import readers
from lfm.data.sources.map_rules import MapRule
from lfm.data.sources.names import SPLIT, SPLIT_LIKE, first_split, is_image, like_splits
from lfm.data.transforms import MaskValue, Rejected, decode, decode_mask, paint
from lfm.errors import ConfigError, DataError, StorageError
from lfm.types import SourceItem

UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Choices:
    """What the user has decided about a collection; the defaults leave it to the rules of the layouts.

    Attributes:
        classes: `folders` takes folders for classes, whatever their names, `inner-folders` the innermost ones; `none` leaves
            classes out.
        class_order: indices of classes follow their names as text, or as numbers.
        labels: path of a table of file names and labels.
        label_column: its column with labels, or that of a source's own table or JSON.
        mask_files, map_files: folder or end of the names of the masks and segmentations; `none` leaves them out.
        leave_out: paths in the collection that are no part of it, such as results.
    """

    classes: Literal["auto", "folders", "inner-folders", "none"] = "auto"
    class_order: Literal["name", "number"] = "name"
    labels: str | None = None
    label_column: str | None = None
    mask_files: str | None = None
    map_files: str | None = None
    leave_out: tuple[str, ...] = ()

    @property
    def names_files(self) -> bool:
        """Whether the user has named the masks or segmentations."""
        return any(choice not in (None, "none") for choice in (self.mask_files, self.map_files))


@dataclass
class About:
    """How a collection was understood, for the plan.

    Attributes:
        labels_from: where the classes come from.
        splits: the chosen split, and all that the collection has.
        other_splits: those that are not chosen.
        notes: further decisions, a sentence each.
        used: paths of files that were read beside images.
        unused: names of files that were left aside.
        colours: classes of the colours of segmentations, by a file of the collection.
    """

    labels_from: str = ""
    splits: str = ""
    other_splits: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)
    colours: Colours | None = None

    def note_split(self, chosen: str, splits: Iterable[str], where: str = "") -> None:
        """Note the chosen one of several splits, and where they are."""
        self.splits = f"{chosen} of {', '.join(sorted(splits))}{where}"
        self.other_splits = {*splits} - {chosen}


@dataclass(frozen=True)
class DecodedItem:
    """An item's image, segmentation and mask at their original size."""

    image: Image.Image  # RGB
    segmentation: np.ndarray | None  # uint8 or uint16 (H, W), class ids
    mask: Image.Image | None  # mode L, white = hole


@dataclass(frozen=True)
class Source:
    """The items of one source in the order of their names: a value that can be sent to worker processes."""

    root: str
    items: tuple[SourceItem, ...]
    class_names: tuple[str, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)  # names of the class ids that maps may hold; empty: any id
    layout: str = "folder"
    read: Callable[[str, str], bytes | np.ndarray] = readers.read_file
    maps: MapRule = field(default_factory=MapRule)
    mask_value: MaskValue = "white"
    about: About = field(default_factory=About, compare=False)

    def decode_item(self, item: SourceItem) -> DecodedItem:
        """Read and decode one item.

        Raises:
            Rejected: a part of it cannot be used; the reason begins with `map` or `mask` if it is that one.
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
                ids = self.maps.decode(self._bytes(item.segmentation))
                if ids.shape[::-1] != image.size:
                    raise Rejected("of another size", _sizes(ids.shape[::-1], image.size))
            known = self.labels or range(256)
            if ids is not None and (unknown := [label for label in np.unique(ids).tolist() if label not in known]):
                raise Rejected("with unknown ids", ", ".join(map(str, unknown[:5])))
        with _about("mask "):
            if item.mask is not None:
                mask = decode_mask(self._bytes(item.mask), self.mask_value)
                if mask.size != image.size:
                    raise Rejected("of another size", _sizes(mask.size, image.size))
        return DecodedItem(image, ids, mask)

    @cached_property
    def fields(self) -> set[Literal["mask", "segmentation"]]:
        """Which of `mask` and `segmentation` the items have."""
        return {
            name for name in ("mask", "segmentation") if any(getattr(item, name) is not None for item in self.items)
        }

    @property
    def unlabelled(self) -> int:
        """The class id of the border of a padded map."""
        return unlabelled(self.labels)

    def _bytes(self, name: str) -> bytes:
        content = self.read(self.root, name)
        if not isinstance(content, bytes):
            raise Rejected("not an image", f"{name}: raw pixels")
        return content


def unlabelled(labels: dict[int, str]) -> int:
    """Return the class id that stands for no class, or 0 if there is none."""
    return next((class_id for class_id, name in labels.items() if name == UNLABELLED), 0)


@contextlib.contextmanager
def _about(part: str) -> Iterator[None]:
    try:
        yield
    except Rejected as error:
        raise Rejected(f"{part}{error.reason}", error.detail) from error
    except StorageError as error:
        raise Rejected(f"{part}unreadable", str(error)) from error


def _sizes(part: tuple[int, ...], image: tuple[int, int]) -> str:
    return f"{part[0]} x {part[1]} pixels, the image {image[0]} x {image[1]}"


_CONTAINERS = (".tar", ".zip", ".parquet", ".arrow", ".mdb")


def _parts(item: SourceItem) -> Iterator[str]:
    """Yield the names of the files of an item."""
    yield item.image
    if item.mask is not None:
        yield item.mask
    if isinstance(item.segmentation, str):
        yield item.segmentation
    else:
        yield from (name for _, name in item.segmentation or ())


def _unreadable(tree: Tree, split: str | None) -> Source:
    raise DataError(f"{tree.root}: an archive in an archive; unpack it")


@dataclass(frozen=True)
class Tree:
    """The files of a folder or archive, listed once: names relative to `root`, sorted, without junk.

    Attributes:
        read: returns the content of a file, given the root and its name.
        hidden: names of images that are left out because they, or folders of theirs, begin with a dot.
        archive: path of the archive that holds the files; None for a folder.
        read_inner: reads the tree of an archive in this one.
    """

    root: str
    names: tuple[str, ...]
    choices: Choices = Choices()
    hidden: tuple[str, ...] = ()
    read: Callable[[str, str], bytes] = readers.read_file
    archive: str | None = None
    read_inner: Callable[[Tree, str | None], Source] = _unreadable
    about: About = field(default_factory=About, compare=False)

    @cached_property
    def images(self) -> list[str]:
        """The names of the images."""
        return [name for name in self.names if is_image(name)]

    @cached_property
    def top_folders(self) -> set[str]:
        """The folders directly in the root that hold images."""
        return {name.partition("/")[0] for name in self.images if "/" in name}

    def only(self, names: Iterable[str]) -> Tree:
        """Return the tree of some of the files."""
        return replace(self, names=tuple(names))

    def subtree(self, folder: str) -> Tree:
        """Return the tree of a folder; the tree itself for "".

        Raises:
            StorageError: the folder does not exist or is empty.
        """
        if not folder:
            return self
        names, hidden = (
            tuple(name[len(folder) + 1 :] for name in paths if name.startswith(f"{folder}/"))
            for paths in (self.names, self.hidden)
        )
        if not names:
            raise StorageError(f"{storage.join(self.root, folder)}: no such folder")
        return replace(self, root=storage.join(self.root, folder), names=names, hidden=hidden)

    def unused(self, source: Source) -> list[str]:
        """Return the files that a source does not use; a source that reads archives or databases uses all of them."""
        parts = {storage.join(source.root, name) for item in source.items for name in _parts(item)} | self.about.used
        containers = () if source.read is self.read else _CONTAINERS
        return [
            name
            for name in self.names
            if not name.lower().endswith(containers) and storage.join(self.root, name) not in parts
        ]

    def has_name(self, pattern: str) -> bool:
        """Return whether a regular expression occurs in a name."""
        return any(map(re.compile(pattern).search, self.names))

    def has_images(self, folder: str) -> bool:
        """Return whether there are images below a folder."""
        return any(name.startswith(f"{folder}/") for name in self.images)


@dataclass(frozen=True)
class Layout:
    """How a kind of collection is arranged in files: how to read it, and how to recognize it.

    Attributes:
        read: returns the source in a tree, given a split or None.
        recognizes: returns whether a tree has this layout.
        instead_of: names of the more general layouts that such a tree also has.
        sign: what it is recognized by, for the plan.
    """

    read: Callable[[Tree, str | None], Source]
    recognizes: Callable[[Tree], bool]
    instead_of: tuple[str, ...] = ()
    sign: str = ""


def read_text(tree: Tree, name: str, *, parents: int = 0) -> str | None:
    """Return the content of a text file in the tree's root or in one of its next parents; None if there is none."""
    if tree.archive:
        content = tree.read(tree.root, name) if name in tree.names else None
    else:
        content = None
        for root in _ancestors(tree.root, parents):
            if storage.exists(path := storage.join(root, name)):
                content = storage.read_bytes(path)
                break
    if content is None:
        return None
    tree.about.used.add(storage.join(tree.root, name))
    return content.decode("utf-8-sig", "replace")


def _ancestors(root: str, parents: int) -> Iterator[str]:
    for _ in range(parents + 1):
        yield root
        root = storage.parent(root)


def choose_split(tree: Tree, splits: Collection[str], split: str | None, where: str = "") -> str:
    """Return the chosen split, or a source's only one if none was chosen; notes it.

    Args:
        where: what to say of the place of the splits.

    Raises:
        ConfigError: there are several and none was chosen, or the chosen one does not exist.
    """
    chosen = _of_name(splits, split) if split else next(iter(splits)) if len(splits) == 1 else None
    if chosen is None:
        raise ConfigError(
            f"{tree.root}: holds the splits {', '.join(sorted(splits))}; choose one with `split`, for example "
            f"{first_split(splits)}"
        )
    tree.about.note_split(chosen, splits, where)
    return chosen


def split_folder(tree: Tree, split: str) -> Tree:
    """Return the tree of a folder that is a split, in any case if there is only one such.

    Raises:
        ConfigError: there is no such folder; names those that may be meant.
    """
    splits = [name for name in sorted(tree.top_folders) if SPLIT.fullmatch(name) or SPLIT_LIKE.fullmatch(name)]
    splits = splits or like_splits(tree.top_folders)
    folders = {name.partition("/")[0] for name in tree.names if "/" in name}
    chosen = split if split in folders else _of_name(splits, split)
    if chosen is None:
        repair = f"choose {' or '.join(splits[:4])}" if splits else "it has none; leave it out"
        raise ConfigError(f"{tree.root}: `split` {split}: no such split; {repair}")
    if splits:
        tree.about.note_split(chosen, {*splits, chosen})
    return tree.subtree(chosen)


def _of_name(splits: Collection[str], split: str) -> str | None:
    """Return the split of this name, or the only one of this name in another case."""
    same = [name for name in splits if name.lower() == split.lower()]
    return split if split in splits else same[0] if len(same) == 1 else None


def split_by_names(tree: Tree, names: list[str], split: str | None) -> tuple[list[str], str | None]:
    """Return the files whose path has the split as a word, as in val-00000.parquet or train.lmdb/data.mdb.

    Also returns the split that is still to be looked for in the files: `split` itself if their names say nothing of splits,
    as that of a single file with several such words.

    Raises:
        ConfigError: there are several splits and none was chosen, or the chosen one does not exist.
    """
    words = {name: set(re.split(r"[/._-]", name)) for name in names}
    known = {word for of_file in words.values() for word in of_file}
    splits = {word for word in known if SPLIT.fullmatch(word) or word == split}
    if not splits or (len(names) == 1 and len(splits) > 1):
        return names, split
    chosen = choose_split(tree, splits, split)
    return names if split is None else [name for name in names if chosen in words[name]], None


def files_of_split(tree: Tree, names: list[str], split: str | None) -> list[str]:
    """Return the files of a split, which only their names tell.

    Raises:
        ConfigError: there are several splits and none was chosen, or the chosen one does not exist.
    """
    names, rest = split_by_names(tree, names, split)
    if rest:
        raise ConfigError(f"{tree.root}: `split` {rest}: no such split; it has none; leave it out")
    return names
