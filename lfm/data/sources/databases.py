"""Layouts whose images lie in a few large files: LMDB, LSUN, tables of Hugging Face."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.labels import LABEL_KEYS, Label, as_label, classes, label_column, notes_on_indices
from lfm.data.sources.source import About, Choices, Layout, Source, Tree, files_of_split
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

_NUMBER_KEY = r"\d+"
_KEPT_TYPES = "u?int|half|float|double|bool|string|large_string|dictionary"  # of columns that samples keep
_HASH_KEY = r"[0-9a-f]{40}"  # LSUN
# The names of columns that hold each part of a sample, the preferred one first.
_COLUMNS = {
    "image": ("image", "img", "jpg", "png"),
    "segmentation": ("annotation", "segmentation", "seg", "map", "label"),
    "mask": ("mask",),
    "label": LABEL_KEYS,
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
    return Source(root, tuple(map(SourceItem, keys)), read=readers.lmdb_value, about=tree.about)


def _has_keys(tree: Tree, key_pattern: str) -> bool:
    environments = _environments(tree)
    if not environments:
        return False
    root = storage.join(tree.root, environments[0]) if environments[0] else tree.root
    return re.fullmatch(key_pattern, next(readers.lmdb_keys(root), "")) is not None


def read_hugging_face(tree: Tree, split: str | None) -> Source:
    """Read a Hugging Face data set: parquet files, or the folder of `save_to_disk`.

    Raises:
        ConfigError: a split must be chosen, or the chosen label column does not exist.
        DataError: a table cannot be read, has no images, or labels that are no classes.
    """
    items: list[SourceItem] = []
    labels: list[Label] = []
    class_names: tuple[str, ...] = ()
    tables = [name for name in tree.names if re.search(r"(^|/)(?!cache-)[^/]*\.(parquet|arrow)$", name)]
    label: str | None = None
    for number, name in enumerate(files_of_split(tree, tables, split)):
        path = storage.join(tree.root, name)
        schema, groups = readers.table_schema(path)
        about = tree.about if number == 0 else About()  # one note for all tables
        label = _label_column(schema, tree.choices, about, path)
        columns = _columns(path, schema, label, about)
        titles = [entry.name for entry in schema if re.match(_KEPT_TYPES, str(entry.type))]
        features = _features(schema).get(label, {}) if label else {}
        names_of_table = tuple(features.get("names") or ())
        if number and names_of_table != class_names:
            raise DataError(f"{path}: its names of classes differ from those of other tables; read them one by one")
        class_names = names_of_table
        for group, rows in enumerate(groups):
            values = readers.table_column(path, group, label).to_pylist() if label else [None] * rows
            others = [name for name in titles if name != label]
            cells = [readers.table_column(path, group, name).to_pylist() for name in others]
            by_title = dict(zip(others, cells, strict=True)) | ({label: values} if label else {})
            for row, value in enumerate(values):
                cell = {part: f"{name}#{group}#{row}#{column}" for part, column in columns.items()}
                labels.append(as_label(value, f"{path}: row {row}"))
                known = {title: cells_of[row] for title, cells_of in by_title.items()}
                items.append(SourceItem(cell["image"], None, cell.get("segmentation"), cell.get("mask"), known))
    if not items:
        raise DataError(f"{tree.root}: no images in it; name the folder that holds them")
    where = f"{tree.root}: column {label}"
    indices, names = classes(labels, tree.choices, where, names=class_names, keep_indices=True)
    tree.about.labels_from = f"column {label}" if names else ""
    tree.about.notes += notes_on_indices(indices, names)
    items = [replace(item, class_index=index) for item, index in zip(items, indices, strict=True)]
    return Source(tree.root, tuple(items), names, read=readers.table_cell, about=tree.about)


def _features(schema: Any) -> dict[str, Any]:
    """Return Hugging Face's description of the columns, where the names of classes are."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) and all(isinstance(v, dict) for v in features.values()) else {}


def _holds_images(kind: str) -> bool:
    return "binary" in kind


def _label_column(schema: Any, choices: Choices, about: About, path: str) -> str | None:
    names = [entry.name for entry in schema if not _holds_images(str(entry.type))]
    if choices.label_column:
        return label_column(names, choices, about, path)
    fitting = [entry.name for entry in schema if re.match("u?int|bool|string|large_string|dictionary", str(entry.type))]
    lists = [name for name in names if name in _COLUMNS["label"] and name not in fitting]
    if lists:
        about.notes.append(f"{path}: column {lists[0]} is not used: it holds several values for an image, or fractions")
    return label_column(fitting, choices, about, path)


def _columns(path: str, schema: Any, label: str | None, about: About) -> dict[str, str]:
    """Return the columns of the image, its map and its mask: by name, or the only column that holds images."""
    images = [entry.name for entry in schema if _holds_images(str(entry.type))]
    columns = {}
    for part in ("image", "segmentation", "mask"):
        fitting = [name for name in _COLUMNS[part] if name in images]
        if fitting:
            columns[part] = fitting[0]
    if "image" not in columns:
        if len(images) != 1:
            names = ", ".join(entry.name for entry in schema)
            paths = next((name for name in _COLUMNS["image"] if name in schema.names), None)
            if paths and not images:
                kind = schema.field(paths).type
                raise DataError(
                    f"{path}: column {paths} holds no encoded images, but {str(kind)[:60]}; if these are paths, name the "
                    "folder of the images and choose `labels` with this table"
                )
            raise DataError(f"{path}: no column is called image, only {names}; rename the one with the images")
        columns = {"image": images[0]}
    unused = [entry.name for entry in schema if entry.name not in (*columns.values(), label)]
    if unused:
        about.notes.append(f"columns not used: {', '.join(unused)}; `label_column` chooses one as label")
    return columns


def _is_hugging_face(tree: Tree) -> bool:
    """Whether there are tables; beside images, one with images in it, since others hold labels."""
    tables = [name for name in tree.names if re.search(r"\.(parquet|arrow)$", name)]
    if not tables or not tree.images:
        return bool(tables)
    if tree.archive:
        return False
    schema, _ = readers.table_schema(storage.join(tree.root, tables[0]))
    return any(_holds_images(str(entry.type)) for entry in schema)


LMDB = Layout(
    partial(read_lmdb, key_pattern=_NUMBER_KEY),
    lambda tree: _has_keys(tree, rf"(?!{_HASH_KEY}).*"),
    sign="data.mdb with keys that are numbers",
)
LSUN = Layout(
    partial(read_lmdb, key_pattern=_HASH_KEY),
    lambda tree: _has_keys(tree, _HASH_KEY),
    sign="data.mdb with keys that are hashes",
)
HUGGING_FACE = Layout(read_hugging_face, _is_hugging_face, sign="parquet or arrow files")
