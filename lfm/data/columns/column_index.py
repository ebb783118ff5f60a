"""The index of a data set: `columns.parquet`, one row per sample, in the order of the shards and of the samples in them.

    key, class, source       text: the sample's key, the name of its class, and where its image came from
    width, height            int: size of the original image in pixels
    others                   the columns of the label files that the set was made from

Latents have the index of the raw shards that they were encoded from, since their shards hold the same samples. The file is read
and written by pyarrow, which is an extra.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lfm import storage
from lfm.data.manifest import INDEX, ColumnsRecord, ColumnType, Manifest
from lfm.errors import ConfigError, DataError, on_one_line
from lfm.storage.cache import Cache

ROWS_PER_GROUP = 2**18


def import_pyarrow(path: str) -> Any:
    """Return the module pyarrow with its parts for parquet.

    Raises:
        ConfigError: it is not installed; names `path`, which needs it.
    """
    try:
        import pyarrow.compute
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: the index of columns needs `pip install lfm[hf]`") from error
    return pyarrow


def write_index(
    folder: str, parts: Iterable[Mapping[str, Sequence[Any]]], types: Mapping[str, ColumnType], file: str = INDEX
) -> ColumnsRecord:
    """Write the index of a data set, equal bytes for equal input; return its record for the manifest.

    Args:
        folder: path or URL of the data set.
        parts: the columns of each shard, by name; None where a sample has no value.
        types: of all columns.
        file: name of the index in the folder.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    path = storage.join(folder, file)
    pyarrow = import_pyarrow(path)
    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64(), "text": pyarrow.string(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in types.items()])
    pending: list[Any] = []

    def write_pending() -> None:
        if pending:
            writer.write_table(pyarrow.concat_tables(pending).combine_chunks())
            pending.clear()

    with storage.writing(path) as temporary:
        with pyarrow.parquet.ParquetWriter(
            temporary, schema, compression="zstd", write_page_checksum=True, store_schema=False
        ) as writer:
            for part in parts:
                arrays = [pyarrow.array(part[field.name], field.type) for field in schema]
                pending.append(pyarrow.Table.from_arrays(arrays, schema=schema))
                if sum(table.num_rows for table in pending) >= ROWS_PER_GROUP:
                    write_pending()
            write_pending()
        size, crc32 = temporary.stat().st_size, storage.file_crc32(temporary)
    return ColumnsRecord(bytes=size, crc32=crc32, types=dict(types), file=file)


def open_index(folder: str, record: ColumnsRecord, cache: Cache) -> IO[bytes]:
    """Open an index that equals its record, through a local copy if it is remote.

    Raises:
        DataError, StorageError: it is missing or another file.
    """
    path = storage.join(folder, record.file)
    try:
        return cache.open(path, record.bytes, record.crc32)
    except DataError as error:
        raise DataError(f"{str(error).split(';')[0]}; run the command that made {folder} again") from error


def copy_index(source: str, dest: str, record: ColumnsRecord, cache: Cache) -> None:
    """Copy the verified index of one data set to another one."""
    with open_index(source, record, cache) as file, storage.writing(storage.join(dest, record.file)) as temporary:
        shutil.copyfile(file.name, temporary)


def rows_by_shard(folder: str, manifest: Manifest, cache: Cache) -> Iterator[dict[str, list[Any]]]:
    """Yield the rows of each shard of a data set that has an index, as lists by the name of the column.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError, StorageError: the index is missing, damaged or of other samples.
    """
    assert manifest.columns is not None, "the data set has an index"
    path = storage.join(folder, manifest.columns.file)
    pyarrow = import_pyarrow(path)
    with open_index(folder, manifest.columns, cache) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(Path(file.name)).iter_batches()
            rows = pyarrow.Table.from_batches([], pyarrow.parquet.read_schema(Path(file.name)))
            for shard in manifest.shards:
                while rows.num_rows < shard.samples and (batch := next(batches, None)) is not None:
                    rows = pyarrow.concat_tables([rows, pyarrow.Table.from_batches([batch])])
                if rows.num_rows < shard.samples:
                    raise DataError(f"{path}: is not of these samples; run the command that made {folder} again")
                yield rows.slice(0, shard.samples).to_pydict()
                rows = rows.slice(shard.samples)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({on_one_line(error)}); make it again") from error


def read_columns(file: IO[bytes], names: Sequence[str], name: str) -> Any:
    """Return columns of an open index as a pyarrow Table.

    Raises:
        DataError: it cannot be read.
    """
    pyarrow = import_pyarrow(name)
    try:
        return pyarrow.parquet.read_table(Path(file.name), columns=list(names), page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read ({on_one_line(error)}); run the command that made it again") from error
