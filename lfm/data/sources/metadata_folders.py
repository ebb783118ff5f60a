"""Images with a table beside them: StyleGAN's and EDM's dataset.json, and the metadata of Hugging Face's ImageFolder."""

from __future__ import annotations

import json
import re

from lfm import storage
from lfm.data.sources.class_folders import read_folder
from lfm.data.sources.labels import (
    FILE_KEYS,
    LABEL_KEYS,
    MAP_KEYS,
    MASK_KEYS,
    Label,
    Row,
    as_label,
    classes,
    column_of,
    label_column,
    plain_path,
    read_table,
)
from lfm.data.sources.names import SPLIT, stem
from lfm.data.sources.source import Layout, Source, Tree, choose_split, read_text
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

DATASET = "dataset.json"
_METADATA = re.compile(r"(^|/)metadata\.(csv|jsonl|parquet)$")


def read_edm(tree: Tree, split: str | None) -> Source:
    """Read a data set of StyleGAN, EDM or EDM2: dataset.json holds {"labels": [[file, class], ...]}, or null.

    Raises:
        ConfigError: a split was chosen.
        DataError: dataset.json is damaged, or it and the images differ.
    """
    if split:
        raise ConfigError(f"{tree.root}: `split` {split}: this layout has no splits; leave it out")
    where = f"{tree.root}/{DATASET}"
    try:
        content = json.loads(read_text(tree, DATASET) or "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON; copy or download it again") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not labels:
        tree.about.labels_from = f"{DATASET}: none"
        return Source(tree.root, tuple(map(SourceItem, tree.images)), read=tree.read, about=tree.about)
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{where}: its labels are no pairs of a file and a class; write [[file, class], ...]")
    table: dict[str, Label] = {}
    for name, label in pairs:
        value = as_label(label, f"{where}: {name}")
        if table.setdefault(plain_path(name), value) != value:
            raise DataError(f"{where}: {name} has two labels; remove one")
    _require_same(where, set(table), set(tree.images))
    indices, names = classes([table[name] for name in tree.images], tree.choices, where)
    tree.about.labels_from = DATASET
    items = map(SourceItem, tree.images, indices)
    return Source(tree.root, tuple(items), names, read=tree.read, about=tree.about)


def _require_same(where: str, listed: set[str], existing: set[str], otherwise: str = "") -> None:
    problems = [
        f"{len(names)} {what}, such as {min(names)}"
        for names, what in (
            (existing - listed, "images without a label"),
            (listed - existing, "labels without an image"),
        )
        if names
    ]
    if problems:
        raise DataError(f"{where}: {' and '.join(problems)}; add or remove them{otherwise}")


def read_image_folder(tree: Tree, split: str | None) -> Source:
    """Read Hugging Face's ImageFolder: metadata.csv, .jsonl or .parquet names the files, their labels, masks and maps.

    Raises:
        ConfigError: there are several splits and none was chosen.
        DataError: the table cannot be read, or does not name the images.
    """
    tables = [name for name in tree.names if _METADATA.search(name)]
    tops = {name.partition("/")[0] for name in tables if "/" in name}
    if split or (tops and all(map(SPLIT.fullmatch, tops)) and tops == {name.partition("/")[0] for name in tables}):
        tree = tree.subtree(choose_split(tree, tops or {str(split)}, split))
        tables = [name for name in tree.names if _METADATA.search(name)]
    if len(tables) != 1:
        raise ConfigError(f"{tree.root}: holds {len(tables)} tables ({', '.join(tables[:3])}); name the folder of one")
    folder = tables[0].rpartition("/")[0]
    tree = tree.subtree(folder)
    name = tables[0].rpartition("/")[2]
    where = storage.join(tree.root, name)
    rows = read_table(tree.read(tree.root, name), where)
    tree.about.used.add(where)
    return _of_rows(tree, rows, where)


def _of_rows(tree: Tree, rows: list[Row], where: str) -> Source:
    columns = list(rows[0]) if rows else []
    file, label = column_of(columns, FILE_KEYS), label_column(columns, tree.choices, tree.about, where)
    if file is None or file == label:
        raise DataError(
            f"{where}: has no column file_name, only {', '.join(columns)}; rename the one with the file names"
        )
    mask, segmentation = column_of(columns, MASK_KEYS), column_of(columns, MAP_KEYS)
    mask = None if mask == label else mask
    segmentation = None if segmentation == label else segmentation
    annotations = {plain_path(row[column]) for column in (mask, segmentation) if column for row in rows if row[column]}
    listed = [plain_path(row[file]) for row in rows]
    if len(set(listed)) < len(listed):
        raise DataError(f"{where}: has {len(listed) - len(set(listed))} images twice; remove the rows")
    otherwise = ", or choose `layout` folder or annotated to leave the table out"
    _require_same(where, set(listed), set(tree.images) - annotations, otherwise)
    images = tree.only(name for name in tree.names if name not in annotations)
    if label is None and tree.choices.classes != "none" and len(images.top_folders) > 1:
        base = read_folder(images, None)
        by_name = {item.image: item.class_index for item in base.items}
        indices, names = [by_name[name] for name in listed], base.class_names
    else:
        values = [as_label(row[label], f"{where}: {row[file]}") if label else None for row in rows]
        indices, names = classes(values, tree.choices, where)
        tree.about.labels_from = f"column {label} of {where}" if label else ""
    unused = [c for c in columns if c not in (file, label, mask, segmentation) and (not label or c not in LABEL_KEYS)]
    if unused:
        tree.about.notes.append(f"{where}: columns not used: {', '.join(unused)}; `label_column` chooses one as label")
    paths = {file, mask, segmentation}
    items = [
        SourceItem(
            name,
            index,
            _annotation(row, segmentation),
            _annotation(row, mask),
            {title: value for title, value in row.items() if title not in paths},
        )
        for name, index, row in zip(listed, indices, rows, strict=True)
    ]
    items.sort(key=lambda item: item.image)
    return Source(tree.root, tuple(items), names, read=tree.read, about=tree.about)


def _annotation(row: Row, column: str | None) -> str | None:
    return plain_path(row[column]) if column and row[column] else None


def _is_image_folder(tree: Tree) -> bool:
    """Whether a metadata table beside the images names some of them, or says that it should; other programs write tables of
    that name, too.
    """
    names = [name for name in tree.names if _METADATA.search(name)]
    if not names or not tree.images:
        return False
    try:
        rows = read_table(tree.read(tree.root, names[0]), names[0])
    except DataError:
        return True
    file = column_of(rows[0], FILE_KEYS) if rows else None
    if file is None or file == FILE_KEYS[0]:
        return True
    images = {stem(name).rpartition("/")[2] for name in tree.images}
    return any(stem(plain_path(row[file])).rpartition("/")[2] in images for row in rows)


def _is_edm(tree: Tree) -> bool:
    """Whether the tree has a dataset.json with labels, or one that is damaged; other programs call their files so, too."""
    if DATASET not in tree.names or not tree.images:
        return False
    try:
        content = json.loads(tree.read(tree.root, DATASET))
    except (ValueError, RecursionError):
        return True
    return isinstance(content, dict) and "labels" in content


EDM = Layout(read_edm, _is_edm, sign="dataset.json with labels")
IMAGE_FOLDER = Layout(
    read_image_folder,
    _is_image_folder,
    instead_of=("paired", "inpainting", "hf"),
    sign="metadata.csv, .jsonl or .parquet beside the images",
)
