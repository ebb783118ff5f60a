"""Processes that share the work of a stage."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lfm import storage
from lfm.errors import ConfigError, DataError
from lfm.storage import files
from lfm.world import World
from pipelines.common.processes import map_processes, part_of, run_on_every_gpu, stopped_by_sigterm


def square(number: int) -> int:
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def touch(folder: str, world: World) -> int:
    (Path(folder) / str(world.rank)).touch()
    return world.size


def fail_on_rank_one(message: str, world: World) -> None:
    if world.rank == 1:
        raise DataError(message)


def die_on(ranks: tuple[int, ...], world: World) -> int:
    if world.rank in ranks:
        os._exit(1)
    return world.rank


@pytest.mark.parametrize("num_processes", [1, 2])
def test_map_processes_yields_every_result_once(num_processes: int) -> None:
    assert sorted(map_processes(square, range(5), num_processes)) == [0, 1, 4, 9, 16]


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(DataError, match="run the same command to resume"):
        list(map_processes(die_at_three, range(6), 2))


def test_a_part_is_a_world() -> None:
    assert part_of("1/1") == World()
    assert part_of("3/16") == World(2, 0, 16)
    for text in ("0/1", "2/1", "1", "a/b", "", "-1/2", "1/0"):
        with pytest.raises(ConfigError, match="`part`"):
            part_of(text)


def test_every_rank_does_its_part(tmp_path: Path) -> None:
    assert run_on_every_gpu(touch, str(tmp_path), 2) == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_the_error_of_a_rank_is_that_of_the_command() -> None:
    with pytest.raises(DataError, match="broken"):
        run_on_every_gpu(fail_on_rank_one, "broken", 2)


def test_other_ranks_finish_if_one_dies(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_on_every_gpu(die_on, (1,), 2) == [0]
    assert "1 of 2 processes died" in capfd.readouterr().err
    with pytest.raises(DataError, match="all 2 processes"):
        run_on_every_gpu(die_on, (0, 1), 2)


def test_a_launcher_has_started_the_processes_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_on_every_gpu(touch, str(tmp_path), None) == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with pytest.raises(ConfigError, match="`num_gpus`"):
        run_on_every_gpu(touch, str(tmp_path), 2)


def test_sigterm_leaves_no_temporary_file(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit, match="143"),
        stopped_by_sigterm(),
        storage.writing(str(tmp_path / "image.png")) as path,
    ):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def write_and_wait(folder: str, world: World) -> None:
    if world.rank == 0:
        while not any(Path(folder).iterdir()):  # until rank 1 writes
            time.sleep(0.01)
        raise DataError("broken")
    with storage.writing(f"{folder}/shard.tar"):
        time.sleep(60)


def stop_as_soon_as_a_file_exists(folder: str) -> None:
    files.lock = lambda file: storage.exit_at_once(7)  # type: ignore[assignment]
    with storage.writing(f"{folder}/shard.tar"):
        pass


def test_a_process_stopped_right_after_it_made_a_file_leaves_none(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=stop_as_soon_as_a_file_exists, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert not list(tmp_path.iterdir())


def test_ranks_that_are_stopped_leave_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="broken"):
        run_on_every_gpu(write_and_wait, str(tmp_path), 2)
    until = time.monotonic() + 10
    while any(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())
