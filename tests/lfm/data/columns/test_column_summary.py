"""The columns of a data set in lines."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.columns.column_index import write_index
from lfm.data.columns.column_summary import NUM_BINS, summarize_columns
from lfm.storage.cache import Cache


def summary(folder: Path, kind: str, values: list[object]) -> str:
    record = write_index(str(folder), [{"a": values}], {"a": kind})  # type: ignore[dict-item]
    (line,) = summarize_columns(str(folder), record, Cache(folder / "cache"))
    return line


def test_numbers_have_a_histogram(tmp_path: Path) -> None:
    """Range, bars and median; missing values are counted."""
    values = [*range(16), None, 0, 0, 0, 0, 0, 0, 0]
    assert summary(tmp_path, "int", values) == "a (int): 0 █▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ 15, median 4, 1 missing"
    assert summary(tmp_path, "float", [2.5, 2.5]) == "a (float): 2.5 everywhere"
    assert summary(tmp_path, "float", [None]) == "a (float): no values, 1 missing"


def test_texts_have_their_most_frequent_values(tmp_path: Path) -> None:
    """With counts, the most frequent first; different ones by an example."""
    assert summary(tmp_path, "text", ["x", "y", "x", None]) == "a (text): 2 different values: x 2, y 1, 1 missing"
    assert summary(tmp_path, "bool", [True, True, False]) == "a (bool): 2 different values: True 2, False 1"
    assert (
        summary(tmp_path, "text", ["a\nb" * 40, "c"])
        == "a (text): 2 different values, such as a ba ba ba ba ba ba b..."
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats() | st.none(), max_size=9))
def test_any_numbers(tmp_path_factory: object, values: list[float | None]) -> None:
    """One line, with all bars where values differ."""
    folder = tmp_path_factory.mktemp("index")  # type: ignore[attr-defined]
    line = summary(folder, "float", list(values))
    assert "\n" not in line
    finite = {value for value in values if value is not None and math.isfinite(value)}
    if len(finite) > 1:
        assert len(line.split("(float): ")[1].split(", median")[0]) > NUM_BINS
