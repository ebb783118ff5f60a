"""Lists of numbers and of classes in options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.manifest import ClassRecord
from lfm.errors import ConfigError
from pipelines.common.class_names import resolve_classes
from pipelines.common.number_lists import parse_indices, parse_numbers

CLASSES = [
    ClassRecord(index=index, name=name, count=1) for index, name in enumerate(["circle", "star", "tench, Tinca", "0"])
]


@given(st.lists(st.integers(0, 10**17), min_size=1, unique=True))
def test_a_list_of_indices_is_read_as_written(numbers: list[int]) -> None:
    assert parse_indices("rows", ",".join(map(str, numbers))) == numbers


@given(st.integers(0, 10**9), st.integers(0, 1000))
def test_a_range_includes_both_ends(first: int, length: int) -> None:
    assert parse_indices("rows", f"{first}-{first + length}") == list(range(first, first + length + 1))


@given(st.lists(st.floats(-1000, 1000), min_size=1))
def test_a_list_of_numbers_is_read_as_written(numbers: list[float]) -> None:
    assert parse_numbers("times", ",".join(map(repr, numbers))) == tuple(numbers)


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1-2-3", "3-1", "1,0-2", "0-1000000", "9" * 19, "1.5"])
def test_a_wrong_list_of_indices_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^`rows` {text}: "):
        parse_indices("rows", text)


@pytest.mark.parametrize("text", ["", "a", "1,", "nan", "inf", "1e9"])
def test_a_wrong_list_of_numbers_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^`times` {text}: "):
        parse_numbers("times", text)


@pytest.mark.parametrize(
    ("text", "indices"),
    [("star,circle", [1, 0]), ("0-1,3", [0, 1, 3]), ("star, 0", [1, 0]), ("tench, Tinca", [2]), ("7", [7])],
)
def test_classes_are_named_or_numbered(text: str, indices: list[int]) -> None:
    assert resolve_classes(text, CLASSES) == indices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sta", r"did you mean star\?"),
        ("CIRCEL", r"did you mean circle\?"),
        ("x", "unknown class 'x'; use names or indices, such as 0-3, of circle, star, tench, Tinca, 0$"),
        ("star,1", "a class twice"),
    ],
)
def test_an_unknown_class_is_refused_with_the_nearest_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_classes(text, CLASSES)
