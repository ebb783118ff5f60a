"""The columns of label files: their names and types in the index of a data set.

A column is `int`, `float` or `bool` if all of its values are, also as text in a CSV, and `text` otherwise. Columns with lists,
mappings or bytes, and those without any value, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lfm.data.manifest import OWN_COLUMNS, ColumnType
from lfm.data.sources.names import storable

_INT = re.compile(r"[+-]?(0|[1-9]\d{0,17})")  # 007 is a name
_FLOAT = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class LabelColumn:
    """A column of a label file."""

    title: str  # in the label file
    type: ColumnType

    def value(self, row: Mapping[str, Any] | None) -> int | float | str | bool | None:
        """Return the value of a row, or None if it has none."""
        value = (row or {}).get(self.title)
        if _kind(value) is None:
            return None
        if self.type == "bool":
            return value if isinstance(value, bool) else str(value).strip().lower() == "true"
        if self.type == "text":
            return storable(str(value))
        return int(value) if self.type == "int" else float(value)  # type: ignore[arg-type]


def label_columns(rows: Iterable[Mapping[str, Any] | None]) -> dict[str, LabelColumn]:
    """Return the columns of rows by their names in the index, which are identifiers and none of its own names."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for title, value in (row or {}).items():
            if (kind := _kind(value)) is not None:
                kinds.setdefault(title, set()).add(kind)
    columns: dict[str, LabelColumn] = {}
    for title, of_column in kinds.items():
        if "other" not in of_column:
            columns[_name(str(title), columns)] = LabelColumn(title, _common_type(of_column))
    return columns


def _kind(value: Any) -> str | None:
    """Return the type of one value, `other` if the index cannot hold it, or None if it is missing."""
    if isinstance(value, str):
        text = value.strip()
        if not text or text.lower() == "nan":
            return None
        if text.lower() in ("true", "false"):
            return "bool"
        return "int" if _INT.fullmatch(text) else "float" if _FLOAT.fullmatch(text) else "text"
    if value is None or value != value:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) < 2**63 else "text"
    if isinstance(value, float):
        return "float"
    return "other" if isinstance(value, list | dict | tuple | bytes) else "text"


def _common_type(kinds: set[str]) -> ColumnType:
    if kinds == {"bool"}:
        return "bool"
    if kinds == {"int"}:
        return "int"
    return "float" if kinds <= {"int", "float"} else "text"


def _name(title: str, others: Iterable[str]) -> str:
    name = re.sub(r"\W+", "_", title).strip("_") or "column"
    if name[0].isdigit():
        name = f"column_{name}"
    if name in OWN_COLUMNS:
        name = f"table_{name}"
    number = 1
    unique = name
    while unique in others:
        number += 1
        unique = f"{name}_{number}"
    return unique
