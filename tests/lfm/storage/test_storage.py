"""A visible file is complete, and an error is one line that names the file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.errors import DataError, StorageError

SMALL = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HALF_WRITTEN = """
import sys, time
from lfm import storage
with storage.writing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for files, on the disk and behind fsspec."""
    return str(tmp_path / "place") if request.param == "local" else f"memory://{uuid.uuid4()}"


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs `script`."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def half_written(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing `path`."""
    with started(HALF_WRITTEN, str(path)) as process:
        try:
            assert process.stdout and process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def one_line(error: pytest.ExceptionInfo[BaseException], path: str) -> bool:
    """Whether the message is one line that begins with the path."""
    return str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


# --- reading and writing, wherever it is -------------------------------------------------------------------------


@SMALL
@given(content=st.binary(max_size=300), depth=st.integers(0, 3))
def test_what_is_written_is_read(folder: str, content: bytes, depth: int) -> None:
    path = storage.join(folder, *["sub"] * depth, "name.bin")
    storage.write_bytes(path, content)
    assert storage.exists(path)
    assert storage.read_bytes(path) == content
    with storage.open_read(path) as file:
        assert file.read() == content
    assert storage.sizes(path.rsplit("/", 1)[0])["name.bin"] == len(content)
    storage.remove(path)
    assert not storage.exists(path)
    storage.remove(path)  # once more: nothing happens


def test_json_survives_with_its_letters(folder: str) -> None:
    value = {"name": "é 日本", "list": [1, 2.5, None, True]}
    path = storage.join(folder, "a.json")
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    assert "日本" in storage.read_bytes(path).decode()


def test_find_is_sorted_and_relative_and_leaves_hidden_files_out(folder: str) -> None:
    names = ["b/2.png", "a/10.png", "a/9.png", "top.png", "a/deep/er/1.png"]
    for name in [*names, ".hidden/1.png", "a/._1.png", "__MACOSX/._a.png"]:
        storage.write_bytes(f"{folder}/{name}", b"1")
    assert storage.find(folder) == storage.find(folder + "/") == sorted(names)
    assert storage.sizes(folder) == {"top.png": 1}


def test_a_missing_folder_is_empty_to_sizes_and_an_error_to_find(folder: str) -> None:
    missing = storage.join(folder, "nowhere")
    assert storage.sizes(missing) == {}
    with pytest.raises(StorageError) as error:
        storage.find(missing)
    assert one_line(error, missing)


def test_a_file_that_vanishes_while_a_folder_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a temporary file that another process publishes."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"1")
    with os.scandir(tmp_path) as listing:
        entries = list(listing)
    (tmp_path / "a").unlink()
    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext(entries))
    assert storage.sizes(str(tmp_path)) == {"b": 1}


def test_remove_takes_a_folder_with_all_that_is_in_it(folder: str) -> None:
    storage.write_bytes(f"{folder}/sub/a/b", b"1")
    storage.write_bytes(f"{folder}/keep", b"1")
    storage.remove(f"{folder}/sub")
    assert storage.find(folder) == ["keep"]


@pytest.mark.parametrize("name", ["a b.jpg", "x#1.jpg", "x%20.jpg", "q?.jpg", "s*.jpg", "b[1].jpg", "my::file.jpg"])
def test_odd_names_of_local_files_are_only_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    assert storage.find(str(tmp_path)) == [name]
    assert storage.sizes(str(tmp_path)) == {name: 7}
    assert storage.exists(str(tmp_path / name))
    assert storage.read_bytes(str(tmp_path / name)) == b"content"


def test_links_are_followed(tmp_path: Path) -> None:
    """Subsets of a collection are often made of links; a class that is one must not vanish without a word."""
    for name in ("elsewhere/cats/1.jpg", "here/dogs/2.jpg"):
        storage.write_bytes(str(tmp_path / name), b"1")
    (tmp_path / "here/dogs/3.jpg").symlink_to(tmp_path / "here/dogs/2.jpg")
    (tmp_path / "here/cats").symlink_to(tmp_path / "elsewhere/cats")
    assert storage.sizes(str(tmp_path / "here/dogs")) == {"2.jpg": 1, "3.jpg": 1}
    assert storage.find(str(tmp_path / "here")) == ["cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg"]


def test_a_url_without_a_path_keeps_its_slashes() -> None:
    assert storage.join("memory://", "name") == "memory://name"
    assert storage.join("/", "name") == "/name"
    assert storage.join("a/", "b", "c") == "a/b/c"


# --- atomic ------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("bug"), Stop(), DataError("no")])
def test_a_block_left_by_an_exception_leaves_the_old_content(folder: str, error: BaseException) -> None:
    path = storage.join(folder, "name")
    storage.write_bytes(path, b"old")
    with pytest.raises(type(error)) as raised, storage.writing(path) as temporary:
        temporary.write_bytes(b"new")
        raise error
    assert raised.value is error
    assert storage.read_bytes(path) == b"old"
    assert storage.sizes(folder) == {"name": 3}
    assert not temporary.exists()


def test_nothing_is_seen_under_the_name_before_the_end(folder: str) -> None:
    path = storage.join(folder, "name")
    with storage.writing(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not storage.exists(path)
    assert storage.read_bytes(path) == b"whole"
    assert not temporary.exists()


def test_a_killed_writer_leaves_no_file_under_the_name_and_sweep_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with half_written(path) as process:
        leftover = next(tmp_path.iterdir())
        storage.sweep(str(tmp_path))
        assert leftover.exists(), "its writer is alive"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not path.exists() and leftover.exists()
        storage.sweep(str(tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_sweep_asks_for_a_lock_that_nfs_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS emulates flock by fcntl locks, and an exclusive one needs a file opened for writing (flock(2): EBADF)."""
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        if operation & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    leftover = tmp_path / f"{storage.TEMPORARY_PREFIX}x.host.1"
    leftover.write_bytes(b"")
    storage.sweep(str(tmp_path))
    assert not leftover.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As Lustre without `-o flock`. A sweep leaves all temporary files: any of them may be a living writer's."""

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = str(tmp_path / "name")
    with storage.writing(path) as temporary:
        temporary.write_bytes(b"content")
        storage.sweep(str(tmp_path))
        assert temporary.exists()
    assert storage.read_bytes(path) == b"content"


def test_a_sweep_between_creating_and_locking_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = fcntl.flock, []

    def flock(file: Any, operation: int) -> None:
        if not swept:
            swept.append(file.name)
            storage.sweep(str(tmp_path))
            assert not Path(file.name).exists()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    storage.write_bytes(str(tmp_path / "name"), b"content")
    assert swept and storage.read_bytes(str(tmp_path / "name")) == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_two_processes_leave_one_whole_version(tmp_path: Path) -> None:
    script = """
import sys
from lfm import storage
for _ in range(60):
    storage.write_bytes(sys.argv[1], sys.argv[2].encode() * 200_000)
"""
    path = tmp_path / "name"
    with started(script, str(path), "a") as first, started(script, str(path), "b") as second:
        seen = set()
        while first.poll() is None or second.poll() is None:
            if path.exists():
                content = path.read_bytes()
                assert len(content) == 200_000
                seen |= set(content)
        assert first.returncode == second.returncode == 0
    assert seen <= set(b"ab")
    assert [entry.name for entry in tmp_path.iterdir()] == ["name"]


@pytest.mark.parametrize("paths", [("a/name", "a/name"), ("a/name", "b/name")], ids=["same", "other folder"])
def test_two_threads_do_not_write_into_each_others_file(folder: str, paths: tuple[str, str]) -> None:
    first, second = (storage.join(folder, path) for path in paths)
    seen_by_second: list[Path] = []

    def write_second() -> None:
        with storage.writing(second) as temporary:
            seen_by_second.append(temporary)
            temporary.write_bytes(b"second")

    thread = threading.Thread(target=write_second)
    with storage.writing(first) as temporary:
        temporary.write_bytes(b"first")
        thread.start()
        thread.join(0.3)
        content = temporary.read_bytes()
    thread.join()
    assert content == b"first"
    assert seen_by_second[0] != temporary
    assert storage.read_bytes(first) in (b"first", b"second") and storage.read_bytes(second) in (b"first", b"second")
    assert first == second or (storage.read_bytes(first), storage.read_bytes(second)) == (b"first", b"second")


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [storage.read_bytes, storage.open_read, storage.read_json],
    ids=["read_bytes", "open_read", "read_json"],
)
def test_a_missing_file_is_one_line(folder: str, operation: Callable[[str], Any]) -> None:
    path = storage.join(folder, "nothing")
    with pytest.raises(StorageError) as error:
        operation(path)
    assert one_line(error, path) and "no such file" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"hello", b'{"a": 1} x'])
def test_what_is_no_json_is_one_line(folder: str, content: bytes) -> None:
    path = storage.join(folder, "a.json")
    storage.write_bytes(path, content)
    with pytest.raises(DataError) as error:
        storage.read_json(path)
    assert one_line(error, path)


@pytest.mark.parametrize("url", ["nope://a/b", "/tmp"])
def test_an_unknown_protocol_and_a_folder_are_one_line(url: str) -> None:
    with pytest.raises(StorageError) as error:
        storage.read_bytes(url)
    assert one_line(error, url)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    path = str(tmp_path / "file" / "name")
    with pytest.raises(StorageError) as error:
        storage.write_bytes(path, b"new")
    assert one_line(error, path)
    with contextlib.suppress(StorageError):
        assert storage.sizes(str(tmp_path / "file")) == {}
    assert (tmp_path / "file").read_bytes() == b"precious"


class Broken(MemoryFileSystem):
    """A file system whose library raises errors of its own, in several lines, as botocore does without credentials."""

    protocol = "broken"

    def fail(self, *_: Any, **__: Any) -> Any:
        raise type("NoCredentialsError", (Exception,), {})("Unable to locate credentials\nTry again")

    open = _open = info = ls = exists = put_file = isdir = find = fail  # type: ignore[assignment]


@pytest.mark.parametrize(
    "operation",
    [
        storage.read_bytes,
        storage.exists,
        storage.sizes,
        storage.find,
        storage.remove,
        lambda p: storage.write_json(p, 1),
    ],
    ids=["read_bytes", "exists", "sizes", "find", "remove", "write_json"],
)
def test_whatever_the_library_of_a_protocol_raises_is_one_line(operation: Callable[[str], Any]) -> None:
    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(StorageError) as error:
        operation("broken://bucket/name")
    assert one_line(error, "broken://bucket/name")


def test_an_error_of_several_lines_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("first\nsecond")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as error:
        storage.write_bytes(str(tmp_path / "name"), b"1")
    assert one_line(error, str(tmp_path / "name"))


def test_a_mistake_in_the_block_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """What the disk and fsspec raise is the user's; a ValueError from the code that writes is ours, with its traceback."""
    with pytest.raises(ValueError, match="bug"), storage.writing(str(tmp_path / "name")):
        raise ValueError("bug")


def test_another_file_that_is_missing_is_the_one_that_is_named(tmp_path: Path) -> None:
    with pytest.raises((StorageError, OSError), match="missing-input"), storage.writing(str(tmp_path / "name")):
        (tmp_path / "missing-input").read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("moment", ["write", "fsync", "put"])
def test_a_full_disk_is_one_line_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    path = f"memory://full/{uuid.uuid4()}" if moment == "put" else str(tmp_path / "name")
    with (
        pytest.raises(
            StorageError, match=r"(no space left|quota exceeded).*make room and run the same command"
        ) as error,
        storage.writing(path) as temporary,
    ):
        temporary.write_bytes(b"new")
        if moment == "write":
            fail()
    assert one_line(error, path)
    assert not storage.exists(path) and not temporary.exists()


@SMALL
@given(content=st.binary(max_size=5000))
def test_checksums_are_those_of_the_libraries(tmp_path: Path, content: bytes) -> None:
    import hashlib

    (tmp_path / "x").write_bytes(content)
    sums = storage.checksums(tmp_path / "x")
    assert (sums.bytes, sums.sha256, sums.crc32) == (
        len(content),
        hashlib.sha256(content).hexdigest(),
        zlib.crc32(content),
    )
