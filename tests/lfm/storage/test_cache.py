"""Copies are verified, downloaded once and with retries, and evicted when they are needed last."""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import socket
import ssl
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.errors import ConfigError, DataError, LfmError, StorageError
from lfm.storage.cache import Cache, copy_name
from pipelines.common import factory

SMALL = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CONTENT = b"what is in the shard" * 1000
SIZE, CRC32 = len(CONTENT), zlib.crc32(CONTENT)


@pytest.fixture
def remote() -> str:
    path = f"memory://{uuid.uuid4()}/train/000000.tar"
    storage.write_bytes(path, CONTENT)
    return path


def fetch(cache: Cache, path: str, size: int, crc32: int, **options: bool) -> Path:
    """The local path of a file that was opened and closed again."""
    with cache.open(path, size, crc32, **options) as file:
        return Path(file.name)


def visible(folder: Path) -> list[Path]:
    """What a cache holds beside its locks."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("lock-"))


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every pause that was asked for; none is made, but the clock goes on by it."""
    pauses: list[float] = []
    now = time.monotonic()
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: now + sum(pauses))
    return pauses


def one_line(error: pytest.ExceptionInfo[BaseException], path: str) -> bool:
    """Whether the message is one line that begins with the path."""
    return str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


class Failing:
    """Stands for `storage.open_read`: every request breaks off after `after` bytes, `times` times over."""

    def __init__(self, after: int, times: float, error: Exception | None = None) -> None:
        self.after, self.times, self.requests = after, times, 0
        self.error = error or ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    def __call__(self, path: str) -> io.BytesIO:
        self.requests += 1
        content = storage.read_bytes(path)
        return Broken(content, self.after, self.error) if self.requests <= self.times else io.BytesIO(content)


class Broken(io.BytesIO):
    """Gives so many bytes and then fails."""

    def __init__(self, content: bytes, left: int, error: Exception) -> None:
        super().__init__(content)
        self.left, self.error = left, error

    def read(self, size: int | None = -1) -> bytes:
        if not self.left:
            raise self.error
        piece = super().read(min(size or 0, self.left))
        self.left -= len(piece)
        return piece


def test_the_second_fetch_makes_no_request(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    local = fetch(cache, remote, SIZE, CRC32)
    assert local.read_bytes() == CONTENT and visible(tmp_path) == [local]
    monkeypatch.setattr(storage, "open_read", None)
    storage.remove(remote)
    assert fetch(cache, remote, SIZE, CRC32) == local


def test_equal_names_of_other_folders_are_other_files(tmp_path: Path, remote: str) -> None:
    other = remote.replace("/train/", "/val/")
    storage.write_bytes(other, CONTENT[::-1])
    cache = Cache(tmp_path)
    first, second = fetch(cache, remote, SIZE, CRC32), fetch(cache, other, SIZE, zlib.crc32(CONTENT[::-1]))
    assert first.read_bytes() == CONTENT and second.read_bytes() == CONTENT[::-1]


@SMALL
@given(change=st.sampled_from(["size", "crc32", "cut", "flip"]), place=st.integers(0, SIZE - 1))
def test_what_is_not_as_listed_is_refused_and_not_kept(tmp_path: Path, remote: str, change: str, place: int) -> None:
    if change == "cut":
        storage.write_bytes(remote, CONTENT[:place])
    elif change == "flip":
        storage.write_bytes(remote, CONTENT[:place] + bytes([CONTENT[place] ^ 1]) + CONTENT[place + 1 :])
    folder = tmp_path / str(uuid.uuid4())
    with pytest.raises(DataError) as error:
        fetch(Cache(folder), remote, SIZE + (change == "size"), CRC32 ^ (change == "crc32"))
    assert one_line(error, remote)
    assert visible(folder) == []
    storage.write_bytes(remote, CONTENT)
    assert fetch(Cache(folder), remote, SIZE, CRC32).read_bytes() == CONTENT


def test_a_local_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    cache = Cache(tmp_path / "cache")
    assert fetch(cache, str(path), SIZE, CRC32) == path
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError) as error:
        fetch(cache, str(path), SIZE + 1, CRC32)
    assert one_line(error, str(path))
    with pytest.raises(StorageError, match="no such file"):
        fetch(cache, str(tmp_path / "b.tar"), SIZE, CRC32)


def test_a_flipped_bit_in_a_local_file_is_found_at_first_use(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    cache = Cache(tmp_path / "cache")
    assert fetch(cache, str(path), SIZE, CRC32) == path
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    with pytest.raises(DataError, match="checksum") as error:
        fetch(Cache(tmp_path / "cache"), str(path), SIZE, CRC32)
    assert one_line(error, str(path))


def test_a_local_file_is_verified_once_per_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, verified = tmp_path / "a.tar", []
    path.write_bytes(CONTENT)
    original = storage.file_crc32
    monkeypatch.setattr(storage, "file_crc32", lambda path: verified.append(path) or original(path))
    cache = Cache(tmp_path / "cache")
    for _ in range(3):
        fetch(cache, str(path), SIZE, CRC32)
    assert verified == [path]


def test_a_copy_that_was_damaged_is_downloaded_again(tmp_path: Path, remote: str) -> None:
    copy = fetch(Cache(tmp_path), remote, SIZE, CRC32)
    copy.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    cache = Cache(tmp_path)
    assert fetch(cache, remote, SIZE, CRC32).read_bytes() == CONTENT
    assert cache.counts["downloads"] == 1


def test_a_missing_remote_file_and_a_useless_cache_are_one_line(tmp_path: Path, remote: str) -> None:
    with pytest.raises(StorageError) as error:
        fetch(Cache(tmp_path), remote + "x", SIZE, CRC32)
    assert one_line(error, remote + "x") and visible(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LfmError) as error:
        fetch(Cache(tmp_path / "file" / "cache"), remote, SIZE, CRC32)
    assert "\n" not in str(error.value) and str(tmp_path / "file") in str(error.value)


def test_a_download_goes_on_where_it_broke_off(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    failing = Failing(after=7000, times=2)
    monkeypatch.setattr(storage, "open_read", failing)
    cache = Cache(tmp_path)
    assert fetch(cache, remote, SIZE, CRC32).read_bytes() == CONTENT
    assert failing.requests == 3 and cache.counts == {"retries": 2, "downloads": 1}
    assert 0.2 <= no_pauses[0] <= 1 and 0.2 <= no_pauses[1] <= 2


def test_patience_ends_after_ten_minutes_in_one_line(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    monkeypatch.setattr(storage, "open_read", Failing(after=0, times=1e9))
    with pytest.raises(StorageError, match="Connection reset by peer") as error:
        fetch(Cache(tmp_path), remote, SIZE, CRC32)
    assert one_line(error, remote) and visible(tmp_path) == []
    assert 500 < sum(no_pauses) <= 600 and len(set(no_pauses)) == len(no_pauses), "jittered"
    assert 8 < len(no_pauses) < 60


def named(name: str, cause: Exception | None = None) -> Exception:
    """An error of a protocol's library, by its name, raised from `cause`."""
    error: Exception = type(name, (Exception,), {})("x")
    error.__cause__ = cause
    return error


UNKNOWN_HOST = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
LASTING = [
    FileNotFoundError("x"),
    PermissionError("x"),
    ValueError("x"),
    UNKNOWN_HOST,
    ssl.SSLCertVerificationError("x"),
    named("EndpointConnectionError", UNKNOWN_HOST),
    named("NoCredentialsError"),
    *(OSError(number, "x") for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENAMETOOLONG)),
]
TRANSIENT = [
    OSError("x"),
    TimeoutError("x"),
    ConnectionResetError(errno.ECONNRESET, "x"),
    OSError(errno.EIO, "x"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    ssl.SSLEOFError(8, "x"),
    named("EndpointConnectionError", ConnectionRefusedError(errno.ECONNREFUSED, "x")),
    named("ClientPayloadError"),
]


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_a_lasting_error_is_not_retried(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float], error: Exception
) -> None:
    failing = Failing(after=0, times=1e9, error=error)
    monkeypatch.setattr(storage, "open_read", failing)
    with pytest.raises(StorageError) as raised:
        fetch(Cache(tmp_path), remote, SIZE, CRC32)
    assert one_line(raised, remote) and no_pauses == [] and failing.requests == 1


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_a_transient_error_is_retried(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float], error: Exception
) -> None:
    monkeypatch.setattr(storage, "open_read", Failing(after=0, times=2, error=error))
    assert fetch(Cache(tmp_path), remote, SIZE, CRC32).read_bytes() == CONTENT
    assert len(no_pauses) == 2


def test_a_bit_that_flips_on_its_way_is_fetched_again(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = [CONTENT[:-1] + b"?", CONTENT]
    real = storage.open_read

    def open_read(path: str) -> Any:
        storage.write_bytes(path, arrived.pop(0))
        return real(path)

    monkeypatch.setattr(storage, "open_read", open_read)
    cache = Cache(tmp_path)
    assert fetch(cache, remote, SIZE, CRC32).read_bytes() == CONTENT
    assert cache.counts == {"retries": 1, "downloads": 1}


def test_a_full_disk_leaves_nothing_in_the_cache(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "truncate", fail)
    with pytest.raises(StorageError, match="no space left"):
        fetch(Cache(tmp_path), remote, SIZE, CRC32)
    assert visible(tmp_path) == []


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs `script`."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_download_once(tmp_path: Path) -> None:
    """`file://` is a URL like any other: what is behind it is copied."""
    (tmp_path / "000000.tar").write_bytes(CONTENT)
    script = """
import sys, time
from pathlib import Path
from lfm import storage
from lfm.storage.cache import Cache
url, folder, size, crc32 = sys.argv[1:]
read = storage.open_read
def counted(path):
    with Path(folder, "requests").open("a") as file:
        file.write("1\\n")
    time.sleep(0.3)
    return read(path)
storage.open_read = counted
print("ready", flush=True)
sys.stdin.readline()
print(Cache(Path(folder, "cache")).open(url, int(size), int(crc32)).name)
"""
    arguments = (f"file://{tmp_path}/000000.tar", str(tmp_path), str(SIZE), str(CRC32))
    with started(script, *arguments) as first, started(script, *arguments) as second:
        for process in (first, second):
            assert process.stdout and process.stdout.readline() == "ready\n"
        results = []
        for process in (first, second):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in (first, second):
            assert process.stdout
            results.append(process.stdout.readline().strip())
    assert results[0] == results[1]
    assert Path(results[0]).read_bytes() == CONTENT
    assert (tmp_path / "requests").read_text() == "1\n"


# --- the limit ---------------------------------------------------------------------------------------------------


def shards(count: int) -> list[tuple[str, int, int]]:
    """Remote files of 1,000 bytes, as the arguments of `Cache.open`."""
    folder, files = f"memory://{uuid.uuid4()}", []
    for number in range(count):
        content = number.to_bytes(2, "big") * 500
        storage.write_bytes(f"{folder}/{number:06d}.tar", content)
        files.append((f"{folder}/{number:06d}.tar", 1000, zlib.crc32(content)))
    return files


def held(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in visible(folder))


class Reader:
    """Something that reads through a cache."""


def test_the_copy_that_is_needed_last_is_evicted_first(tmp_path: Path) -> None:
    remote, cache, reader = shards(6), Cache(tmp_path, limit=3500), Reader()
    cache.announce(reader, [copy_name(*remote[number]) for number in (2, 5, 4, 0, 3, 1)])
    for number, after in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 2, 4]), (5, [2, 4, 5])):
        cache.open(*remote[number]).close()
        assert held(tmp_path) == after
    assert cache.counts == {"downloads": 6, "evictions": 3}


def test_copies_that_nobody_announced_are_evicted_first_the_oldest_before_the_others(tmp_path: Path) -> None:
    remote, reader = shards(5), Reader()
    for age, number in enumerate((1, 0)):
        copy = fetch(Cache(tmp_path), *remote[number])
        os.utime(copy, (age, age))
    cache = Cache(tmp_path, limit=3000)
    cache.announce(reader, [copy_name(*shard) for shard in remote[2:]])
    for number, after in ((2, [0, 1, 2]), (3, [0, 2, 3]), (4, [2, 3, 4])):
        cache.open(*remote[number]).close()
        assert held(tmp_path) == after


def test_readers_of_one_process_do_not_evict_what_the_others_need_soon(tmp_path: Path) -> None:
    remote, cache, first, second = shards(6), Cache(tmp_path, limit=4000), Reader(), Reader()
    cache.announce(first, [copy_name(*shard) for shard in remote[:3]])
    cache.announce(second, [copy_name(*shard) for shard in remote[3:]])
    for number in (0, 3, 1, 4):
        cache.open(*remote[number]).close()
    cache.open(*remote[5]).close()
    assert 0 in held(tmp_path) and 3 in held(tmp_path), "both are needed next"
    del first
    cache.open(*remote[2]).close()
    assert 3 in held(tmp_path) and 0 not in held(tmp_path), "the order of a reader ends with it"


def test_what_all_readers_keep_open_together_must_fit(tmp_path: Path) -> None:
    cache, first, second = Cache(tmp_path, limit=3000), Reader(), Reader()
    cache.reserve(first, 2000)
    with pytest.raises(ConfigError, match=r"take 4,000 bytes, the cache may hold 3,000") as error:
        cache.reserve(second, 2000)
    assert one_line(error, str(tmp_path))
    cache.reserve(second, 1000)
    del first
    cache.reserve(second, 3000)


def test_the_limit_is_finite_unless_said_otherwise(tmp_path: Path) -> None:
    """Encoding a large data set must not fill the home directory with copies of all its raw shards."""
    assert Cache().limit == Cache(tmp_path).limit == factory.cache(None).limit == factory.cache("x").limit < 1e11
    assert factory.cache(None, None).limit == math.inf and factory.cache(None, 2).limit == 2e9
    assert factory.cache("x", 2) is factory.cache("x", 2), "one for all readers of a process"


def test_what_is_open_or_mapped_stays_even_over_the_limit(tmp_path: Path) -> None:
    remote, cache = shards(4), Cache(tmp_path, limit=1500)
    first = cache.open(*remote[0])
    with cache.open(*remote[1]) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cache.open(*remote[2]).close()
    assert held(tmp_path) == [0, 1, 2]
    first.close()
    mapped.close()
    cache.open(*remote[3]).close()
    assert held(tmp_path) == [3]


def test_two_runs_on_one_small_cache_read_what_is_right(tmp_path: Path) -> None:
    script = """
import sys, json
from pathlib import Path
from lfm.storage.cache import Cache
folder, place, seed = sys.argv[1:]
import random
random.seed(int(seed))
cache = Cache(Path(place), limit=2500)
files = json.loads(Path(folder, "list").read_text())
for _ in range(150):
    number = random.randrange(len(files))
    with cache.open(*files[number]) as file:
        assert file.read() == number.to_bytes(2, "big") * 500
print("right")
"""
    files = []
    for number in range(6):
        content = number.to_bytes(2, "big") * 500
        (tmp_path / f"{number:06d}.tar").write_bytes(content)
        files.append((f"file://{tmp_path}/{number:06d}.tar", 1000, zlib.crc32(content)))
    (tmp_path / "list").write_text(json.dumps(files))
    arguments = (str(tmp_path), str(tmp_path / "cache"))
    with started(script, *arguments, "1") as first, started(script, *arguments, "2") as second:
        for process in (first, second):
            assert process.communicate()[0] == "right\n"
    assert len(held(tmp_path / "cache")) <= 4


def test_killed_while_it_downloads(tmp_path: Path) -> None:
    """The next run is right, and clears up."""
    script = """
import sys, time
from pathlib import Path
from lfm import storage
from lfm.storage.cache import Cache
read = storage.open_read
def slow(path):
    print("downloading", flush=True)
    time.sleep(60)
storage.open_read = slow
Cache(Path(sys.argv[2])).open(sys.argv[1], 1000, 0)
"""
    content = bytes(1000)
    (tmp_path / "000000.tar").write_bytes(content)
    url, folder = f"file://{tmp_path}/000000.tar", tmp_path / "cache"
    with started(script, url, str(folder)) as process:
        assert process.stdout and process.stdout.readline() == "downloading\n"
        process.kill()
    assert len(visible(folder)) == 1, "it leaves a temporary file"
    for _ in range(2):
        assert fetch(Cache(folder), url, 1000, zlib.crc32(content)).read_bytes() == content
    assert [path.suffix for path in visible(folder)] == [".tar"]
    assert not visible(folder)[0].name.startswith(".")


def test_a_file_system_without_locks_can_hold_a_cache(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    files, cache = shards(4), Cache(tmp_path, limit=2000)
    for file in files:
        assert fetch(cache, *file).stat().st_size == 1000
    assert len(held(tmp_path)) == 2
