"""Files by local path or by URL: every byte that is not local goes through here, and nothing else imports fsspec.

What a reader sees under its final name is whole: a local file is written under a temporary name, flushed to the disk and
renamed; a remote one is written locally first and then put as one object. (Leaving fsspec's own `open(url, "wb")` by an
exception would commit the truncated object.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from lfm.errors import DataError, StorageError

TEMPORARY_PREFIX = ".writing-"
_PIECE = 1 << 20


def is_local(path: str) -> bool:
    """Whether `path` is a plain local path and not a URL such as s3://bucket/name."""
    return "://" not in path


def join(folder: str, *names: str) -> str:
    """The path or URL of an entry of `folder`."""
    return "/".join([folder.rstrip("/") or "/", *names])


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what the file system or fsspec raises into one line that names the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file") from error
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(f"{path}: no space left on the disk; make room and run the same command") from error
        raise StorageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def exists(path: str) -> bool:
    """Whether something is there."""
    with _naming(path):
        filesystem, inner = url_to_fs(path)
        return bool(filesystem.exists(inner))


def sizes(folder: str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in `folder`, by one listing; empty where there is no such folder."""
    with _naming(folder):
        filesystem, inner = url_to_fs(folder)
        filesystem.invalidate_cache(inner)
        try:
            entries = filesystem.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}


def find(folder: str) -> list[str]:
    """The paths, relative to `folder` and sorted, of all files below it, leaving hidden ones out.

    Raises:
        StorageError: there is no such folder.
    """
    with _naming(folder):
        filesystem, inner = url_to_fs(folder)
        if not filesystem.isdir(inner):
            raise StorageError(f"{folder}: no such folder")
        below = (name[len(inner.rstrip("/")) + 1 :] for name in filesystem.find(inner))
        return sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))


def open_read(path: str) -> IO[bytes]:
    """A binary file object for reading from the start."""
    with _naming(path):
        return fsspec.open(path, "rb").open()


def read_bytes(path: str) -> bytes:
    """The whole content."""
    with _naming(path), fsspec.open(path, "rb") as file:
        return file.read()


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
def writing(path: str) -> Iterator[Path]:
    """A local temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    It stays locked while it is written, so that `sweep` tells what a killed writer left from what is still being
    written.
    """
    if is_local(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    name = path.rsplit("/", 1)[-1]
    unique = f"{TEMPORARY_PREFIX}{name}.{socket.gethostname()}.{os.getpid()}"
    temporary = Path(path).with_name(unique) if is_local(path) else Path(tempfile.gettempdir()) / unique
    with _naming(path):
        try:
            with temporary.open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield temporary
                _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: str) -> None:
    if is_local(path):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    else:
        filesystem, inner = url_to_fs(path)
        filesystem.put_file(str(temporary), inner)


def write_bytes(path: str, content: bytes) -> None:
    """Publish `content` under `path` in one step."""
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str, value: Any) -> None:
    """Publish `value` as indented JSON in one step."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
    with _naming(path):
        filesystem, inner = url_to_fs(path)
        if filesystem.exists(inner):
            filesystem.rm(inner, recursive=True)


def sweep(folder: str) -> None:
    """Remove the temporary files that killed writers left in a local `folder`; those of living writers stay."""
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*") if is_local(folder) else ():
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


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


@dataclass(frozen=True)
class Cache:
    """Local copies of remote files, shared by all processes of a node; local files are used where they are."""

    folder: Path = field(default_factory=lambda: Path.home() / ".cache" / "lfm")

    def fetch(self, path: str, size: int, crc32: int) -> Path:
        """The local path of a file whose size in bytes and crc32 are known.

        One process downloads, the others wait for it: the kernel drops a dead process's lock.

        Raises:
            StorageError: it cannot be read.
            DataError: what arrived is not what the manifest lists.
        """
        if is_local(path):
            local = Path(path)
            if not local.is_file():
                raise StorageError(f"{path}: no such file")
            if local.stat().st_size != size:
                raise DataError(
                    f"{path}: {local.stat().st_size} bytes, the manifest lists {size}; make the shard again"
                )
            return local
        identity = hashlib.sha256(f"{path} {size} {crc32}".encode()).hexdigest()[:32]
        local = self.folder / f"{identity}-{path.rsplit('/', 1)[-1]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{identity}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (local.is_file() and local.stat().st_size == size):
                self._download(path, local, size, crc32)
        return local

    def _download(self, path: str, local: Path, size: int, crc32: int) -> None:
        with writing(str(local)) as temporary:
            with open_read(path) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, _PIECE)
            arrived = checksums(temporary)
            if (arrived.bytes, arrived.crc32) != (size, crc32):
                raise DataError(
                    f"{path}: arrived with {arrived.bytes} bytes and checksum {arrived.crc32:08x}, "
                    f"the manifest lists {size} and {crc32:08x}; make the shard again"
                )
