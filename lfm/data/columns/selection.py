"""The samples of a data set that a condition holds for, as rows of its shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lfm import storage
from lfm.data.columns.column_index import import_pyarrow, open_index
from lfm.data.columns.where_expression import parse_where
from lfm.data.manifest import Manifest
from lfm.errors import ConfigError, DataError, on_one_line
from lfm.storage.cache import Cache

_LARGEST_SHARD = 10**6  # a row has 6 digits in a key


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected samples of each shard.

    Attributes:
        rows: uint16 or int32 (selected,), rows of the shards, ascending in each shard, one shard after the other.
        counts: int64 (shards,), selected samples of each shard.
    """

    rows: np.ndarray
    counts: np.ndarray

    @cached_property
    def firsts(self) -> np.ndarray:
        """The place of each shard's first row in `rows`, int64 (shards,)."""
        return np.cumsum(self.counts) - self.counts

    def rows_at(self, shards: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the rows of the selected samples with these numbers in their shards, int64."""
        return self.rows[self.firsts[shards] + places].astype(np.int64)

    @staticmethod
    def of_all(sizes: np.ndarray) -> Selection:
        """Return the selection of all samples of shards of these sizes."""
        rows = [np.arange(size, dtype=_dtype(sizes.tolist())) for size in sizes]
        return Selection(np.concatenate([np.zeros(0, _dtype(sizes.tolist())), *rows]), sizes)

    @staticmethod
    def join(parts: Sequence[Selection]) -> Selection:
        """Return the selection in the shards of all parts, one part after the other."""
        return Selection(np.concatenate([part.rows for part in parts]), np.concatenate([part.counts for part in parts]))

    @staticmethod
    def union(parts: Sequence[Selection], num_shards: int) -> Selection:
        """Return the samples that are in any of the parts, each of which begins with the first of `num_shards` shards."""
        if len(parts) == 1 and len(parts[0].counts) == num_shards:
            return parts[0]
        keys = np.unique(np.concatenate([part.keys for part in parts]))
        counts = np.bincount(keys // _LARGEST_SHARD, minlength=num_shards)
        return Selection((keys % _LARGEST_SHARD).astype(np.result_type(*(part.rows for part in parts))), counts)

    @property
    def keys(self) -> np.ndarray:
        """Numbers of the selected samples that ascend with shard and row, int64 (selected,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts) * _LARGEST_SHARD + self.rows

    @property
    def digest(self) -> str:
        """A hash of the selected rows of each shard."""
        content = self.counts.astype("<i8").tobytes() + self.rows.astype("<i4").tobytes()
        return hashlib.sha256(content).hexdigest()

    def contains(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return for each shard and row whether the sample is selected, bool."""
        own, keys = self.keys, shards * _LARGEST_SHARD + rows
        places = np.searchsorted(own, keys)
        return (places < len(own)) & (own[np.minimum(places, len(own) - 1)] == keys)

    def without(self, places: np.ndarray) -> Selection:
        """Return the selection without samples, int64 (num, 2): shard and row of each."""
        lost = np.isin(self.keys, places[:, 0] * _LARGEST_SHARD + places[:, 1])
        shards = np.repeat(np.arange(len(self.counts)), self.counts)
        return Selection(self.rows[~lost], self.counts - np.bincount(shards[lost], minlength=len(self.counts)))

    def of_shards(self, part: slice) -> Selection:
        """Return the selection in a contiguous part of the shards."""
        counts = self.counts[part]
        first = int(self.firsts[part][0]) if len(counts) else 0
        return Selection(self.rows[first : first + int(counts.sum())], counts)


def select(folder: str, manifest: Manifest, where: str, cache: Cache, place: str) -> Selection:
    """Return the samples of a data set that the expression `where` holds for.

    Memory is 2 bytes for each of them (4 with shards of over 65,536 samples), and some row groups of the columns it names.

    Args:
        place: the key of the expression, for messages.

    Raises:
        ConfigError: the set has no index, the expression is wrong, or it holds for no sample; names the columns.
        DataError: the index is damaged, or of other samples.
    """
    if manifest.columns is None:
        raise ConfigError(
            f"{place}: {folder} has no index of columns; with `pip install lfm[hf]`, run the `lfm shard` and `lfm encode` "
            "that made it again, which adds the index and makes no shard again"
        )
    place = f"{place} {where!r}: {folder}"
    expression = parse_where(where, manifest.columns.types, place)
    sizes = [shard.samples for shard in manifest.shards]
    path = storage.join(folder, manifest.columns.file)
    pyarrow = import_pyarrow(path)
    read = 0
    starts = np.cumsum([0, *sizes])
    counts = np.zeros(len(sizes), np.int64)
    rows = [np.zeros(0, _dtype(sizes))]
    with open_index(folder, manifest.columns, cache) as file:
        try:
            dataset = pyarrow.dataset.dataset(Path(file.name), format="parquet")
            scanner = dataset.scanner(columns={"selected": expression.condition}, use_threads=False)
            for batch in scanner.to_batches():
                mask = batch.column(0).fill_null(False).to_numpy(zero_copy_only=False)
                numbers = np.flatnonzero(mask) + read
                read += len(mask)
                shards = np.searchsorted(starts, numbers, side="right") - 1
                in_set = shards < len(sizes)
                shards, numbers = shards[in_set], numbers[in_set]
                counts += np.bincount(shards, minlength=len(sizes))
                rows.append((numbers - starts[shards]).astype(rows[0].dtype))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({on_one_line(error)}); make it again") from error
    if read != starts[-1]:
        raise DataError(
            f"{path}: has {read:,} rows for {starts[-1]:,} samples; run the command that made {folder} again"
        )
    if not counts.any():
        known = ", ".join(f"{name} ({kind})" for name, kind in manifest.columns.types.items())
        raise ConfigError(f"{place}: it holds for none of the {read:,} samples; its columns are {known}")
    return Selection(np.concatenate(rows), counts)


def _dtype(sizes: Sequence[int]) -> type[np.integer]:
    return np.uint16 if max(sizes, default=0) <= 2**16 else np.int32
