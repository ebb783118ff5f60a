"""Files by local path or URL. All access to remote files goes through this module, the only importer of fsspec.

A file is complete as soon as it is visible under its final name: a local file is written under a temporary name, flushed
to the disk and renamed; a remote file is written locally first and then uploaded as one object. (Leaving fsspec's own
`open(url, "wb")` by an exception would commit the truncated object.) A request that fails because of the network or the
store is retried for ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from isal.isal_zlib import crc32

from lfm.errors import ConfigError, DataError, LfmError, StorageError, hide_credentials
from lfm.storage import hub
from lfm.storage.locks import is_at, lock, remove_unlocked
from lfm.storage.retry import T, with_retries

TEMPORARY_PREFIX = ".writing-"
CHUNK_BYTES = 1 << 20
LARGEST_FILE = 1 << 30  # bytes of a file that is read whole
LARGEST_JSON = 64 << 20  # its values take up to 25 times as much memory
_unpublished: set[Path] = set()  # temporary files that this process is writing
_SEAL = "lfm_crc32"  # key of the checksum in a sealed JSON file
_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded"}


def is_local(path: str) -> bool:
    """Return whether `path` is a plain local path and not a URL such as s3://bucket/name."""
    return "://" not in path


def join(folder: str, *names: str) -> str:
    """Return the path or URL of an entry of `folder`."""
    return "/".join([folder.removesuffix("/") if not folder.endswith("://") else folder[:-1], *names])


def parent(folder: str) -> str:
    """Return the folder that contains `folder`, or `folder` itself at the top."""
    if is_local(folder):
        return str(Path(folder).resolve().parent)
    above = folder.rstrip("/").rpartition("/")[0]
    return folder if above.endswith("/") else above


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn every error of the file system or fsspec into a StorageError of one line that begins with the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file") from error
    except (NotADirectoryError, FileExistsError) as error:  # the second of making a folder below a file
        raise StorageError(f"{path}: is a file, or lies below one, where a folder is needed; name another") from error
    except IsADirectoryError as error:
        raise StorageError(f"{path}: is a folder, where a file is needed; name another") from error
    except LfmError:
        raise
    except Exception as error:  # each protocol's library raises its own types
        _raise_if_full(path, error)
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: {' '.join(str(reason).split())}") from error


def _raise_if_full(path: str, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in _FULL:
        raise StorageError(f"{path}: {_FULL[error.errno]}; make room and run the same command to resume") from error


def _request(path: str, request: Callable[[AbstractFileSystem, str], T], *, refresh: bool = False) -> T:
    """Return `request(file system of the URL, name in it)`, with retries; `refresh` drops cached listings first."""

    def once() -> T:
        filesystem, inner = url_to_fs(path)
        if refresh:
            filesystem.invalidate_cache(inner)
        return request(filesystem, inner)

    with storage_errors(path):
        return with_retries(path, once)


def require_apart(source: str, dest: str) -> None:
    """Check that the result is not written into the folder that is read, which `overwrite` would empty.

    Raises:
        ConfigError: both are the same folder.
    """
    one, other = (Path(path).resolve() if is_local(path) else path.rstrip("/") for path in (source, dest))
    if one == other:
        raise ConfigError(f"{dest}: source and destination are the same folder; choose another folder for the result")


def _in_hub_cache(path: str) -> str:
    """Return the local copy of a file on the Hugging Face Hub, and other paths and URLs as they are."""
    if not hub.is_on_hub(path):
        return path
    copy = hub.cached_file(path)
    if copy is None:
        raise StorageError(f"{path}: no such file")
    return str(copy)


def exists(path: str) -> bool:
    """Return whether a file or folder exists."""
    if is_local(path):
        with storage_errors(path):
            return Path(path).exists()
    if hub.is_on_hub(path):
        return hub.cached_file(path) is not None
    return _request(path, lambda filesystem, inner: bool(filesystem.exists(inner)), refresh=True)


def sizes(folder: str) -> dict[str, int]:
    """Return names and sizes in bytes of the files directly in `folder`, by one listing; empty if it does not exist."""
    if is_local(folder):
        result = {}
        with storage_errors(folder), contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process renamed or removed it meanwhile
                    if entry.is_file():
                        result[entry.name] = entry.stat().st_size
        return result

    def listed(filesystem: AbstractFileSystem, inner: str) -> dict[str, int]:
        try:
            entries = filesystem.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}

    return _request(folder, listed, refresh=True)


def find(folder: str, hidden: bool = False) -> list[str]:
    """Return the paths, relative to `folder` and sorted, of all files below it.

    Args:
        folder: path or URL.
        hidden: whether files are included whose name, or that of a folder of theirs, begins with a dot.

    Raises:
        StorageError: the folder does not exist.
    """

    def below(filesystem: AbstractFileSystem, inner: str) -> list[str]:
        if not filesystem.isdir(inner):
            raise StorageError(f"{folder}: no such folder")
        return [name[len(inner.rstrip("/")) + 1 :] for name in filesystem.find(inner)]

    if is_local(folder):
        if not Path(folder).is_dir():
            problem = "is a file, where a folder is needed; name another" if Path(folder).exists() else "no such folder"
            raise StorageError(f"{folder}: {problem}")
        with storage_errors(folder):
            names = [path.relative_to(folder).as_posix() for path in _walk(Path(folder))]
    else:
        names = _request(folder, below, refresh=True)
    return sorted(name for name in names if hidden or not any(part.startswith(".") for part in name.split("/")))


def empty_folders(folder: str) -> list[str]:
    """Return the paths, relative to a local folder and sorted, of all folders below it that hold nothing; no hidden ones."""
    empty = [Path(current).relative_to(folder) for current, *inner in os.walk(folder) if not any(inner)]
    return sorted(path.as_posix() for path in empty if not any(part.startswith(".") for part in path.parts))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a local folder, following links but entering no folder twice."""
    seen: set[str] = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(current))
        folders[:] = [name for name in folders if os.path.realpath(Path(current, name)) not in seen]
        yield from (path for path in (Path(current, name) for name in names) if path.is_file() or path.is_symlink())


def open_read(path: str) -> IO[bytes]:
    """Open a file for reading bytes from the start."""
    path = _in_hub_cache(path)
    if is_local(path):
        with storage_errors(path):
            return Path(path).open("rb")
    return _request(path, lambda filesystem, inner: filesystem.open(inner, "rb"))


def read_bytes(path: str, limit: int = LARGEST_FILE) -> bytes:
    """Return the whole content.

    Raises:
        StorageError: the file cannot be read, is no regular file (such as a device or a pipe), or is larger than `limit`.
    """
    path = _in_hub_cache(path)
    if is_local(path):
        with storage_errors(path):
            _check_size(path, require_regular(path), limit)
            with Path(path).open("rb") as file:  # some files report the size 0
                content = file.read(limit + 1)
        _check_size(path, len(content), limit)
        return content

    def read(filesystem: AbstractFileSystem, inner: str) -> bytes:
        _check_size(path, filesystem.size(inner) or 0, limit)
        return bytes(filesystem.cat_file(inner))

    return _request(path, read)


def require_regular(path: str) -> int:
    """Return the size of a local file.

    Raises:
        StorageError: there is none, or it is a folder, device or pipe, reading which might never end.
    """
    with storage_errors(path):
        status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path}: not a regular file")
    return status.st_size


def _check_size(path: str, size: int, limit: int) -> None:
    if size > limit:
        raise StorageError(f"{path}: {size:,} bytes, more than the {limit:,} that such a file may have")


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return up to `size` bytes from `offset` on, by one request; fewer at the end of the file."""
    if not is_local(path):
        return _request(
            path, lambda filesystem, inner: bytes(filesystem.cat_file(inner, start=offset, end=offset + size))
        )
    with storage_errors(path), Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return the bytes from each `start` to its `end`, one range after the other, of a remote file by concurrent requests.

    Raises:
        StorageError: the file cannot be read, or is shorter.
    """
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]

    def read(filesystem: AbstractFileSystem, inner: str) -> bytes:
        parts = filesystem.cat_ranges([inner] * len(ranges), starts, ends, on_error="raise")
        for part, start, end in zip(parts, starts, ends, strict=True):
            if len(part) != end - start:
                raise ConnectionError(f"{len(part)} bytes from {start} on in place of {end - start}")
        return b"".join(parts)

    return _request(path, read)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: str, limit: int = LARGEST_JSON) -> Any:
    """Return the parsed content of a JSON file of at most `limit` bytes, without its seal.

    Raises:
        DataError: the file is not valid JSON, is nested too deeply, or was changed after it was sealed.
    """
    try:
        content = read_bytes(path, limit)
        value = json.loads(content)
        if _SURROGATE.search(
            content
        ):  # a pair of them is one character, a single one can be printed and written nowhere
            json.dumps(value, ensure_ascii=False).encode()
        if isinstance(value, dict) and _SEAL in value and value.pop(_SEAL) != _seal(value):
            raise DataError(f"{path}: damaged: its checksum is another one; restore it, or make it again")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    return value


def _seal(value: Any) -> str:
    """Return the checksum of a JSON value, whatever the order of its keys."""
    return f"{crc32(json.dumps(value, sort_keys=True, separators=(',', ':')).encode()):08x}"


def as_stored(value: Any) -> Any:
    """Return what `read_json` returns after `write_json` of `value`: without tuples and credentials."""
    return json.loads(hide_credentials(json.dumps(value, ensure_ascii=False)))


@contextlib.contextmanager
def writing(path: str, *, flush: bool = True) -> Iterator[Path]:
    """Yield a local temporary file that is published as `path` after the block, or removed if the block raises.

    The file is locked while it is written, so that `sweep` can tell a killed writer's leftover from a living writer's file.

    Args:
        flush: flush the file to the disk first. Without it the file survives a killed process, but maybe not a power cut.
    """
    temporary, file = _locked_temporary(path)
    try:
        with file:
            try:
                yield temporary
            except OSError as error:
                _raise_if_full(path, error)
                raise
            with storage_errors(path):
                _publish(temporary, path, flush)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _unpublished.discard(temporary)


def exit_at_once(code: int) -> NoReturn:
    """End this process without waiting for its threads, and without leaving the temporary files that it is writing."""
    for temporary in list(_unpublished):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    os._exit(code)


def _locked_temporary(path: str) -> tuple[Path, IO[bytes]]:
    """Create the temporary file of `path` and lock it; a sweep between both may remove it, then make another one."""
    with storage_errors(path):
        while True:
            name = path.rsplit("/", 1)[-1]
            unique = f"{TEMPORARY_PREFIX}{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
            temporary = Path(path).with_name(unique) if is_local(path) else Path(tempfile.gettempdir()) / unique
            temporary.parent.mkdir(parents=True, exist_ok=True)
            _unpublished.add(temporary)  # before it exists: a signal may end the process right after
            file = temporary.open("wb")
            lock(file)
            if is_at(file, temporary):
                return temporary, file
            file.close()
            _unpublished.discard(temporary)


def _publish(temporary: Path, path: str, flush: bool) -> None:
    if is_local(path):
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    else:
        upload(temporary, path)


def upload(path: Path, url: str) -> None:
    """Copy a local file to a URL, where readers see it whole or not at all."""
    _request(url, lambda filesystem, inner: filesystem.put_file(str(path), inner))


def download(url: str, path: Path) -> None:
    """Copy the file at a URL to a local path, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if hub.is_on_hub(url):
        shutil.copyfile(_in_hub_cache(url), path)
        return
    _request(url, lambda filesystem, inner: filesystem.get_file(inner, str(path)))


def write_bytes(path: str, content: bytes, *, flush: bool = True) -> None:
    """Write a file in one step: readers see the old content or the new one."""
    with writing(path, flush=flush) as temporary:
        temporary.write_bytes(content)


def write_json(path: str, value: Any, *, sealed: bool = False) -> None:
    """Write `value` as indented JSON in one step, without the credentials of URLs in it.

    Args:
        sealed: add a checksum to `value`, a dictionary, that `read_json` verifies and removes.
    """
    stored = as_stored(value)
    content = stored | {_SEAL: _seal(stored)} if sealed else stored
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: str) -> None:
    """Remove a file or a folder with its content, if it exists."""

    def delete(filesystem: AbstractFileSystem, inner: str) -> None:
        if filesystem.exists(inner):
            filesystem.rm(inner, recursive=True)

    _request(path, delete)


def sweep(folder: str) -> None:
    """Remove the temporary files that killed writers left in a local `folder`, but not those of living writers."""
    if is_local(folder):
        for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
            remove_unlocked(path)


@dataclass(frozen=True)
class Checksums:
    """Size and checksums of a file's content."""

    bytes: int
    sha256: str
    crc32: int  # ten times as fast as sha256; verifies every download and every first use


def checksums(path: Path) -> Checksums:
    """Return size and checksums of a local file, reading it once."""
    sha256, checksum, size = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            checksum, size = crc32(chunk, checksum), size + len(chunk)
    return Checksums(size, sha256.hexdigest(), checksum)


def file_crc32(path: Path) -> int:
    """Return the crc32 of a local file. Mapped, since copying the file into a buffer would take twice as long."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return 0
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            return crc32(mapped)
