"""Files by local path or by URL: every byte that is not local goes through here, and nothing else imports fsspec.

What a reader sees under its final name is whole: a local file is written under a temporary name, flushed to the disk and
renamed; a remote one is written locally first and then put as one object. (Leaving fsspec's own `open(url, "wb")` by an
exception would commit the truncated object.) While the network or the store fails, a request is made again for ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lfm.errors import ConfigError, DataError, LfmError, StorageError
from lfm.storage.retry import T, patiently

TEMPORARY_PREFIX = ".writing-"
_PIECE = 1 << 20
_NO_SPACE = "{}: no space left on the disk; make room and run the same command"


def is_local(path: str) -> bool:
    """Whether `path` is a plain local path and not a URL such as s3://bucket/name."""
    return "://" not in path


def join(folder: str, *names: str) -> str:
    """The path or URL of an entry of `folder`."""
    return "/".join([folder.removesuffix("/") if not folder.endswith("://") else folder[:-1], *names])


def parent(folder: str) -> str:
    """The folder that a folder is in; itself where there is none."""
    if is_local(folder):
        return str(Path(folder).resolve().parent)
    above = folder.rstrip("/").rpartition("/")[0]
    return folder if above.endswith("/") else above


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn what the file system or fsspec raises into one line that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file") from error
    except LfmError:
        raise
    except Exception as error:  # each protocol's library raises its own kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(_NO_SPACE.format(path)) from error
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: {' '.join(str(reason).split())}") from error


def _at(path: str, request: Callable[[AbstractFileSystem, str], T], *, anew: bool = False) -> T:
    """What `request` makes of the file system of a URL and the name in it; `anew` forgets earlier listings."""

    def once() -> T:
        filesystem, inner = url_to_fs(path)
        if anew:
            filesystem.invalidate_cache(inner)
        return request(filesystem, inner)

    with naming(path):
        return patiently(path, once)


def require_apart(source: str, dest: str) -> None:
    """See that what is read is not where the result goes, where `--overwrite` would remove it.

    Raises:
        ConfigError: it is.
    """
    one, other = (Path(path).resolve() if is_local(path) else path.rstrip("/") for path in (source, dest))
    if one == other:
        raise ConfigError(f"{dest}: is what is to be read; choose another folder for the result")


def exists(path: str) -> bool:
    """Whether something is there."""
    if is_local(path):
        with naming(path):
            return Path(path).exists()
    return _at(path, lambda filesystem, inner: bool(filesystem.exists(inner)), anew=True)


def sizes(folder: str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in `folder`, by one listing; empty where there is no such folder."""
    if is_local(folder):
        result = {}
        with naming(folder), contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
            for entry in listing:
                with contextlib.suppress(FileNotFoundError):  # another process removes files
                    if entry.is_file():
                        result[entry.name] = entry.stat().st_size
        return result

    def listed(filesystem: AbstractFileSystem, inner: str) -> dict[str, int]:
        try:
            entries = filesystem.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}

    return _at(folder, listed, anew=True)


def find(folder: str) -> list[str]:
    """The paths, relative to `folder` and sorted, of all files below it, leaving hidden ones out.

    Raises:
        StorageError: there is no such folder.
    """

    def below(filesystem: AbstractFileSystem, inner: str) -> list[str]:
        if not filesystem.isdir(inner):
            raise StorageError(f"{folder}: no such folder")
        return [name[len(inner.rstrip("/")) + 1 :] for name in filesystem.find(inner)]

    if is_local(folder):
        if not Path(folder).is_dir():
            raise StorageError(f"{folder}: no such folder")
        with naming(folder):
            found = [path.relative_to(folder).as_posix() for path in _walk(Path(folder))]
    else:
        found = _at(folder, below, anew=True)
    return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a local folder, through links too, but never round in a circle."""
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if os.path.realpath(Path(at, name)) not in seen]
        yield from (path for path in (Path(at, name) for name in names) if path.is_file() or path.is_symlink())


def open_read(path: str) -> IO[bytes]:
    """A binary file object for reading from the start."""
    if is_local(path):
        with naming(path):
            return Path(path).open("rb")
    return _at(path, lambda filesystem, inner: filesystem.open(inner, "rb"))


def read_bytes(path: str) -> bytes:
    """The whole content."""
    if is_local(path):
        with naming(path):
            return Path(path).read_bytes()
    return _at(path, lambda filesystem, inner: bytes(filesystem.cat_file(inner)))


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, or what there is of them, in one request."""
    if not is_local(path):
        return _at(path, lambda filesystem, inner: bytes(filesystem.cat_file(inner, offset, offset + size)))
    with naming(path), Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_json(path: str) -> Any:
    """The parsed content.

    Raises:
        DataError: the file is no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


@contextlib.contextmanager
def writing(path: str, *, flush: bool = True) -> Iterator[Path]:
    """A local temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    It stays locked while it is written, so that `sweep` tells what a killed writer left from what is still being
    written. Without `flush` it survives a killed process, but perhaps not a power cut.
    """
    name = path.rsplit("/", 1)[-1]
    unique = f"{TEMPORARY_PREFIX}{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    temporary = Path(path).with_name(unique) if is_local(path) else Path(tempfile.gettempdir()) / unique
    try:
        with naming(path):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            lock = temporary.open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            try:
                yield temporary
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise StorageError(_NO_SPACE.format(path)) from error
                raise
            with naming(path):
                _publish(temporary, path, flush)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: str, flush: bool) -> None:
    if is_local(path):
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    else:
        _at(path, lambda filesystem, inner: filesystem.put_file(str(temporary), inner))


def write_bytes(path: str, content: bytes, *, flush: bool = True) -> None:
    """Publish `content` under `path` in one step."""
    with writing(path, flush=flush) as temporary:
        temporary.write_bytes(content)


def write_json(path: str, value: Any) -> None:
    """Publish `value` as indented JSON in one step."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none."""

    def gone(filesystem: AbstractFileSystem, inner: str) -> None:
        if filesystem.exists(inner):
            filesystem.rm(inner, recursive=True)

    _at(path, gone)


def sweep(folder: str) -> None:
    """Remove the temporary files that killed writers left in a local `folder`; those of living writers stay."""
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*") if is_local(folder) else ():
        unlink_unlocked(path)


def unlink_unlocked(path: Path) -> bool:
    """Remove a local file that nobody holds a lock of; whether it was."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


@dataclass(frozen=True)
class Checksums:
    """What identifies a file's content."""

    bytes: int
    sha256: str
    crc32: int  # three times as fast to compute: checks every copy that arrives


def checksums(path: Path) -> Checksums:
    """Size and checksums of a local file, read once."""
    sha256, crc32, size = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
            crc32, size = zlib.crc32(piece, crc32), size + len(piece)
    return Checksums(size, sha256.hexdigest(), crc32)
