"""Readers of a source's bytes: functions of (root, name), so that any process can read any item.

read_file     root is a folder                    name is a path in it
lmdb_value    root is an LMDB environment         name is a key
tar_member    root is a folder of tars            name is `TAR#OFFSET+SIZE#MEMBER`
table_cell    root is a folder of tables          name is `TABLE#GROUP#ROW#COLUMN`; a row group of parquet, or 0
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lfm import storage
from lfm.data.tar import BLOCK
from lfm.data.transforms import PILLOW_FORMATS
from lfm.errors import ConfigError, DataError, StorageError

NOWHERE = "-"  # the place of a member that a sample does not have
# The tar's name may hold any character, but its suffix and the place end it.
_TAR_MEMBER = re.compile(r"(.*?\.tar)#(-|\d+\+\d+)#", re.DOTALL)


def read_file(root: str, name: str) -> bytes:
    """Return a file's content."""
    return storage.read_bytes(storage.join(root, name))


# --- LMDB --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _environment(root: str) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError(f"{root}: is an LMDB, which needs `pip install lfm[lmdb]`") from error
    if not storage.is_local(root):
        raise ConfigError(f"{root}: an LMDB is read by mapping it; copy it to a local disk")
    try:
        environment = lmdb.open(root, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{root}: cannot be read as an LMDB ({error}); copy or download it again") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    actual = storage.sizes(root)["data.mdb"]
    if actual < needed:  # reading beyond its end would kill the process
        raise DataError(f"{root}/data.mdb: cut off: {actual} bytes of {needed}; copy or download it again")
    return environment


def lmdb_keys(root: str) -> Iterator[str]:
    """Yield the keys in the order of the database: 0, 1, 10, 11, ..., 2."""
    with _environment(root).begin() as transaction, transaction.cursor() as cursor:
        for key in cursor.iternext(values=False):
            yield key.decode("utf-8", "replace")


def lmdb_value(root: str, name: str) -> bytes | np.ndarray:
    """Return an encoded image, or an array uint8 (side, side, 3) if the value is raw RGB."""
    with _environment(root).begin() as transaction:
        value = transaction.get(name.encode())
    if value is None:
        raise StorageError(f"{root}: no key {name}")
    side = math.isqrt(len(value) // 3)
    if not side or 3 * side * side != len(value) or _is_encoded(value):
        return value
    return np.frombuffer(value, np.uint8).reshape(side, side, 3)


def _is_encoded(value: bytes) -> bool:
    try:
        Image.open(io.BytesIO(value), formats=PILLOW_FORMATS)
    except (UnidentifiedImageError, OSError, ValueError):
        return False
    return True


# --- tars --------------------------------------------------------------------------------------------------------


def tar_samples(root: str, tar: str) -> Iterator[dict[str, str]]:
    """Yield the samples of a tar as webdataset groups them: by suffix, the name for `tar_member`, or the text of .cls.

    Raises:
        DataError: the tar is damaged or ends early, or a sample has a suffix twice.
    """
    path = storage.join(root, tar)

    def listed(archive: tarfile.TarFile) -> Iterator[dict[str, str]]:
        for member in archive:
            if member.isreg() and not member.name.startswith("__"):
                name = f"{tar}#{member.offset_data}+{member.size}#{member.name}"
                label = archive.extractfile(member) if member.name.lower().endswith(".cls") else None
                data = label.read(100).decode("ascii", "replace").strip() if label else name
                yield {"fname": member.name, "__url__": path, "data": data}

    from webdataset.tariterators import group_by_keys  # here, since it imports torch

    try:
        with storage.open_read(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield from group_by_keys(listed(archive))
            stream.seek(archive.offset)
            if stream.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
                raise DataError(f"{path}: damaged or cut off at byte {archive.offset}; download it again")
    except (tarfile.TarError, ValueError, EOFError) as error:
        reason = error.args[0] if error.args else "it ends early"
        raise DataError(f"{path}: cannot be read as an uncompressed tar ({reason})") from error


def tar_member(root: str, name: str) -> bytes:
    """Return a member's content, by one ranged read."""
    match = _TAR_MEMBER.match(name)
    if match is None:
        raise StorageError(f"{storage.join(root, name)}: is not the name of a tar's member")
    tar, place = match.groups()
    if place == NOWHERE:
        raise StorageError(f"{storage.join(root, name)}: the sample has no image")
    offset, size = map(int, place.split("+"))
    content = storage.read_range(storage.join(root, tar), offset, size)
    if len(content) != size:
        raise StorageError(f"{storage.join(root, name)}: ends after {len(content)} of {size} bytes")
    return content


# --- tables ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open parquet as pyarrow's ParquetFile, and an .arrow stream as a Table, mapped if it is local."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: is a table, which needs `pip install lfm[hf]`") from error
    try:
        mapped = path.endswith(".arrow") and storage.is_local(path)
        with pyarrow.memory_map(path) if mapped else storage.open_read(path) as stream:
            parquet = path.endswith(".parquet")
            yield pyarrow.parquet.ParquetFile(stream) if parquet else pyarrow.ipc.open_stream(stream).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as a table ({str(error).splitlines()[0]}); download it again"
        ) from error


def table_schema(path: str) -> tuple[Any, list[int]]:
    """Return a table's pyarrow schema and the number of rows of each of its groups.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: it is no table.
    """
    with _opened(path) as table:
        if path.endswith(".arrow"):
            return table.schema, [table.num_rows]
        groups = range(table.num_row_groups)
        return table.schema_arrow, [table.metadata.row_group(group).num_rows for group in groups]


@lru_cache(maxsize=4)
def table_column(path: str, group: int, column: str) -> Any:
    """Return one column of a group as pyarrow's ChunkedArray."""
    with _opened(path) as table:
        return (table if path.endswith(".arrow") else table.read_row_group(group, [column]))[column]


def table_cell(root: str, name: str) -> bytes:
    """Return the bytes of the image in a cell, which holds bytes or Hugging Face's {bytes, path}."""
    path, group, row, column = name.rsplit("#", 3)
    cell = table_column(storage.join(root, path), int(group), column)[int(row)].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise StorageError(f"{storage.join(root, name)}: the cell holds no image's bytes")
    return content
