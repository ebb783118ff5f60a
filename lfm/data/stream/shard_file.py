"""What is fetched of the shards of a source: whole shards, or only the selected samples of remote ones where that saves half.

A sample of a latent shard takes `stride` bytes, so its row tells where they are. Selected samples that are close to each other
are fetched by one request, with those between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lfm import storage
from lfm.data.columns.selection import Selection
from lfm.data.latent_shards import LatentShard, has_stride
from lfm.data.manifest import Manifest
from lfm.data.stream.mixture import LatentSource
from lfm.storage import hub
from lfm.storage.cache import Cache, copy_name, size_of_parts

GAP_BYTES = 1 << 16  # between samples that are fetched together: what a request costs in the time of its latency
LEAST_SAVING = 2  # times fewer bytes than the whole shard


@dataclass(frozen=True)
class ShardFile:
    """The copy of one shard that is read.

    Attributes:
        ranges: bytes of the shard, start and end of each; none if it is read whole.
        rows: int64, the rows in these, ascending; None for all.
    """

    folder: str
    manifest: Manifest
    number: int  # in the manifest
    ranges: tuple[tuple[int, int], ...] = ()
    rows: np.ndarray | None = None

    @property
    def path(self) -> str:
        """Path or URL of the shard."""
        return storage.join(self.folder, self.manifest.shards[self.number].name)

    @property
    def num_bytes(self) -> int:
        """Size of the file that is read."""
        return size_of_parts(self.ranges) if self.ranges else self.manifest.shards[self.number].bytes

    @property
    def copy_name(self) -> str:
        """Name of the cache's copy, if the shard is remote."""
        record = self.manifest.shards[self.number]
        return copy_name(self.path, record.bytes, record.crc32, self.ranges)

    def open(self, cache: Cache) -> tuple[LatentShard, np.ndarray | None]:
        """Open the shard, and return it with the rows that it holds; None for all.

        Raises:
            StorageError: the shard cannot be read.
            DataError: it is not the one that the manifest lists.
        """
        record, members, stride = self.manifest.shards[self.number], self.manifest.members, self.manifest.stride
        if self.rows is not None:
            with cache.open_parts(self.path, record.bytes, record.crc32, self.ranges) as file:
                if has_stride(np.memmap(file, np.uint8, mode="r"), range(len(self.rows)), members, stride):
                    return LatentShard(file, len(self.rows), members, stride, name=self.path), self.rows
            # Another program packed it, with members in other places.
        with cache.open(self.path, record.bytes, record.crc32) as file:
            return LatentShard(file, record.samples, members, stride, name=self.path), None


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """The files of all shards of a source."""

    source: LatentSource

    @cached_property
    def _selection(self) -> Selection | None:
        """The samples that are read in any segment of the training; None for all."""
        views = [view.selection for view in self.source.views] or [self.source.selection]
        selections = [selection for selection in views if selection is not None]
        if len(selections) < len(views):
            return None
        return Selection.union(selections, len(self.source.manifest.shards))

    def __getitem__(self, number: int) -> ShardFile:
        """Return the file of the shard of this number in the source."""
        manifest, folder = self.source.manifest, self.source.folder
        whole = ShardFile(folder, manifest, number)
        if self._selection is None or manifest.stride <= 0 or storage.is_local(folder) or hub.is_on_hub(folder):
            return whole
        rows = self._selection.of_shards(slice(number, number + 1)).rows.astype(np.int64)
        if not len(rows):
            return whole
        breaks = np.flatnonzero((np.diff(rows) - 1) * manifest.stride > GAP_BYTES)
        firsts, ends = rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)] + 1
        if (ends - firsts).sum() * manifest.stride * LEAST_SAVING > manifest.shards[number].bytes:
            return whole
        ranges = tuple(map(tuple, (np.stack([firsts, ends], axis=1) * manifest.stride).tolist()))
        held = np.concatenate([np.arange(first, end) for first, end in zip(firsts, ends, strict=True)])
        return ShardFile(folder, manifest, number, ranges, held)

    def __iter__(self) -> Iterator[ShardFile]:
        """Yield the files of all shards."""
        return (self[number] for number in range(len(self.source.manifest.shards)))
