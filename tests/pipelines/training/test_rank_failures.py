"""Tests of two ranks that no launcher watches: if one fails, both end within a minute, each with one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY, SmallSet, free_port
from tests.support.training_runs import SCRIPT, assert_same_weights, start, train

SECONDS = 60


def start_in(folders: list[Path], *arguments: object) -> list[subprocess.Popen[str]]:
    """Start one rank in each folder, so that a relative path is a different folder for each rank."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, folder in enumerate(folders):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders))}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **shared, **place}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe))
    return processes


def errors_of(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Return the error lines of each rank; check that none shows a traceback or takes longer than a minute."""
    results = []
    for process in processes:
        _, stderr = process.communicate(timeout=SECONDS)
        assert "Traceback" not in stderr, stderr
        results.append([line for line in stderr.splitlines() if line.startswith("error: ")])
    return results


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "machine0", tmp_path / "machine1"]
    for path in paths:
        path.mkdir()
    return paths


def test_a_run_folder_that_is_not_shared_is_refused(experiment: Path, folders: list[Path]) -> None:
    processes = start_in(folders, "--config", experiment, "--set", "run=run")
    for lines, process in zip(errors_of(processes), processes, strict=True):
        assert process.returncode == 2
        assert len(lines) == 1 and "is not shared: rank 1 does not see what rank 0 writes" in lines[0], lines


def test_a_damaged_checkpoint_on_one_machine_ends_both(experiment: Path, folders: list[Path]) -> None:
    assert train(experiment, f"run={folders[0] / 'run'}", "train.num_steps=5").returncode == 0
    shutil.copytree(folders[0] / "run", folders[1] / "run")
    next((folders[1] / "run" / "checkpoints").glob("*/master-00000.safetensors")).write_bytes(b"damaged")
    processes = start_in(folders, "--config", experiment, "--set", "run=run")
    for lines, process in zip(errors_of(processes), processes, strict=True):
        assert process.returncode == 2 and len(lines) == 1, lines


def test_a_failure_of_one_rank_reaches_the_other(experiment: Path, small_set: SmallSet, folders: list[Path]) -> None:
    shutil.copytree(small_set.latents, folders[0] / "latents")
    processes = start_in(folders, "--config", experiment, "--set", "data.shards=latents")
    first, second = errors_of(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert len(first) == len(second) == 1
    assert first[0].startswith("error: rank 1: latents") and second[0].startswith("error: latents")


def test_configurations_that_differ_are_refused_by_key(experiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(experiment.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 2.0e-3"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(experiment, tmp_path / "a" / "x.yaml")
    shutil.copy(other, tmp_path / "b" / "x.yaml")
    processes = start_in([tmp_path / "a", tmp_path / "b"], "--config", "x.yaml")
    for lines in errors_of(processes):
        assert len(lines) == 1 and "train.learning_rate: 0.001 on rank 0, 0.002 on rank 1" in lines[0], lines


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other(experiment: Path, tmp_path: Path, killed: int) -> None:
    processes = start(experiment, "train.num_steps=100000", "train.checkpoint_every=100000", ranks=2)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    survivor = processes[1 - killed]
    (lines,) = errors_of([survivor])
    print(f"rank {1 - killed} ended {time.monotonic() - began:.1f} s after rank {killed} was killed: {lines}")
    assert survivor.returncode == 2 and len(lines) == 1, lines
    assert f"rank {killed} has" in lines[0]
    processes[killed].communicate()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_put_aside(experiment: Path, tmp_path: Path) -> None:
    """Training resumes from the checkpoint before it, on both ranks, and ends with the same weights."""
    assert train(experiment, f"run={tmp_path / 'whole'}", ranks=2).returncode == 0
    assert train(experiment, "train.num_steps=10", "train.schedule=constant", ranks=2).returncode == 0
    shutil.rmtree(tmp_path / "run")
    assert train(experiment, ranks=2).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(checkpoints.glob("samples-*"))
    path = newest / "master-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = train(experiment, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "is not what was written" in result.stderr and "put aside as damaged-" in result.stderr
    assert newest.is_dir() and list(checkpoints.glob("damaged-*"))
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    for damaged in checkpoints.glob("damaged-*"):
        shutil.rmtree(damaged)
    for state in checkpoints.glob("samples-*/state.json"):
        state.write_text("{")
    result = train(experiment, ranks=2)
    assert result.returncode == 2 and "only checkpoint" in result.stderr
