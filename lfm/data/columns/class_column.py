"""The class of each sample of a data set, from its index."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lfm import storage
from lfm.data.columns.column_index import import_pyarrow, open_index
from lfm.data.columns.selection import Selection
from lfm.data.manifest import Manifest
from lfm.errors import ConfigError, DataError, on_one_line
from lfm.storage.cache import Cache


def read_classes(
    folder: str, manifest: Manifest, selection: Selection | None, cache: Cache, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each selected sample, one shard after the other, and the number of them in each shard.

    Args:
        selection: the samples; None for all.
        place: the key that needs the classes, for messages.

    Returns:
        uint16 or int32 (samples,), indices of the manifest's classes, those of one name as one; and int64 (shards,).

    Raises:
        ConfigError: the set has no classes, no index, or pyarrow is not installed.
        DataError: the index is damaged, or of other samples.
    """
    if not manifest.classes:
        raise ConfigError(f"{place}: {folder} has no classes to balance; leave it out, or shard class folders")
    if manifest.columns is None:
        raise ConfigError(
            f"{place}: {folder} has no index of columns; with `pip install lfm[hf]`, run the `lfm shard` and `lfm encode` "
            "that made it again, which adds the index and makes no shard again"
        )
    path = storage.join(folder, manifest.columns.file)
    pyarrow = import_pyarrow(path)
    other = f"{path}: is not of these samples; run the command that made {folder} again"
    names = pyarrow.array([entry.name for entry in manifest.classes], pyarrow.string())
    sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
    codes = np.empty(int(sizes.sum()), np.uint16 if len(names) <= 2**16 else np.int32)
    read = 0
    with open_index(folder, manifest.columns, cache) as file:
        try:
            dataset = pyarrow.dataset.dataset(Path(file.name), format="parquet")
            for batch in dataset.scanner(columns=["class"], use_threads=False).to_batches():
                part = pyarrow.compute.index_in(batch.column(0), names)
                if part.null_count or read + len(part) > len(codes):
                    raise DataError(other)
                codes[read : read + len(part)] = part.to_numpy()
                read += len(part)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({on_one_line(error)}); make it again") from error
    if read != len(codes):
        raise DataError(other)
    if selection is None:
        return codes, sizes
    starts = np.repeat(np.cumsum(sizes) - sizes, selection.counts)
    return codes[starts + selection.rows], selection.counts
