"""Tests of a run at a URL, with fsspec's file system in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lfm import storage
from lfm.errors import StorageError
from lfm.training.run_folder import RunFolder, RunState
from lfm.training.run_mirror import RunMirror
from lfm.weights_file import WEIGHTS

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield
    filesystem.store.clear()


def publish(folder: RunFolder, samples_seen: int, keep: int = 2) -> None:
    """Write and publish a checkpoint whose files depend on the samples seen."""
    temporary = folder.checkpoints / folder.temporary_tag(samples_seen)
    temporary.mkdir(parents=True)
    (temporary / WEIGHTS).write_bytes(f"weights {samples_seen}".encode())
    (temporary / "master-00000.safetensors").write_bytes(bytes(1000) + f"{samples_seen}".encode())
    with (folder.path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"samples_seen": samples_seen}) + "\n")
    state = RunState(samples_seen=samples_seen, world_size=1, manifest_digest="d", code_version="c", config={})
    folder.publish(samples_seen, state, keep)


def trained(path: Path, *samples_seen: int) -> RunFolder:
    """Train in a folder, and carry each checkpoint."""
    folder = RunFolder(str(path))
    for count in samples_seen:
        with RunMirror(URL, folder) as mirror:
            publish(folder, count)
            mirror.carry()
    return folder


def content(path: Path) -> dict[str, bytes]:
    """Return the visible files of a folder by name."""
    files = [file for file in path.rglob("*") if file.is_file()]
    names = {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
    return {name: data for name, data in names.items() if not any(part.startswith(".") for part in name.split("/"))}


def remote() -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(URL, name)) for name in storage.find(URL)}


def test_the_url_holds_what_the_folder_holds(tmp_path: Path) -> None:
    """Two of three checkpoints, weights and log."""
    folder = trained(tmp_path / "one", 8, 16, 24)
    assert remote() == content(folder.path)
    assert [path.name for path in folder.complete()] == ["samples-000000000016", "samples-000000000024"]
    other = RunFolder(str(tmp_path / "other"))
    RunMirror(URL, other).fetch()
    newest = other.newest_intact()
    assert newest is not None and newest[1].samples_seen == 24
    fetched = content(other.path)
    assert fetched == {name: data for name, data in remote().items() if "000000016" not in name}


def test_nothing_is_uploaded_or_downloaded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[str] = []
    write_bytes = storage.write_bytes

    def counted(path: str, *arguments: Any, **options: Any) -> None:
        uploads.append(path)
        write_bytes(path, *arguments, **options)

    monkeypatch.setattr(storage, "write_bytes", counted)
    folder = trained(tmp_path / "one", 8, 16)
    other = RunFolder(str(tmp_path / "other"))
    RunMirror(URL, other).fetch()
    uploads.clear()
    for each in (folder, other):
        mirror = RunMirror(URL, each)
        mirror.fetch()
        with mirror:
            mirror.carry()
    assert not [path for path in uploads if path.startswith(URL)]


def test_a_checkpoint_is_announced_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload of any file of the second checkpoint fails: another machine finds the first one."""
    trained(tmp_path / "one", 8)
    write_bytes, broken = storage.write_bytes, ["nothing"]

    def failing(path: str, *arguments: Any, **options: Any) -> None:
        if path.endswith(broken[0]) and "0016/" in path:
            raise StorageError(f"{path}: the store is full")
        write_bytes(path, *arguments, **options)

    monkeypatch.setattr(storage, "write_bytes", failing)
    for name in ("master-00000.safetensors", WEIGHTS, "state.json"):
        broken[0] = name
        folder = RunFolder(str(tmp_path / "one"))
        with (
            pytest.raises(StorageError, match=r"could not be carried there.*run the same command"),
            RunMirror(URL, folder),
        ):
            if folder.newest() == folder.complete()[0]:
                publish(folder, 16)
        other = RunFolder(str(tmp_path / f"other-{name}"))
        RunMirror(URL, other).fetch()
        newest = other.newest_intact()
        assert newest is not None and newest[1].samples_seen == 8
    broken[0] = "nothing"
    with RunMirror(URL, RunFolder(str(tmp_path / "one"))):
        pass
    assert remote() == content(tmp_path / "one")


def test_a_damaged_checkpoint_at_the_url_is_passed_over_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "one", 8, 16)
    damaged = storage.join(URL, "checkpoints/samples-000000000016/master-00000.safetensors")
    whole = storage.read_bytes(damaged)
    storage.write_bytes(damaged, whole[:-1] + b"x")
    other = RunFolder(str(tmp_path / "other"))
    mirror = RunMirror(URL, other)
    mirror.fetch()
    newest = other.newest_intact()
    assert newest is not None and newest[1].samples_seen == 8
    assert f"{damaged}: is not what was written" in caplog.text and str(tmp_path) not in caplog.text
    with mirror:
        publish(other, 16)
    assert storage.read_bytes(damaged) == whole


def test_a_newer_checkpoint_of_the_folder_is_kept(tmp_path: Path) -> None:
    folder = trained(tmp_path / "one", 8)
    publish(folder, 16)
    before = content(folder.path)
    RunMirror(URL, folder).fetch()
    assert content(folder.path) == before


def test_an_error_of_training_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "one"))

    def failing(path: str) -> bool:
        raise StorageError(f"{path}: cannot be reached")

    monkeypatch.setattr(storage, "exists", failing)
    with pytest.raises(ValueError, match="diverged"), RunMirror(URL, folder):
        publish(folder, 8)
        raise ValueError("diverged")


def test_the_record_of_another_url_does_not_count(tmp_path: Path) -> None:
    folder = trained(tmp_path / "one", 8)
    with RunMirror("memory://bucket/second", folder):
        pass
    second = {
        name: storage.read_bytes(f"memory://bucket/second/{name}") for name in storage.find("memory://bucket/second")
    }
    assert second == remote()
