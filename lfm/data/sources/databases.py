"""Layouts whose images lie in a few large files: LMDB, LSUN, tars of webdataset, tables of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.source import SUFFIXES, Layout, Source, Tree, files_of_split
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

_NUMBER_KEY = r"\d+"
_HASH_KEY = r"[0-9a-f]{40}"  # LSUN
# The names of columns that hold each part of a sample, the preferred one first.
_COLUMNS = {
    "image": ("image", "img", "jpg", "png"),
    "segmentation": ("annotation", "segmentation", "seg", "map", "label"),
    "mask": ("mask",),
    "label": ("label", "labels", "class", "cls", "fine_label"),
}


def _environments(tree: Tree) -> list[str]:
    """Return the folders of the LMDBs, relative to the tree's root."""
    return [name[: -len("/data.mdb")] for name in tree.names if f"/{name}".endswith("/data.mdb")]


def read_lmdb(tree: Tree, split: str | None, key_pattern: str) -> Source:
    """Read an LMDB of images, raw RGB or encoded; the layouts differ in their keys."""
    environments = files_of_split(tree, _environments(tree), split)
    if len(environments) != 1:
        names = ", ".join(environments[:4])
        raise ConfigError(f"{tree.root}: holds {len(environments)} LMDBs ({names}); name the folder of one")
    root = storage.join(tree.root, environments[0]) if environments[0] else tree.root
    keys = list(readers.lmdb_keys(root))
    if "__len__" in keys or "__keys__" in keys:
        raise DataError(
            f"{root}: is an LMDB of torchtoolbox, whose values only the pyarrow that wrote them can read; give lfm the "
            "images that it was made from"
        )
    if not keys:
        raise DataError(f"{root}: holds no images")
    strange = next((key for key in keys if not re.fullmatch(key_pattern, key)), None)
    if strange is not None:
        raise DataError(f"{root}: its key {strange!r} is not of this layout")
    return Source(root, tuple(map(SourceItem, keys)), read=readers.lmdb_value)


def _has_keys(tree: Tree, key_pattern: str) -> bool:
    environments = _environments(tree)
    if not environments:
        return False
    root = storage.join(tree.root, environments[0]) if environments[0] else tree.root
    return re.fullmatch(key_pattern, next(readers.lmdb_keys(root), "")) is not None


def read_webdataset(tree: Tree, split: str | None) -> Source:
    """Read tars of webdataset: a sample's image, its .cls, .seg.png and .mask.png."""
    items = []
    for tar in files_of_split(tree, [name for name in tree.names if name.endswith(".tar")], split):
        for sample in readers.tar_samples(tree.root, tar):
            missing = f"{tar}#{readers.NOWHERE}#{sample['__key__']}"
            image = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), missing)
            label = sample.get("cls", "")
            if "cls" in sample and not label.isdecimal():
                raise DataError(f"{tree.root}/{tar}: sample {sample['__key__']}: class {label[:20]!r} is no number")
            index = int(label) if label else None
            items.append(SourceItem(image, index, sample.get("seg.png"), sample.get("mask.png")))
    return _source(tree, items, readers.tar_member)


def read_hugging_face(tree: Tree, split: str | None) -> Source:
    """Read a Hugging Face data set: parquet files, or the folder of `save_to_disk`."""
    items: list[SourceItem] = []
    class_names: tuple[str, ...] = ()
    tables = [name for name in tree.names if re.search(r"(^|/)(?!cache-)[^/]*\.(parquet|arrow)$", name)]
    for name in files_of_split(tree, tables, split):
        path = storage.join(tree.root, name)
        schema, groups = readers.table_schema(path)
        columns = _columns(path, schema)
        label = columns.pop("label", None)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        class_names = tuple(features.get(label, {}).get("names") or ())
        for group, rows in enumerate(groups):
            classes = readers.table_column(path, group, label).to_pylist() if label else [None] * rows
            for row, class_index in enumerate(classes):
                cell = {part: f"{name}#{group}#{row}#{column}" for part, column in columns.items()}
                if class_index is not None and class_index < 0:
                    class_index = None  # Hugging Face marks a sample without a label by -1
                items.append(SourceItem(cell["image"], class_index, cell.get("segmentation"), cell.get("mask")))
    return _source(tree, items, readers.table_cell, class_names)


def _columns(path: str, schema: Any) -> dict[str, str]:
    """Return the columns of the image, its map, its mask and its label: by name, if the type fits."""
    types = {entry.name: str(entry.type) for entry in schema}
    columns: dict[str, str] = {}
    for part, names in _COLUMNS.items():
        fitting = [name for name in names if name in types and ("int" in types[name]) == (part == "label")]
        if fitting:
            columns[part] = fitting[0]
    if "image" not in columns:
        raise DataError(f"{path}: no column is called image, only {', '.join(types)}; rename the one with the images")
    return columns


def _source(
    tree: Tree,
    items: list[SourceItem],
    read: Callable[[str, str], Any],
    class_names: tuple[str, ...] = (),
) -> Source:
    """Return the source of these items; classes without a name are called by their number."""
    if not items:
        raise DataError(f"{tree.root}: no images in it; name the folder that holds them")
    largest = max((item.class_index for item in items if item.class_index is not None), default=-1)
    names = (*class_names, *map(str, range(len(class_names), largest + 1)))
    return Source(tree.root, tuple(items), names, read=read)


LMDB = Layout(partial(read_lmdb, key_pattern=_NUMBER_KEY), lambda tree: _has_keys(tree, rf"(?!{_HASH_KEY}).*"))
LSUN = Layout(partial(read_lmdb, key_pattern=_HASH_KEY), lambda tree: _has_keys(tree, _HASH_KEY))
HUGGING_FACE = Layout(read_hugging_face, lambda tree: tree.has_name(r"\.(parquet|arrow)$"))
WEBDATASET = Layout(read_webdataset, lambda tree: tree.has_name(r"\.tar$"))
