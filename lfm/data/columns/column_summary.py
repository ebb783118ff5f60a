"""The columns of a data set in lines: how many samples have a value, and how the values are distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lfm.data.columns.column_index import import_pyarrow, open_index, read_columns
from lfm.data.manifest import ColumnsRecord
from lfm.errors import printable
from lfm.storage import join
from lfm.storage.cache import Cache

NUM_BINS = 16
MOST_VALUES = 5  # of a text column that are listed
LONGEST_VALUE = 24  # characters
_BARS = " ▁▂▃▄▅▆▇█"


def summarize_columns(folder: str, record: ColumnsRecord, cache: Cache) -> Iterator[str]:
    """Yield a line for each column: a histogram of numbers, the most frequent values of others; one column in memory at a time.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError, StorageError: the index is missing or damaged.
    """
    path = join(folder, record.file)
    pyarrow = import_pyarrow(path)
    with open_index(folder, record, cache) as file:
        for name, kind in record.types.items():
            column = read_columns(file, [name], path)[name]
            values = column.drop_null()
            missing = f", {column.null_count:,} missing" if column.null_count else ""
            if not len(values):
                text = "no values"
            elif kind in ("int", "float"):
                text = _histogram(values.to_numpy())
            else:
                text = _frequent(values, pyarrow.compute)
            yield f"{name} ({kind}): {text}{missing}"


def _histogram(values: np.ndarray) -> str:
    """Return the range of numbers and their histogram over it, a bar for each bin."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not finite"
    low, high = finite.min().item(), finite.max().item()
    if low == high:
        return f"{low:g} everywhere"
    with np.errstate(over="ignore"):
        is_wide = not np.isfinite(np.float64(high) - np.float64(low))
    counts, _ = np.histogram(finite / 4 if is_wide else finite, bins=NUM_BINS)
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return f"{low:g} {''.join(_BARS[height] for height in heights)} {high:g}, median {np.median(finite):g}"


def _frequent(values: Any, compute: Any) -> str:
    """Return the number of different values, and the most frequent ones with their counts."""
    counts = compute.value_counts(values)
    if len(counts) == len(values):
        return f"{len(counts):,} different values, such as {_short(values[0].as_py())}"
    numbers = counts.field("counts").to_numpy()
    places = np.argsort(-numbers, kind="stable")[:MOST_VALUES]
    shown = [f"{_short(counts.field('values')[int(place)].as_py())} {numbers[place]:,}" for place in places]
    return f"{len(counts):,} different values: {', '.join(shown)}{', ...' if len(counts) > MOST_VALUES else ''}"


def _short(value: Any) -> str:
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
