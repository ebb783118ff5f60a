"""Layouts whose images lie in a few large files: LMDB, tars, tables."""

from __future__ import annotations

import json
import re
from typing import Any

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.source import SUFFIXES, Source, Tree, of_split
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem


def environments(tree: Tree) -> list[str]:
    """The folders of the LMDBs, relative to the tree's root."""
    return [name[: -len("/data.mdb")] for name in tree.names if f"/{name}".endswith("/data.mdb")]


def lmdb(tree: Tree, split: str | None, pattern: str) -> Source:
    """An LMDB of images, raw RGB or encoded; its keys are what tells the layouts apart."""
    found = of_split(tree, environments(tree), split)
    if len(found) != 1:
        raise ConfigError(f"{tree.root}: holds {len(found)} LMDBs ({', '.join(found[:4])}); name the folder of one")
    root = storage.join(tree.root, found[0]) if found[0] else tree.root
    keys = list(readers.lmdb_keys(root))
    if "__len__" in keys or "__keys__" in keys:
        raise DataError(
            f"{root}: is an LMDB of torchtoolbox, whose values only the pyarrow that wrote them can read; give lfm the "
            "images that it was made from"
        )
    if not keys or (strange := [key for key in keys if not re.fullmatch(pattern, key)]):
        raise DataError(f"{root}: {f'its key {strange[0]!r} is not of this layout' if keys else 'holds no images'}")
    return Source(root, tuple(map(SourceItem, keys)), read=readers.lmdb_value)


def webdataset(tree: Tree, split: str | None) -> Source:
    """Tars of others: a sample's image, its .cls, .seg.png and .mask.png."""
    items = []
    for tar in of_split(tree, [name for name in tree.names if name.endswith(".tar")], split):
        for sample in readers.tar_samples(tree.root, tar):
            nowhere = f"{tar}#{readers.NOWHERE}#{sample['__key__']}"
            image = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), nowhere)
            label = sample.get("cls", "")
            if "cls" in sample and not label.isdecimal():
                raise DataError(f"{tree.root}/{tar}: sample {sample['__key__']}: class {label[:20]!r} is no number")
            index = int(label) if label else None
            items.append(SourceItem(image, index, sample.get("seg.png"), sample.get("mask.png")))
    return _source(tree, items, readers.tar_member)


def hf(tree: Tree, split: str | None) -> Source:
    """A Hugging Face data set: parquet files, or what save_to_disk wrote."""
    items, class_names = [], ()
    tables = [name for name in tree.names if re.search(r"(^|/)(?!cache-)[^/]*\.(parquet|arrow)$", name)]
    for name in of_split(tree, tables, split):
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
                known = class_index is not None and class_index >= 0  # -1 is Hugging Face's word for no label
                items.append(SourceItem(cell["image"], class_index if known else None, cell.get("segmentation"),
                                        cell.get("mask")))  # fmt: skip
    return _source(tree, items, readers.table_cell, class_names)


def _columns(path: str, schema: Any) -> dict[str, str]:
    """Which columns are the image, its map, its mask and its label: by name, where the type fits."""
    words = {"image": "image img jpg png image", "segmentation": "annotation segmentation seg map label",
             "mask": "mask", "label": "label labels class cls fine_label"}  # fmt: skip
    types = {entry.name: str(entry.type) for entry in schema}
    found: dict[str, str] = {}
    for part, names in words.items():
        fits = [name for name in names.split() if name in types and ("int" in types[name]) == (part == "label")]
        found |= {part: fits[0]} if fits else {}
    if "image" not in found:
        raise DataError(f"{path}: no column `image` there, but {', '.join(types)}; rename the one with the images")
    return found


def _source(tree: Tree, items: list[SourceItem], read: Any, class_names: tuple[str, ...] = ()) -> Source:
    """The source of these items, whose classes are numbers where they have no names."""
    if not items:
        raise DataError(f"{tree.root}: no images in it; name the folder that holds them")
    largest = max((item.class_index for item in items if item.class_index is not None), default=-1)
    names = (*class_names, *map(str, range(len(class_names), largest + 1)))
    return Source(tree.root, tuple(items), names, read=read)
