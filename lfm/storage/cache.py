"""Local copies of remote shards, bounded in size and shared by all processes of a machine.

    lock-ab                      held by the process that downloads one of the shards whose names begin with ab
    lock-room                    held while copies are evicted: copies and downloads together never exceed the limit
    ab12...-000017.tar           a copy, verified after its download; its readers hold a shared lock on it; one of
                                 parts of a file ends with the checksum of its bytes
    .writing-ab12...             a download in progress, of its final size

All locks belong to the kernel (flock) and end with the process that holds them. A copy is evicted only while no process has
it open. Training announces the order in which it needs shards, so that the copy that is needed last is evicted first (Belady,
1966). If half of a data set fits, half of all opens then find a copy; evicting the least recently used would find 16 %, since
every epoch has another order. Copies that nobody announced go before those, the oldest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

from lfm import storage
from lfm.errors import ConfigError, DataError, StorageError
from lfm.storage.files import CHUNK_BYTES
from lfm.storage.locks import is_at, lock, remove_unlocked
from lfm.storage.retry import with_retries

DEFAULT_LIMIT = 50e9  # bytes
_ATTEMPTS = 3  # downloads of a file whose checksum is wrong: the network may have changed a bit
_CHECKSUM_BYTES = 4
_CRC32_WITH_CHECKSUM = 0x2144DF1C  # of any bytes that end with their own crc32, least significant byte first
_REPAIR = "remove it and its record, and make it again (training can leave it out: data.skip_shards)"


@dataclass(frozen=True, eq=False)
class Cache:
    """Verified local copies of remote files; local files are read in place.

    All readers of one process should share one Cache, which then protects the shards that any of them needs soon.

    Args:
        folder: of the copies; by default ~/.cache/lfm.
        limit: bytes of all copies together; open copies stay even if they exceed it.

    Attributes:
        counts: cache_hits, downloads, retries and evictions of this process.
    """

    folder: Path = field(default_factory=lambda: Path.home() / ".cache" / "lfm")
    limit: float = DEFAULT_LIMIT
    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _verified: set[tuple[str, int, int, int]] = field(default_factory=set, repr=False)
    _reservations: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary, repr=False)
    _orders: WeakKeyDictionary[Any, dict[str, int]] = field(default_factory=WeakKeyDictionary, repr=False)

    def open(self, path: str, size: int, crc32: int) -> IO[bytes]:
        """Open a file of known size and checksum for reading, through a local copy if it is remote.

        The copy is not evicted as long as the file, or a map of it, is open. Every download is verified. Of a local file or
        copy the size is checked, and the checksum when this process opens it for the first time.

        Raises:
            StorageError: the file cannot be read.
            DataError: its size or checksum differs.
        """
        if storage.is_local(path):
            if not Path(path).is_file():
                raise StorageError(f"{path}: no such file; run the command that made its folder again to make it")
            _verify(path, Path(path).stat().st_size, size, self._crc32_at_first_use(Path(path), crc32), crc32)
            return storage.open_read(path)
        copy = self.folder / copy_name(path, size, crc32)
        return self._open(copy, size, crc32, lambda temporary: self._download(path, temporary, size, crc32))

    def open_parts(self, path: str, size: int, crc32: int, ranges: Sequence[tuple[int, int]]) -> IO[bytes]:
        """Open a copy of ranges of bytes, start and end of each, of a remote file: one after the other, and a checksum.

        `size` and `crc32` of the whole file identify it. They cannot be verified without reading it; the copy's own checksum
        is. The same holds for the copy as in `open`.

        Raises:
            StorageError: the file cannot be read, or is shorter.
        """
        copy = self.folder / copy_name(path, size, crc32, ranges)

        def write(temporary: Path) -> None:
            content = storage.read_ranges(path, ranges)
            with temporary.open("r+b") as file:
                file.write(content + storage.crc32(content).to_bytes(_CHECKSUM_BYTES, "little"))
                os.fsync(file.fileno())

        return self._open(copy, size_of_parts(ranges), _CRC32_WITH_CHECKSUM, write)

    def _open(self, copy: Path, size: int, crc32: int, write: Callable[[Path], None]) -> IO[bytes]:
        """Open a copy, which `write` fills if there is none."""
        with self._locked(copy.name[:2]):
            if file := _open_copy(copy, size):
                if self._crc32_at_first_use(copy, crc32) == crc32:
                    self._count("cache_hits")
                    return file
                file.close()
                remove_unlocked(copy, without_locks=True)
            while not (file := _open_copy(copy, size)):  # another process may evict it at once
                self._make(copy, size, write)
            return file

    def _crc32_at_first_use(self, path: Path, crc32: int) -> int:
        """Return the checksum of a local file, or `crc32` if this process has found the unchanged file to have it."""
        with storage.storage_errors(str(path)):
            status = path.stat()
            identity = (str(path), status.st_ino, status.st_mtime_ns, crc32)
            if identity in self._verified:
                return crc32
            actual = storage.file_crc32(path)
        if actual == crc32:
            self._verified.add(identity)
        return actual

    def reserve(self, reader: object, size: int) -> None:
        """Declare that `reader` keeps copies of up to `size` bytes open at a time, until it is garbage collected.

        Raises:
            ConfigError: the readers of this process need more than the limit.
        """
        self._reservations[reader] = size
        needed = sum(self._reservations.values())
        if needed > self.limit:
            raise ConfigError(
                f"{self.folder}: the shards that are open at the same time take {needed:,} bytes, the cache may hold "
                f"{self.limit:,.0f}; raise its limit or lower the window"
            )

    def announce(self, reader: object, copies: Iterable[str]) -> None:
        """Declare the order in which `reader` will open files next, as names of `copy_name`."""
        order = {name: place for place, name in enumerate(copies)}
        with self._lock:
            self._orders[reader] = order

    def _next_use(self, name: str) -> float:
        """How soon any reader needs a copy again: infinite if nobody announced it."""
        with self._lock:
            return min((order.get(name, math.inf) for order in self._orders.values()), default=math.inf)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with storage.storage_errors(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / f"lock-{name}").open("wb")
        with file:
            lock(file)
            yield

    def _make(self, copy: Path, size: int, write: Callable[[Path], None]) -> None:
        with contextlib.ExitStack() as stack:
            with self._locked("room"):
                self._make_room(size)
                temporary = stack.enter_context(storage.writing(str(copy), flush=False))
                os.truncate(temporary, size)  # it counts in full from now on
            write(temporary)
            with self._locked("room"):  # a scan of the folder could miss a file that is being renamed
                stack.close()
        self._count("downloads")

    def _download(self, path: str, temporary: Path, size: int, crc32: int) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            actual = self._transfer(path, temporary)
            try:
                _verify(path, actual[0], size, actual[1], crc32)
                break
            except DataError:
                if attempt == _ATTEMPTS:
                    raise
            self._count("retries")

    def _transfer(self, path: str, temporary: Path) -> tuple[int, int]:
        """Download a file, resuming after each failed request; return its size and crc32."""
        size = crc32 = 0

        def resume() -> None:
            nonlocal size, crc32
            with storage.open_read(path) as source, temporary.open("r+b") as target:
                source.seek(size)
                target.seek(size)
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    crc32, size = storage.crc32(chunk, crc32), size + len(chunk)
                target.truncate()
                os.fsync(target.fileno())

        with storage.storage_errors(path):
            with_retries(path, resume, lambda: self._count("retries"))
        return size, crc32

    def _make_room(self, size: int) -> None:
        """Evict copies until `size` more bytes fit or all that remain are open; sweep leftovers of killed writers."""
        storage.sweep(str(self.folder))
        if self.limit == math.inf:
            return
        files = {}
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                files[Path(entry.path)] = entry.stat()
        excess = sum(stat.st_size for stat in files.values()) + size - self.limit
        copies = [path for path in files if path.suffix in (".tar", ".parquet") and not path.name.startswith(".")]
        for path in sorted(copies, key=lambda path: (-self._next_use(path.name), files[path].st_mtime)):
            if excess <= 0:
                break
            if remove_unlocked(path, without_locks=True):  # an evicted file can be read as long as it is open
                excess -= files[path].st_size
                self._count("evictions")

    def _count(self, event: str) -> None:
        with self._lock:
            self.counts[event] += 1


def copy_name(path: str, size: int, crc32: int, ranges: Sequence[tuple[int, int]] = ()) -> str:
    """Return the name of the copy of a remote file, or of ranges of it, which is another one for other content."""
    content = f"{path} {size} {crc32}" + (f" {list(ranges)}" if ranges else "")
    identity = hashlib.sha256(content.encode()).hexdigest()[:32]
    return f"{identity}-{path.rsplit('/', 1)[-1]}"


def size_of_parts(ranges: Sequence[tuple[int, int]]) -> int:
    """Return the size in bytes of a copy of ranges of a file."""
    return sum(end - start for start, end in ranges) + _CHECKSUM_BYTES


def _open_copy(copy: Path, size: int) -> IO[bytes] | None:
    """Open a copy and protect it against eviction; return None if there is none of that size."""
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
        file = stack.enter_context(copy.open("rb"))
        lock(file, shared=True)
        if is_at(file, copy) and os.fstat(file.fileno()).st_size == size:
            stack.pop_all()
            return file
    return None


def _verify(path: str, actual_size: int, size: int, actual_crc32: int, crc32: int) -> None:
    """Raise a DataError if a file is not the one that the manifest lists."""
    if actual_size != size:
        raise DataError(f"{path}: {actual_size} bytes, the manifest lists {size}; {_REPAIR}")
    if actual_crc32 != crc32:
        raise DataError(f"{path}: checksum {actual_crc32:08x}, the manifest lists {crc32:08x}; {_REPAIR}")
