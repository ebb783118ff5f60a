"""Labels of any kind, such as 3, "3", "cat" or 3.0, as class indices, and tables that hold them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.names import SPLIT, stem
from lfm.data.sources.source import About, Choices, Source
from lfm.errors import ConfigError, DataError

Label = int | str | None
Row = dict[str, Any]

# Names of columns and JSON keys, the preferred one first.
LABEL_KEYS: tuple[str, ...] = (
    "label",
    "labels",
    "class",
    "cls",
    "fine_label",
    "class_name",
    "label_name",
    "category",
    "target",
)
LABEL_KEYS += ("class_id", "label_id", "category_id")
FILE_KEYS = ("file_name", "filename", "file", "image", "image_name", "image_id", "path", "name", "id", "img", "key")
MASK_KEYS = ("mask", "mask_file_name", "mask_file", "mask_path")
MAP_KEYS = ("segmentation", "segmentation_file_name", "seg", "annotation", "annotation_file_name", "map", "label_map")
MOST_TEXTS = 0.5  # of the images; labels that differ more are texts
FEW_IMAGES = 20


def as_label(value: Any, where: str) -> Label:
    """Return a value of a table or JSON as an index, a name, or None if it is missing.

    Raises:
        DataError: it is a list, a mapping or a fraction.
    """
    if value is None or value == "" or value == -1 or value != value:
        return None
    if isinstance(value, bool | int | str):
        return int(value) if isinstance(value, bool) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    kind = "several labels" if isinstance(value, list | dict | tuple) else "a number that is no class"
    raise DataError(f"{where}: {str(value)[:40]} is {kind}; choose another column with `label_column`")


def parse_text(text: str) -> Label:
    """Return the label of a text file: an index if it is a number, else a name."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 19 else text or None


def classes(
    labels: Sequence[Label], choices: Choices, where: str, *, names: Sequence[str] = (), keep_indices: bool = False
) -> tuple[list[int | None], tuple[str, ...]]:
    """Return the class index of every label, and the names of the classes.

    Args:
        labels: indices or names; if there are names among them, all are names.
        choices: of the user: whether there are classes, and the order of names that are numbers.
        where: place of the labels, for messages.
        names: names of the indices, if the source has a list of them.
        keep_indices: let indices from 0 stand although some of them are not used, as long as these are at most half.

    Raises:
        ConfigError: the labels are texts that differ from image to image.
        DataError: an index is not in the list.
    """
    if choices.classes == "none":
        return [None] * len(labels), ()
    known = {label for label in labels if label is not None}
    # "07" and "7" are different names, so texts become indices only if none is padded.
    if all(isinstance(label, int) or (label.isdecimal() and str(int(label)) == label) for label in known):
        keep_indices = keep_indices and all(isinstance(label, int) for label in known)
        return _by_index([None if label is None else int(label) for label in labels], names, where, keep_indices)
    texts = sorted({str(label) for label in known})
    if len(texts) > MOST_TEXTS * len(labels) and len(labels) >= FEW_IMAGES and not choices.label_column:
        raise ConfigError(
            f"{where}: {len(texts)} different labels for {len(labels)} images look like captions; choose `classes` none, "
            "or name the column with `label_column` if each is a class"
        )
    texts = in_order(texts, choices)
    index = {text: number for number, text in enumerate(texts)}
    return [None if label is None else index[str(label)] for label in labels], tuple(texts)


def _by_index(
    labels: list[int | None], names: Sequence[str], where: str, keep_indices: bool
) -> tuple[list[int | None], tuple[str, ...]]:
    known = sorted({label for label in labels if label is not None})
    if known and (known[0] < 0 or (names and known[-1] >= len(names))):
        wrong = known[0] if known[0] < 0 else known[-1]
        what = f"not one of the {len(names)} names" if names else "negative"
        raise DataError(f"{where}: class {wrong} is {what}; repair the label")
    if names:
        return labels, tuple(names)
    largest = known[-1] if known else -1
    if keep_indices and known and known[0] == 0 and largest < 2 * len(known):
        return labels, tuple(map(str, range(largest + 1)))
    index = {label: number for number, label in enumerate(known)}
    return [None if label is None else index[label] for label in labels], tuple(map(str, known))


def notes_on_indices(indices: Sequence[int | None], names: Sequence[str]) -> list[str]:
    """Return what to say of classes whose labels are numbers: which have no image, or that the numbers are not the indices."""
    used = {index for index in indices if index is not None}
    unused = [name for index, name in enumerate(names) if index not in used]
    if unused:
        return [f"{len(unused)} of {len(names)} classes have no image, such as {unused[0]}"]
    if all(name.isdecimal() for name in names) and list(names) != list(map(str, range(len(names)))):
        last = f"label {names[-1]} is class {len(names) - 1}"
        return [f"classes are the labels that occur, numbered from 0: {last}; other labels would be numbered otherwise"]
    return []


def in_order(names: Iterable[str], choices: Choices) -> list[str]:
    """Return names of classes sorted as text, or as numbers if the user chose that.

    Raises:
        ConfigError: they are to be sorted as numbers and one is none.
    """
    if choices.class_order == "name":
        return sorted(names)
    names = list(names)
    if wrong := [name for name in names if not name.isdecimal()]:
        raise ConfigError(f"`class_order` number: class {wrong[0]} is no number; use name")
    return sorted(names, key=lambda name: (int(name), name))


def read_table(content: bytes, path: str, files: Container[str] = ()) -> list[Row]:
    """Return the rows of a table: CSV or TSV, JSON lines, or parquet.

    Args:
        files: names of images; a CSV whose first line has one of them, and no known name of a column, has no head, and its
            columns are called 1, 2 and so on.

    Raises:
        DataError: it cannot be read.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".parquet":
        return readers.table_rows(content, path)
    try:
        text = content.decode("utf-8-sig")
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif suffix == ".json":
            rows = json.loads(text)
        else:
            rows = _read_csv(text, files)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({str(error)[:80]}); write it as CSV in UTF-8") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path}: has no rows with names of columns; write it as CSV with a head such as file_name,label"
        )
    return rows


def _read_csv(text: str, files: Container[str]) -> list[Row]:
    """Return the rows of a CSV; spaces around cells are no part of them.

    A line with the number of rows may come first, and the head may have no name for the file, as in CelebA's lists.
    """
    first, _, rest = text.partition("\n")
    num_lines = len(rest.splitlines())
    if first.strip().isdecimal() and int(first) in (num_lines, num_lines - 1):
        text, first = rest, rest.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    delimiter = delimiter if delimiter in first else " "
    lines = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    cells = [[cell.strip() for cell in line] for line in lines if line]
    head = cells[0] if cells else []
    if column_of(head, FILE_KEYS) is None and any(_file(plain_path(cell)) in files for cell in head):
        head = [str(number) for number in range(1, len(head) + 1)]
    else:
        cells = cells[1:]
        if cells and column_of(head, FILE_KEYS) is None and all(len(line) == len(head) + 1 for line in cells):
            head = [FILE_KEYS[0], *head]
    return [dict(zip_longest(head, line[: len(head)])) for line in cells]


def plain_path(name: Any) -> str:
    """Return a path of a table as the names of a tree: with slashes, and without a dot in front."""
    return str(name).replace("\\", "/").removeprefix("./")


def column_of(columns: Iterable[str], keys: Sequence[str]) -> str | None:
    """Return the first of `keys` that is a column, whatever its case."""
    by_lower = {str(column).strip().lower(): column for column in reversed(list(columns))}
    return next((by_lower[key] for key in keys if key in by_lower), None)


def label_column(columns: Sequence[str], choices: Choices, about: About, where: str) -> str | None:
    """Return the column with labels, chosen by the user or by its name; notes other columns that may hold labels.

    Raises:
        ConfigError: the chosen column does not exist.
    """
    if choices.classes == "none" and not choices.label_column:
        return None
    if choices.label_column:
        if choices.label_column not in columns:
            raise ConfigError(
                f"{where}: `label_column` {choices.label_column}: no such column; one of {', '.join(columns)}"
            )
        return choices.label_column
    known = [key for key in (column_of(columns, (key,)) for key in LABEL_KEYS) if key is not None]
    if known[1:]:
        about.notes.append(
            f"{where}: labels are those of column {known[0]}; not used: {', '.join(known[1:])} (`label_column` chooses)"
        )
    return known[0] if known else None


def with_labels(source: Source, choices: Choices) -> Source:
    """Return a source with the classes of the table `choices.labels`, whose rows name its files.

    The column of file names is the one whose values are the most names of images. The column of labels is known by its
    name, or because there is no other. A table without a head has the columns 1, 2 and so on.

    Raises:
        ConfigError, DataError: the table has no such columns, or an image is not in it or twice.
    """
    path = str(choices.labels)
    names = [readers.inner_name(item.image) for item in source.items]
    files = {key for name in names for key in (_file(name), stem(_file(name)))}
    rows = read_table(storage.read_bytes(path), path, files)
    if not rows:
        raise ConfigError(
            f"{path}: has no rows; write a line for each image, such as {names[0] if names else 'a.png'},cat"
        )
    columns = [name for name in rows[0] if name]
    column = label_column(columns, choices, source.about, path)
    file_column = _file_column([name for name in columns if name != column], rows, files)
    if file_column is None:
        raise ConfigError(
            f"{path}: no column holds names of the images, such as {names[0] if names else 'a.png'}; its columns are "
            f"{', '.join(map(str, columns))}"
        )
    others = [name for name in columns if name != file_column]
    if column is None and len(others) != 1:
        raise ConfigError(
            f"{path}: any of {', '.join(map(str, others)) or 'no columns'} may hold labels; choose one with `label_column`"
        )
    column = column or others[0]
    table: dict[str, Label] = {}
    row_of: dict[str, Row] = {}
    for row in rows:
        name, label = plain_path(row[file_column]), as_label(row[column], f"{path}: {row[file_column]}")
        row_of[name] = {title: value for title, value in row.items() if title and title != file_column}
        if table.setdefault(name, label) != label:
            several = sum(_file(other) == name for other in names) > 1
            repair = "write the paths of its images with folders" if several else "remove one of the rows"
            raise DataError(f"{path}: {name} has the labels {table[name]} and {label}; {repair}")
    matches = _matched(source, names, table, path)
    indices, class_names = classes(_whole([table[name] for name in matches]), choices, path)
    items = tuple(
        replace(item, class_index=index, columns=row_of[name])
        for item, index, name in zip(source.items, indices, matches, strict=True)
    )
    source.about.labels_from = f"column {column} of {path}"
    source.about.used |= {path, str(Path(path).resolve())}
    return replace(source, items=items, class_names=class_names)


def _whole(labels: list[Label]) -> list[Label]:
    """Return texts such as 3.0 as integers, if all are such: pandas writes them where a label is missing."""
    known = [label for label in labels if label is not None]
    if all(isinstance(label, str) and re.fullmatch(r"\d{1,18}\.0+", label) for label in known):
        return [None if label is None else int(str(label).partition(".")[0]) for label in labels]
    return labels


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _file_column(columns: Sequence[str], rows: Sequence[Row], files: Container[str]) -> str | None:
    """Return the column whose values are the most names of images; of equal ones, that of the better known name."""
    ranks = {column: rank for rank, key in enumerate(FILE_KEYS) if (column := column_of(columns, (key,)))}
    counts = {name: sum(_file(plain_path(row.get(name))) in files for row in rows) for name in columns}
    best = max(counts, key=lambda name: (counts[name], -ranks.get(name, len(FILE_KEYS))), default=None)
    return best if best is not None and (counts[best] or best in ranks) else None


def _matched(source: Source, names: Sequence[str], table: Mapping[str, Label], path: str) -> list[str]:
    """Return the row of every item, as the name in it.

    It is the one whose path has the most folders in common with the image's path, from the end: the row may leave out
    the first folders or the suffix, or name folders above the collection, such as those of another machine.
    """
    ends = _ends(table)
    matches: list[str | None] = [None] * len(names)
    above = plain_path(source.root).rstrip("/").split("/")
    for keys in (list(names), [stem(name) for name in names]):
        if not any(_file(key) in ends for key in keys):
            continue
        matches = [key if key in table else None for key in keys]
        if not all(matches):  # rows need not be relative to the collection
            matches = [_row([*above, *key.split("/")], key, ends, path) for key in keys]
        if any(matches):
            break
    if missing := [name for name, row in zip(names, matches, strict=True) if row is None]:
        example = f"; its rows are such as {min(table)}" if len(missing) == len(names) and table else ""
        tops = {name.partition("/")[0] for name in missing}
        labelled = sorted({name.partition("/")[0] for name in names} - tops)
        repair = "add a row for each"
        if labelled and all(map(SPLIT.fullmatch, (*tops, *labelled))):
            repair += f", or choose `split` {labelled[0]}"
        elif {stem(_file(name)).lstrip("0") for name in missing} & {stem(_file(row)).lstrip("0") for row in table}:
            repair = "write the numbers as in the names of the files, with their zeros"
        raise DataError(
            f"{path}: {len(missing)} of {len(names)} images have no label, the first: {missing[0]}{example}; {repair}"
        )
    rows = [row for row in matches if row is not None]
    if len(set(rows)) < len(rows):
        twice = next(row for row, count in Counter(rows).items() if count > 1)
        raise DataError(f"{path}: {twice} may be any of several images; write their paths with folders")
    if extra := set(table) - set(rows):
        source.about.notes.append(f"{path}: {len(extra)} rows belong to no image, such as {min(extra)}")
    return rows


def _ends(table: Iterable[str]) -> dict[str, list[str]]:
    """Return the rows by each end of their paths: `b/c.png` and `c.png` of `a/b/c.png`, and the path itself."""
    ends: dict[str, list[str]] = defaultdict(list)
    for row in table:
        parts = row.split("/")
        for start in range(len(parts)):
            ends["/".join(parts[start:])].append(row)
    return ends


def _row(parts: list[str], name: str, ends: Mapping[str, list[str]], path: str) -> str | None:
    """Return the row of an image: the one of the longest common end, unless its next folder is another split.

    Args:
        parts: the path of the image, with the folders above the collection.
        name: its path in the collection.
        ends: the rows by the ends of their paths.
        path: the table, for messages.

    Raises:
        DataError: several rows have that end.
    """
    depth = name.count("/") + 1
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        rows = ends.get(end, [])
        if not rows:
            continue
        if len(parts) - start < depth:  # the row leaves folders out, but may name no other ones
            rows = [row for row in rows if row == end]
        rows = [row for row in rows if not _is_other_split(row, end, parts[start - 1] if start else "")]
        if len(rows) > 1 and end not in rows:
            raise DataError(
                f"{path}: {rows[0]} and {rows[1]} may both be {name}; name the images with the same folders"
            )
        if rows:
            return end if end in rows else rows[0]
    return None


def _is_other_split(row: str, end: str, folder: str) -> bool:
    """Whether the row of a path that ends with `end` names a split above it, and the image lies in another one."""
    above = row.removesuffix(end).rstrip("/").rpartition("/")[2]
    return bool(SPLIT.fullmatch(above) and SPLIT.fullmatch(folder)) and above.lower() != folder.lower()
