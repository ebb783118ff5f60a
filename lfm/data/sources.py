"""Layouts of picture collections as people have them: a source becomes a list of items and a list of class names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lfm import storage
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
SPLITS = ("train", "training", "val", "valid", "validation", "test")


@dataclass(frozen=True)
class Source:
    """The pictures of one source, in sorted order; paths are relative to `root`."""

    root: str
    items: tuple[SourceItem, ...]
    class_names: tuple[str, ...] = ()


def folder(root: str, split: str | None = None) -> Source:
    """Pictures in folders: the first folder's name is the class; without folders there are no classes.

    Raises:
        ConfigError: the folder holds splits and none was chosen, or not the chosen one.
        DataError: there are no pictures, or some lie in class folders and some do not.
    """
    if split:
        root = storage.join(root, split)
    paths = [path for path in storage.find(root) if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise DataError(f"{root}: no pictures there ({', '.join(SUFFIXES[:4])}, ...); name the folder that holds them")
    tops = {path.split("/")[0] for path in paths if "/" in path}
    if not tops:
        return Source(root, tuple(SourceItem(path) for path in paths))
    if not split and {top.lower() for top in tops} <= set(SPLITS):
        raise ConfigError(f"{root}: holds the splits {', '.join(sorted(tops))}; choose one, as in --split {min(tops)}")
    if loose := [path for path in paths if "/" not in path]:
        raise DataError(
            f"{storage.join(root, loose[0])}: lies beside the class folders; move it into one, or leave it out"
        )
    class_names = tuple(sorted(tops))
    index = {name: number for number, name in enumerate(class_names)}
    return Source(root, tuple(SourceItem(path, index[path.split("/")[0]]) for path in paths), class_names)


LAYOUTS: dict[str, Callable[[str, str | None], Source]] = {"folder": folder}
