"""Columns of label files get one type each, which holds all of their values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.columns.label_columns import label_columns
from lfm.data.manifest import OWN_COLUMNS

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)


@given(st.lists(SCALARS, min_size=1, max_size=9))
def test_every_value_is_of_the_type_of_its_column(values: list[object]) -> None:
    """Equal types for all rows, and no value is lost that is not missing."""
    rows = [{"a": value} for value in values]
    columns = label_columns(rows)
    is_missing = [
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and value.strip().lower() in ("", "nan"))
        for value in values
    ]
    if all(is_missing):
        assert not columns
        return
    (column,) = columns.values()
    kinds = {"int": int, "float": float, "text": str, "bool": bool}
    for row, missing in zip(rows, is_missing, strict=True):
        value = column.value(row)
        assert (value is None) == missing
        assert value is None or type(value) is kinds[column.type]


@pytest.mark.parametrize(
    ("values", "kind", "converted"),
    [
        (["3", "-4", ""], "int", [3, -4, None]),
        (["3", "0.5", "1e-3"], "float", [3.0, 0.5, 0.001]),
        (["007", "8"], "text", ["007", "8"]),
        (["True", "false"], "bool", [True, False]),
        ([1, True], "text", ["1", "True"]),
        ([2**70, 1], "text", [str(2**70), "1"]),
        (["caf\udce9", "b"], "text", ["caf\\xe9", "b"]),
    ],
)
def test_types(values: list[object], kind: str, converted: list[object]) -> None:
    """Text of a CSV is converted, and padded numbers are names."""
    rows = [{"a": value} for value in values]
    (column,) = label_columns(rows).values()
    assert column.type == kind
    assert [column.value(row) for row in rows] == converted


def test_names() -> None:
    """Names are identifiers, unique, and none of the index's own; lists and bytes are left out."""
    titles = ["Score (1-5)", "Score 1 5", "class", "width", "2", "--", "größe", "tags", "blob"]
    row = dict.fromkeys(titles, 1) | {"tags": [1], "blob": b"1"}
    names = list(label_columns([row, None]))
    assert names == ["Score_1_5", "Score_1_5_2", "table_class", "table_width", "column_2", "column", "größe"]
    assert all(name.isidentifier() and name not in OWN_COLUMNS for name in names)
