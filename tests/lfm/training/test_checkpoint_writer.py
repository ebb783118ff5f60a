"""Tests of the order in which a checkpoint is copied, written and published, without an engine."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lfm.errors import StorageError
from lfm.training import checkpoint_writer
from lfm.training.checkpoint_writer import CheckpointWriter
from lfm.training.engine import HostBuffers, StateCopy
from lfm.training.run_folder import RunFolder
from lfm.weights_file import load_weights
from lfm.world import World
from tests.support.commands import ALONE
from tests.support.models import WEIGHTS_HEADER


class FakeEngine:
    """An engine of one weight, among ranks whose sums are those of this rank alone plus `others`."""

    def __init__(self, world: World = ALONE, others: float = 0.0) -> None:
        self.world, self.others, self.device = world, others, torch.device("cpu")
        self.weight = torch.zeros(3)

    def copy_state(self, buffers: HostBuffers, average: str) -> StateCopy:
        copy = buffers.copy("weight", self.weight)
        return StateCopy({"master": {"weight": copy}}, {"weight": copy}, {"adam_steps": 1})

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return value + self.others


class Disk:
    """A disk on which the part of a rank is written when the test allows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write = threading.Event()
        self.error: OSError | None = None
        self._write_parts = checkpoint_writer.write_parts
        monkeypatch.setattr(checkpoint_writer, "write_parts", self.write_parts)

    def write_parts(self, folder: Path, rank: int, parts: dict[str, dict[str, Tensor]]) -> list[Path]:
        assert self.may_write.wait(60)
        if self.error:
            raise self.error
        return self._write_parts(folder, rank, parts)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def open_writer(folder: Path, engine: Any) -> CheckpointWriter:
    return CheckpointWriter(engine, RunFolder(str(folder)), keep=2)


def start(writer: CheckpointWriter, samples_seen: int) -> None:
    writer.start(replace(WEIGHTS_HEADER, samples_seen=samples_seen))


def published(folder: Path) -> list[str]:
    return [path.name for path in RunFolder(str(folder)).complete()]


def wait_for(writer: CheckpointWriter) -> None:
    assert writer._job is not None
    writer._job.exception(timeout=60)


def test_a_checkpoint_is_published_when_all_ranks_have_written(tmp_path: Path, disk: Disk) -> None:
    """Steps of training change the weights in the meantime, and not the copy."""
    engine = FakeEngine(World(0, 0, 2))
    writer = open_writer(tmp_path, engine)
    assert writer.flags() == (False, False)
    start(writer, 8)
    engine.weight += 1
    assert writer.flags() == (False, False)
    writer.advance(1, 0)
    disk.may_write.set()
    wait_for(writer)
    assert writer.flags() == (True, False)
    writer.advance(1, 0)
    wait_for(writer)
    assert published(tmp_path) == []
    for _ in range(2):  # the sums of the step after arrive before the host knows
        writer.advance(2, 0)
        assert writer.flags() == (False, False)
    wait_for(writer)
    assert published(tmp_path) == ["samples-000000000008"]
    weights, header = load_weights(str(tmp_path))
    assert weights["weight"].tolist() == [0.0, 0.0, 0.0] and header.samples_seen == 8
    writer.close()


def test_the_next_checkpoint_and_the_end_wait_and_memory_is_kept(tmp_path: Path, disk: Disk) -> None:
    disk.may_write.set()
    engine = FakeEngine()
    writer = open_writer(tmp_path, engine)
    buffers = set()
    for samples_seen in (8, 16):
        start(writer, samples_seen)
        buffers.add(writer._buffers._buffers["weight"].data_ptr())
    assert published(tmp_path) == ["samples-000000000008"]
    writer.finish()
    writer.finish()
    writer.close()
    assert published(tmp_path) == ["samples-000000000008", "samples-000000000016"] and len(buffers) == 1


def test_closing_publishes_what_a_single_rank_has_written(tmp_path: Path, disk: Disk) -> None:
    """An error of training, such as a damaged shard, loses no checkpoint; several ranks cannot agree after it."""
    disk.may_write.set()
    for world, number in ((ALONE, 1), (World(0, 0, 2), 0)):
        folder = tmp_path / str(world.size)
        writer = open_writer(folder, FakeEngine(world))
        start(writer, 8)
        writer.close()
        assert len(published(folder)) == number


def test_an_error_is_raised_at_a_later_step(tmp_path: Path, disk: Disk) -> None:
    writer = open_writer(tmp_path, FakeEngine())
    disk.may_write.set()
    start(writer, 8)
    writer.finish()
    disk.error = OSError(28, "No space left on device")
    start(writer, 16)
    wait_for(writer)
    assert writer.flags() == (False, True)
    for ends in (lambda: writer.advance(0, 1), writer.finish, lambda: start(writer, 24)):
        with pytest.raises(StorageError, match="No space left on device"):
            ends()
    writer.close()
    assert published(tmp_path) == ["samples-000000000008"]


def test_an_error_of_another_rank_ends_this_one(tmp_path: Path, disk: Disk) -> None:
    disk.may_write.set()
    writer = open_writer(tmp_path, FakeEngine(World(0, 0, 2), others=1.0))
    start(writer, 8)
    for ends in (lambda: writer.advance(1, 1), writer.finish):
        with pytest.raises(RuntimeError, match="another rank"):
            ends()
    writer.close()
    assert published(tmp_path) == []
