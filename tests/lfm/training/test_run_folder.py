"""A checkpoint is complete or not there, and a weights file says what it is or is refused by one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm import storage
from lfm.errors import CheckpointError, LfmError
from lfm.models.dit import DiTConfig
from lfm.training import run_folder
from lfm.training.run_folder import STATE, WEIGHTS, RunFolder, RunState, WeightsHeader, load_weights, save_weights
from tests.support.models import WEIGHTS_HEADER

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(float("nan")), "t": torch.ones(4, 3).t()}


def saved(folder: Path, header: WeightsHeader = WEIGHTS_HEADER) -> Path:
    save_weights(str(folder / WEIGHTS), TENSORS, header)
    return folder / WEIGHTS


def write_checkpoint(run: RunFolder, samples_seen: int, keep: int = 2) -> Path:
    folder = run.checkpoints / run.temporary_tag(samples_seen)
    folder.mkdir(parents=True)
    (folder / "rank_0").mkdir()
    (folder / "rank_0" / "optimizer.pt").write_bytes(b"state")
    tensors = {"a": torch.full((2,), float(samples_seen))}
    save_weights(str(folder / WEIGHTS), tensors, dataclasses.replace(WEIGHTS_HEADER, samples_seen=samples_seen))
    state = RunState(samples_seen=samples_seen, world_size=1, manifest_digest="d", code_version="1", config={})
    return run.publish(samples_seen, state, keep)


# --- weights -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    samples_seen=st.integers(0, 2**62),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    dropout=st.floats(0, 0.9),
)
def test_a_header_survives_its_json(samples_seen: int, scale: float, name: str, dropout: float) -> None:
    record = WEIGHTS_HEADER.autoencoder.model_copy(update={"scale_factor": scale, "name": name})
    model = DiTConfig(4, 8, 2, 32, 1, 2, num_classes=3, condition_dropout=dropout)
    header = dataclasses.replace(WEIGHTS_HEADER, samples_seen=samples_seen, autoencoder=record, model=model)
    assert "\n" not in header.to_json()
    assert WeightsHeader.from_json(header.to_json()) == header


def test_weights_survive_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for place in (path, tmp_path):
        tensors, header = load_weights(str(place))
        assert header == WEIGHTS_HEADER
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, TENSORS[name], equal_nan=True, atol=0, rtol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == [WEIGHTS]


def test_weights_are_as_readable_as_any_file(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    assert saved(tmp_path).stat().st_mode & 0o777 == 0o666 & ~umask


def test_weights_truncated_anywhere_are_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(content), 53), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            load_weights(str(path))
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_weights_that_are_missing_or_not_ours_are_one_line(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "x.safetensors"):
        with pytest.raises(CheckpointError, match=f"^{place}: no weights.safetensors there; train first"):
            load_weights(str(place))
    save_file(TENSORS | {"t": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="no header of lfm"):
        load_weights(str(tmp_path))
    (tmp_path / WEIGHTS).write_text("this is a text and no weights file")
    with pytest.raises(CheckpointError):
        load_weights(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content.pop("image_size"),
        lambda content: content.update(unknown=1),
        lambda content: content["model"].update(unknown=1),
        lambda content: content["model"].update(hidden_size=33),
        lambda content: content["autoencoder"].pop("content_hash"),
        lambda content: content["autoencoder"].update(scale_factor="x"),
        lambda content: content.update(classes=[{"index": 0}]),
    ],
    ids=["no model", "no image size", "unknown key", "unknown model key", "wrong model", "no hash", "text", "no name"],
)
def test_a_header_of_another_version_is_one_line_naming_the_file(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    content = json.loads(WEIGHTS_HEADER.to_json())
    change(content)
    path = tmp_path / WEIGHTS
    save_file({"a": torch.ones(1)}, path, {"lfm": json.dumps(content)})
    with pytest.raises(LfmError) as error:
        load_weights(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", '{"model": 3}'])
def test_a_header_that_is_no_header_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / WEIGHTS
    save_file({"a": torch.ones(1)}, path, {"lfm": text})
    with pytest.raises(CheckpointError) as error:
        load_weights(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def test_clean_removes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
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
def test_clean_removes_half_written_files_wherever_they_are(tmp_path: Path, folder: str) -> None:
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
    """At its end the run would not write them again, and sampling would go on with the weights of the one before."""
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
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
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
    if name == STATE and damage == "flip":  # JSON may read as before
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


def test_a_run_in_object_storage_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^s3://b/run: .*local folder"):
        RunFolder("s3://b/run")
