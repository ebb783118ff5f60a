"""The index of a data set: `columns.parquet`, one row per sample, in the order of the shards and of the samples in them.

    key, class, source       text: the sample's key, the name of its class, and where its image came from
    width, height            int: size of the original image in pixels
    others                   the columns of the label files that the set was made from

Latents have the index of the raw shards that they were encoded from, since their shards hold the same samples. The file is read
and written by pyarrow, which is an extra.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lfm import storage
from lfm.data.manifest import INDEX, ColumnsRecord, ColumnType
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
    folder: str, parts: Iterable[Mapping[str, Sequence[Any]]], types: Mapping[str, ColumnType]
) -> ColumnsRecord:
    """Write the index of a data set, equal bytes for equal input; return its record for the manifest.

    Args:
        folder: path or URL of the data set.
        parts: the columns of each shard, by name; None where a sample has no value.
        types: of all columns.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    path = storage.join(folder, INDEX)
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
    return ColumnsRecord(bytes=size, crc32=crc32, types=dict(types))


def open_index(folder: str, record: ColumnsRecord, cache: Cache) -> IO[bytes]:
    """Open an index that equals its record, through a local copy if it is remote.

    Raises:
        DataError, StorageError: it is missing or another file.
    """
    path = storage.join(folder, INDEX)
    try:
        return cache.open(path, record.bytes, record.crc32)
    except DataError as error:
        raise DataError(f"{str(error).split(';')[0]}; run the command that made {folder} again") from error


def copy_index(source: str, dest: str, record: ColumnsRecord, cache: Cache) -> None:
    """Copy the verified index of one data set to another one."""
    with open_index(source, record, cache) as file, storage.writing(storage.join(dest, INDEX)) as temporary:
        shutil.copyfile(file.name, temporary)


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
