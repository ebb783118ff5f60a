"""Expressions over columns: what they select equals Python's own evaluation, and what is refused is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.data.columns.column_index import write_index
from lfm.data.columns.selection import select
from lfm.data.columns.where_expression import LONGEST, parse_where
from lfm.data.manifest import ColumnType, Manifest, ShardRecord
from lfm.errors import ConfigError, DataError
from lfm.storage.cache import Cache

TYPES: dict[str, ColumnType] = {"class": "text", "score": "float", "width": "int", "good": "bool"}
ROWS: list[dict[str, Any]] = [
    {"class": "dress", "score": 0.5, "width": 300, "good": True},
    {"class": "coat", "score": None, "width": 200, "good": False},
    {"class": None, "score": -1.0, "width": 100, "good": None},
    {"class": "dress 2", "score": 2.0, "width": None, "good": True},
    {"class": "hat", "score": 1.0, "width": 256, "good": False},
]
SIZES = (2, 0, 3)


def data_set(folder: Path, rows: list[dict[str, Any]] = ROWS, sizes: tuple[int, ...] = SIZES) -> Manifest:
    """Write an index, and return a manifest of shards of these sizes."""
    part = {name: [row[name] for row in rows] for name in TYPES}
    record = write_index(str(folder), [part], TYPES)
    shards = tuple(
        ShardRecord(name=f"{number:06d}.tar", samples=size, bytes=10, sha256="", crc32=0)
        for number, size in enumerate(sizes)
    )
    return Manifest(kind="raw", image_size=8, recipe={}, shards=shards, columns=record)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


def selected(folder: Path, where: str) -> list[int]:
    """Return the numbers of the selected samples."""
    selection = select(str(folder), data_set(folder), where, Cache(folder / "cache"), "data.where")
    shards = np.repeat(np.arange(len(SIZES)), selection.counts)
    places = np.concatenate([np.arange(count) for count in selection.counts])
    return (np.cumsum([0, *SIZES])[shards] + selection.rows_at(shards, places)).tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("class == 'dress'", [0]),
        ("class in ('dress', 'coat')", [0, 1]),
        ("class not in ('dress', 'coat')", [3, 4]),
        ("like(class, 'dress%')", [0, 3]),
        ("like(class, '_a%')", [4]),
        ("match(class, '^(hat|coat)$')", [1, 4]),
        ("not like(class, 'dress%')", [1, 4]),
        ("0 < score <= 1", [0, 4]),
        ("score == -1", [2]),
        ("score in [1, 2]", [3, 4]),
        ("width in (200, 100.0)", [1, 2]),
        ("width > 199.5 and not good", [1, 4]),
        ("good or width == 100", [0, 2, 3]),
        ("good == False", [1, 4]),
        ("width == None", [3]),
        ("score != None and class != None", [0, 3, 4]),
        ("width > score", [0, 2, 4]),
        ("  (width >= 256)\n", [0, 4]),
    ],
)
def test_selected_samples(folder: Path, where: str, expected: list[int]) -> None:
    """A missing value is in no comparison, and `class` is a name though it is a keyword of Python."""
    assert selected(folder, where) == expected


def conditions(depth: int = 2) -> st.SearchStrategy[str]:
    number = st.sampled_from(["-1", "0.5", "1", "200", "256"])
    operator = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    single = st.builds("{} {} {}".format, st.sampled_from(["score", "width"]), operator, number)
    if not depth:
        return single
    inner = conditions(depth - 1)
    return st.one_of(
        single,
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("{} < {} <= {}".format, number, st.sampled_from(["score", "width"]), number),
    )


@given(conditions())
def test_as_python_evaluates_it(where: str) -> None:
    """Rows without a missing value are selected as Python would."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    rows = [row for row in ROWS if None not in row.values()]
    condition = parse_where(where, TYPES, "data.where").condition
    table = ds.dataset(pa.Table.from_pylist(rows)).scanner(columns={"x": condition}).to_table()
    assert table["x"].to_pylist() == [eval(where, {}, row) for row in rows]


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("scroe > 1", "no column is called scroe (did you mean score?)"),
        ("class > 3", "class is text and 3 is a number"),
        ("score == 'a'", "not comparable"),
        ("score in ('a', 1)", "not comparable"),
        ("score", "no condition by itself"),
        ("width + 1 > 2", "width + 1 is no number"),
        ("__import__('os').system('true')", "no condition"),
        ("open(class, 'w')", "open is no function"),
        ("(lambda: good)()", "cannot be read"),
        ("good if good else good", "cannot be read"),
        ("[x for x in (1,)]", "cannot be read"),
        ("good := True", "cannot be read"),
        ("class.upper() == 'A'", "no number, no text"),
        ("class[0] == 'A'", "no number, no text"),
        ("class is None", "cannot be read"),
        ("like(class, class)", "no number, no text"),
        ("match(class, '(')", "match"),
        ("match(score, 'a')", "column of type text"),
        ("class in 'abc'", "a tuple of values"),
        ("1 in (1, 2)", "a tuple of values"),
        ("True", "no condition"),
        ("1 == 1", "names no column"),
        ("good and", "cannot be read"),
        ("good; good", "cannot be read"),
        ("'unfinished", "cannot be read"),
        ("width == 99999999999999999999", "too large"),
        ("width < None", "missing value"),
        ("(" * 300 + "good" + ")" * 300, "cannot be read"),
        ("not " * 100 + "good", "nested too deeply"),
        ("good or " * LONGEST + "good", "longer than"),
        ("good\0", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_refused(where: str, reason: str) -> None:
    """One line names the key, the reason and the known columns."""
    with pytest.raises(ConfigError) as caught:
        parse_where(where, TYPES, "data.where")
    message = str(caught.value)
    assert message.startswith("data.where: ") and "\n" not in message
    assert reason in message, message
    assert message.endswith("its columns are class (text), score (float), width (int), good (bool)")


PARTS = ("class", "score", "(", ")", "and", "not", "in", "<", "==", "'", ",", "1", "\\", "\n", "[", "]", "-", ".")


@given(st.text(max_size=40) | st.lists(st.sampled_from(PARTS)).map(" ".join))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    """Nothing else is raised."""
    try:
        parse_where(text, TYPES, "data.where")
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_set_that_does_not_fit(folder: Path) -> None:
    """No index, an empty subset, and an index of another set are one line each."""
    manifest, cache = data_set(folder), Cache(folder / "cache")
    with pytest.raises(ConfigError, match=r"has no index of columns.*`lfm shard`"):
        select(str(folder), manifest.model_copy(update={"columns": None}), "good", cache, "data.where")
    with pytest.raises(ConfigError, match="holds for none of the 5 samples; its columns are class"):
        select(str(folder), manifest, "score > 100", cache, "data.where")
    with pytest.raises(DataError, match="has 5 rows for 2 samples"):
        select(str(folder), manifest.model_copy(update={"shards": manifest.shards[:1]}), "good", cache, "data.where")


def test_parts_of_shards(folder: Path) -> None:
    """The selection in a part of the shards is that of the whole."""
    manifest = data_set(folder)
    selection = select(str(folder), manifest, "width > 0", Cache(folder / "cache"), "data.where")
    assert selection.counts.tolist() == [2, 0, 2]
    part = selection.of_shards(slice(2, None))
    assert part.rows_at(np.array([0, 0]), np.array([0, 1])).tolist() == [0, 2]
    assert selection.of_shards(slice(3, None)).counts.tolist() == []
