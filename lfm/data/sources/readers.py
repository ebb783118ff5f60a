"""Readers of a source's bytes: functions of (root, name), so that any process can read any item.

read_file     root is a folder                    name is a path in it
lmdb_value    root is an LMDB environment         name is a key
tar_member    root is a folder of tars            name is `TAR#OFFSET+SIZE#MEMBER`
zip_member    root is a folder of zips            name is `ZIP#MEMBER`
table_cell    root is a folder of tables          name is `TABLE#GROUP#ROW#COLUMN`; a row group of parquet, or 0
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lfm import storage
from lfm.data.sources.names import empty_folders, is_image, is_junk
from lfm.data.tar import BLOCK
from lfm.data.transforms import PILLOW_FORMATS
from lfm.errors import ConfigError, DataError, StorageError, on_one_line

NOWHERE = "-"  # the place of a member that a sample does not have
# The tar's name may hold any character, but its suffix and the place end it.
_ZIP_MEMBER = re.compile(r"(.*?\.zip)#", re.DOTALL | re.IGNORECASE)
MOST_TEXT_BYTES = 1 << 16  # of the text or JSON of a sample
MOST_MEMBER_BYTES = 1 << 30
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


@dataclass(frozen=True)
class TarMember:
    """A file in a tar.

    Attributes:
        name: path in the tar.
        item: name for `tar_member`.
        content: of a small file whose suffix was asked for; else None.
    """

    name: str
    item: str
    content: bytes | None


@dataclass
class TarRest:
    """What tars hold beside the files that are read: names of junk, and of folders."""

    junk: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def tar_members(
    root: str, tar: str, read_suffixes: tuple[str, ...] = (), rest: TarRest | None = None
) -> Iterator[TarMember]:
    """Yield the files of a tar in order, without junk.

    Args:
        read_suffixes: those of files whose content is read, too.
        rest: is extended by the names that are not yielded.

    Raises:
        DataError: the tar is damaged or ends early, or an image in it is a link.
    """
    path, rest = storage.join(root, tar), rest or TarRest()
    try:
        with storage.open_read(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    rest.folders.append(member.name.removeprefix("./"))
                    continue
                if is_junk(member.name):
                    rest.junk.append(member.name.removeprefix("./"))
                    continue
                if is_image(member.name) and (member.issym() or member.islnk() or member.issparse()):
                    raise DataError(
                        f"{path}: {member.name} is a link or a sparse file; pack the tar again with the files themselves"
                    )
                if member.isreg() and (is_image(member.name) or not member.name.startswith("__")):
                    is_wanted = member.name.lower().endswith(read_suffixes) if read_suffixes else False
                    content = archive.extractfile(member) if is_wanted else None
                    yield TarMember(
                        member.name,
                        f"{tar}#{member.offset_data}+{member.size}#{member.name}",
                        content.read(MOST_TEXT_BYTES) if content else None,
                    )
            stream.seek(archive.offset)
            if stream.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
                raise DataError(f"{path}: damaged or cut off at byte {archive.offset}; download it again")
    except (tarfile.TarError, ValueError, EOFError) as error:
        reason = error.args[0] if error.args else "it ends early"
        raise DataError(f"{path}: cannot be read as an uncompressed tar ({reason})") from error


def tar_samples(
    root: str, tar: str, text_suffixes: tuple[str, ...] = (), rest: TarRest | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar: by suffix, a `TarMember`; those of `text_suffixes` with content.

    Members are grouped by name as webdataset does it, but those of a sample need not be neighbours. `rest` is as for
    `tar_members`.

    Raises:
        DataError: the tar is damaged or ends early, or a sample has a suffix twice.
    """
    from webdataset.tariterators import group_by_keys  # here, since it imports torch

    path = storage.join(root, tar)
    members = tar_members(root, tar, text_suffixes, rest)
    samples: dict[str, dict[str, Any]] = {}
    try:
        for group in group_by_keys({"fname": member.name, "__url__": path, "data": member} for member in members):
            sample = samples.setdefault(group["__key__"], group)
            twice = [suffix for suffix in sample.keys() & group.keys() if not suffix.startswith("__")]
            if sample is not group and twice:
                raise ValueError(f"{group['__key__']}.{twice[0]} is in it twice")
            sample |= group
        yield from samples.values()
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as an uncompressed tar ({error.args[0]})") from error


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


def inner_name(item: str) -> str:
    """Return the part of an item's name that a person gave: the path in an archive, or the name itself."""
    match = _TAR_MEMBER.match(item) or _ZIP_MEMBER.match(item)
    return item[match.end() :] if match else item


# --- zips --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _zip(path: str, size_and_time: tuple[int, ...]) -> zipfile.ZipFile:
    try:  # given a path, it closes the file when it is collected
        return zipfile.ZipFile(path if storage.is_local(path) else storage.open_read(path))
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a zip ({error}); download it again") from error


def _opened_zip(path: str) -> zipfile.ZipFile:
    """Return an open zip, opened again if the file has changed."""
    if not storage.is_local(path):
        return _zip(path, ())
    with storage.storage_errors(path):
        status = Path(path).stat()
    return _zip(path, (status.st_size, status.st_mtime_ns))


def zip_names(path: str) -> list[str]:
    """Return the names of the files of a zip, sorted.

    Raises:
        DataError: it is no zip, or has a name twice.
    """
    names = [entry.filename for entry in _opened_zip(path).infolist() if not entry.is_dir()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: has {twice} twice; pack it again")
    if outside := [name for name in names if not all(name.split("/")) or ".." in name.split("/") or "\\" in name]:
        raise DataError(f"{path}: has the name {outside[0]}, which is no path in a folder with slashes; pack it again")
    return sorted(names)


def zip_empty_folders(path: str) -> list[str]:
    """Return the folders of a zip that hold nothing, sorted, without hidden ones."""
    names = [entry.filename for entry in _opened_zip(path).infolist()]
    return empty_folders([name.rstrip("/") for name in names if name.endswith("/")], names)


def zip_member(root: str, name: str) -> bytes:
    """Return a member's content, verified by its checksum."""
    match = _ZIP_MEMBER.match(name)
    if match is None:
        raise StorageError(f"{storage.join(root, name)}: is not the name of a zip's member")
    return zip_content(storage.join(root, match[1]), name[match.end() :])


def zip_content(path: str, member: str) -> bytes:
    """Return the content of a member of the zip at `path`."""
    archive = _opened_zip(path)
    try:
        entry = archive.getinfo(member)
        if entry.file_size > MOST_MEMBER_BYTES:
            raise StorageError(f"{path}#{member}: {entry.file_size:,} bytes; larger files are taken for zip bombs")
        return archive.read(entry)
    except KeyError as error:
        raise StorageError(f"{path}#{member}: no such file in the zip") from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise StorageError(f"{path}#{member}: cannot be unpacked ({on_one_line(error)})") from error


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


def table_rows(content: bytes, path: str) -> list[dict[str, Any]]:
    """Return the rows of a parquet file that is small enough for the memory."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: is a table, which needs `pip install lfm[hf]`") from error
    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table ({on_one_line(error)}); download it again") from error


def table_cell(root: str, name: str) -> bytes:
    """Return the bytes of the image in a cell, which holds bytes or Hugging Face's {bytes, path}."""
    path, group, row, column = name.rsplit("#", 3)
    cell = table_column(storage.join(root, path), int(group), column)[int(row)].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise StorageError(f"{storage.join(root, name)}: the cell holds no image's bytes")
    return content
