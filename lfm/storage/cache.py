"""Local copies of remote shards, of bounded size, shared by all processes of a machine without any of them waiting in step.

    lock-ab                      held by the process that fetches one of the shards whose names begin with ab
    lock-room                    held while room is made: what is there and what is on its way is never over the limit
    ab12...-000017.tar           a copy, verified when it arrived; who has it open holds a shared lock on it
    .writing-ab12...             one on its way, as long as it will be

All locks are the kernel's (flock) and end with the process that holds them. A copy is evicted only while nobody has it
open, and of those the one that is needed farthest in the future goes first (Belady, 1966): a training run knows its order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lfm import storage
from lfm.errors import DataError, StorageError
from lfm.storage.retry import patiently

_PIECE = 1 << 20
_ATTEMPTS = 3  # at a copy that is not what it should be: the network may have changed a bit on its way
_REPAIR = "remove it and its record, and make it again (training can leave it out: data.skip_shards)"


def _never(name: str) -> float:
    return math.inf


@dataclass(frozen=True)
class Cache:
    """Where remote files are kept; local ones are used where they are."""

    folder: Path = field(default_factory=lambda: Path.home() / ".cache" / "lfm")
    limit: float = math.inf  # bytes of all copies together; what is open stays all the same
    counts: Counter[str] = field(
        default_factory=Counter, compare=False
    )  # cache_hits, downloads, retries, evictions of this process
    _counting: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def fetch(self, path: str, size: int, crc32: int, *, verify_local: bool = False) -> Path:
        """The local path of a file whose size in bytes and crc32 are known; under a limit it may be evicted any time.

        What arrives is always verified; a file that is local already has its size checked, and its checksum with
        `verify_local`.

        Raises:
            StorageError: it cannot be read.
            DataError: it is not what the manifest lists.
        """
        if not storage.is_local(path):
            with self.open(path, size, crc32) as file:
                return Path(file.name)
        if not Path(path).is_file():
            raise StorageError(
                f"{path}: no such file; run the command that made its folder again, it makes what is missing"
            )
        found = storage.checksums(Path(path)).crc32 if verify_local else crc32
        _require(path, Path(path).stat().st_size, size, found, crc32)
        return Path(path)

    def open(self, path: str, size: int, crc32: int, next_use: Callable[[str], float] = _never) -> IO[bytes]:
        """As `fetch`, but open for reading, and kept for as long as the file, or a map of it, is open.

        `next_use` tells of the name of a copy how soon it is needed again: the smaller, the sooner.
        """
        if storage.is_local(path):
            return self.fetch(path, size, crc32).open("rb")
        local = self.copy_of(path, size, crc32)
        with self._locked(local.name[:2]):
            if file := _held(local, size):
                self._count("cache_hits")
                return file
            while not (file := _held(local, size)):  # another run may evict it at once
                self._download(path, local, size, crc32, next_use)
            return file

    def copy_of(self, path: str, size: int, crc32: int) -> Path:
        """Where the copy of a remote file is, or would be."""
        identity = hashlib.sha256(f"{path} {size} {crc32}".encode()).hexdigest()[:32]
        return self.folder / f"{identity}-{path.rsplit('/', 1)[-1]}"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with storage.naming(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"lock-{name}").open("wb")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _download(self, path: str, local: Path, size: int, crc32: int, next_use: Callable[[str], float]) -> None:
        with contextlib.ExitStack() as stack:
            with self._locked("room"):
                self._make_room(size, next_use)
                temporary = stack.enter_context(storage.writing(str(local), flush=False))
                os.truncate(temporary, size)  # so that it counts in full from now on
            for attempt in range(1, _ATTEMPTS + 1):
                found_size, found_crc32 = self._copy(path, temporary)
                try:
                    _require(path, found_size, size, found_crc32, crc32)
                    break
                except DataError:
                    if attempt == _ATTEMPTS:
                        raise
                self._count("retries")
            with self._locked("room"):  # who counts what is there while a file changes its name may miss it
                stack.close()
        self._count("downloads")

    def _copy(self, path: str, temporary: Path) -> tuple[int, int]:
        """Copy what is at `path`, going on where a request broke off; returns its size and crc32."""
        size = crc32 = 0

        def rest() -> None:
            nonlocal size, crc32
            with storage.open_read(path) as source, temporary.open("r+b") as target:
                source.seek(size)
                target.seek(size)
                while piece := source.read(_PIECE):
                    target.write(piece)
                    crc32, size = zlib.crc32(piece, crc32), size + len(piece)
                target.truncate()
                os.fsync(target.fileno())

        with storage.naming(path):
            patiently(path, rest, lambda: self._count("retries"))
        return size, crc32

    def _make_room(self, size: int, next_use: Callable[[str], float]) -> None:
        """Evict until `size` more bytes fit or all that is left is open; clear up after killed writers."""
        storage.sweep(str(self.folder))
        if self.limit == math.inf:
            return
        files = {}
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # one that arrives changes its name
                files[Path(entry.path)] = entry.stat()
        excess = sum(stat.st_size for stat in files.values()) + size - self.limit
        copies = [path for path in files if path.suffix == ".tar" and not path.name.startswith(".")]
        for path in sorted(copies, key=lambda path: (-next_use(path.name), files[path].st_mtime)):
            if excess <= 0:
                break
            if storage.unlink_unlocked(path):
                excess -= files[path].st_size
                self._count("evictions")

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1


def _held(local: Path, size: int) -> IO[bytes] | None:
    """A copy, open and held against eviction; None where there is none, or none of that size."""
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
        file = stack.enter_context(local.open("rb"))
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        if found.st_nlink and found.st_size == size:
            stack.pop_all()
            return file
    return None


def _require(path: str, found_size: int, size: int, found_crc32: int, crc32: int) -> None:
    """Refuse a file that is not what the manifest lists."""
    if found_size != size:
        raise DataError(f"{path}: {found_size} bytes, the manifest lists {size}; {_REPAIR}")
    if found_crc32 != crc32:
        raise DataError(f"{path}: checksum {found_crc32:08x}, the manifest lists {crc32:08x}; {_REPAIR}")
