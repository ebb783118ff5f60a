"""Tests of the run folder: a checkpoint is visible only when it is complete."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.errors import CheckpointError
from lfm.training import run_folder
from lfm.training.run_folder import STATE, RunFolder, RunState
from lfm.weights_file import WEIGHTS, load_weights, save_weights
from tests.support.models import WEIGHTS_HEADER


def write_checkpoint(run: RunFolder, samples_seen: int, keep: int = 2) -> Path:
    folder = run.checkpoints / run.temporary_tag(samples_seen)
    folder.mkdir(parents=True)
    (folder / "rank_0").mkdir()
    (folder / "rank_0" / "optimizer.pt").write_bytes(b"state")
    tensors = {"a": torch.full((2,), float(samples_seen))}
    save_weights(str(folder / WEIGHTS), tensors, dataclasses.replace(WEIGHTS_HEADER, samples_seen=samples_seen))
    state = RunState(samples_seen=samples_seen, world_size=1, manifest_digest="d", code_version="1", config={})
    return run.publish(samples_seen, state, keep)


# --- the run's folder --------------------------------------------------------------------------------------------


def test_a_checkpoint_being_written_is_never_the_newest(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    assert run.newest() is None and run.complete() == []
    first = write_checkpoint(run, 100)
    temporary = run.checkpoints / run.temporary_tag(200)
    temporary.mkdir()
    assert run.newest() == first
    storage.write_json(str(temporary / STATE), {"samples_seen": 200})  # all but the rename
    assert run.newest() == first
    (run.checkpoints / run_folder.tag(300)).mkdir()  # the name alone does not make it complete
    assert run.newest() == first


@settings(max_examples=5, deadline=None)
@given(counts=st.lists(st.integers(0, 10**11), min_size=1, max_size=5, unique=True), keep=st.integers(1, 3))
def test_publish_keeps_the_newest_ones(tmp_path_factory: pytest.TempPathFactory, counts: list[int], keep: int) -> None:
    run = RunFolder(str(tmp_path_factory.mktemp("run")))
    counts = sorted(counts)
    for number, samples_seen in enumerate(counts, start=1):
        final = write_checkpoint(run, samples_seen, keep)
        assert run.newest() == final
        assert run.complete() == [
            run.checkpoints / run_folder.tag(count) for count in counts[max(0, number - keep) : number]
        ]
        assert run.read_state(final).samples_seen == samples_seen
        assert (final / "rank_0" / "optimizer.pt").read_bytes() == b"state"
        tensors, header = load_weights(str(run.path))
        assert header.samples_seen == samples_seen and tensors["a"][0] == torch.tensor(float(samples_seen))
    assert not list(run.path.rglob(f"{storage.TEMPORARY_PREFIX}*"))


def test_the_same_checkpoint_can_be_written_again(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert write_checkpoint(run, 7) == write_checkpoint(run, 7) == run.newest()
    assert len(run.complete()) == 1


def test_locking_removes_incomplete_files_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    with run.only_one():  # of a run that has not begun
        pass
    final = write_checkpoint(run, 100)
    half = run.checkpoints / run.temporary_tag(200)
    shutil.copytree(final, half)
    with run.only_one():
        pass
    assert not half.exists() and run.newest() == final and load_weights(str(run.path))
    assert load_weights(str(final))


@pytest.mark.parametrize("folder", [".", "snapshots", "previews", "checkpoints"])
def test_locking_removes_incomplete_files_in_every_folder(tmp_path: Path, folder: str) -> None:
    """A run killed while it copied its weights, say, leaves a file as large as the model beside them."""
    run = RunFolder(str(tmp_path))
    write_checkpoint(run, 100)
    half = tmp_path / folder / f"{storage.TEMPORARY_PREFIX}{WEIGHTS}.host.1"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    with run.only_one():
        pass
    assert not half.exists() and run.newest()


def test_a_run_killed_while_it_publishes_has_the_weights_of_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run does not write them again, and sampling would use the weights of the checkpoint before."""
    run = RunFolder(str(tmp_path))
    write_checkpoint(run, 100)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", die)
        write_checkpoint(run, 200)
    run = RunFolder(str(tmp_path))
    with run.only_one():
        newest = run.newest()
    assert newest is not None
    assert load_weights(str(tmp_path))[1].samples_seen >= load_weights(str(newest))[1].samples_seen


@pytest.mark.parametrize("name", [WEIGHTS, STATE, "rank_0/optimizer.pt"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "junk"])
def test_a_damaged_checkpoint_is_named_with_the_repair(tmp_path: Path, name: str, damage: str) -> None:
    run = RunFolder(str(tmp_path))
    path = write_checkpoint(run, 100) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(content), "truncate": content[:-1], "junk": b"[]"}[damage])
    newest = run.newest()
    if newest is None:  # without its state it is none
        return
    with pytest.raises(CheckpointError) as error:
        run.read_state(newest)
    assert str(newest) in str(error.value) and "remove that folder" in str(error.value) and "\n" not in str(error.value)


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    one, other = RunFolder(str(tmp_path)), RunFolder(str(tmp_path))
    with one.only_one(), pytest.raises(CheckpointError, match="another process"), other.only_one():
        pass
    with other.only_one():
        pass


def test_a_url_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^s3://b/run: must be a local folder"):
        RunFolder("s3://b/run")
