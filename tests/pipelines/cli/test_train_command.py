"""`lfm train` becomes the launch file, or the deepspeed launcher that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipelines.cli.model_commands import train
from pipelines.common.experiment.shipped_experiments import LAUNCH_FILE
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, lfm

Commands = list[list[str]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The commands that would take the place of this process."""
    started: Commands = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(command))
    return started


def test_one_process_needs_no_launcher(commands: Commands) -> None:
    lfm("train", "--config", "demo", "--num-gpus", "1", "--set", "run=a b", "--allow-changes", "--class-map", "map.csv")
    (command,) = commands
    assert command[:2] == [sys.executable, str(LAUNCH_FILE)]
    assert command[2:] == [
        *("--config", "demo", "--set", "run=a b", "--class-map", "map.csv", "--new-classes", "mean", "--allow-changes")
    ]


def test_every_option_of_the_launch_file_is_passed_on(commands: Commands) -> None:
    special = {"--config", "--set", "--local_rank", "--dry-run", "--ranks", "--rate"}  # the last two are of dry runs
    special |= {"-q", "-v"}  # passed on by environment variables
    options = [option for option in train.params if isinstance(option, click.Option) and option.opts[0] not in special]
    assert len(options) > 4
    arguments = [part for option in options for part in (option.opts[0], *([] if option.is_flag else [_value(option)]))]
    lfm("train", "--config", "demo", "--num-gpus", "1", *arguments)
    assert {*arguments} <= {*commands[0]}


def _value(option: click.Option) -> str:
    """Return a value of an option that takes one: the last of its choices, if it has some."""
    metavar = option.metavar or "TEXT"
    return metavar.strip("[]").split("|")[-1]


def test_several_processes_are_started_by_deepspeed(commands: Commands) -> None:
    lfm("train", "--config", "demo", "--num-gpus", "2")
    (command,) = commands
    assert Path(command[0]).name == "deepspeed" and command[1:3] == ["--num_gpus", "2"]
    assert command[command.index(str(LAUNCH_FILE)) + 1 :][:2] == ["--config", "demo"]


def test_options_of_the_launcher_follow_two_dashes(commands: Commands) -> None:
    lfm("train", "--config", "demo", "--", "--hostfile", "HOSTS", "--master_addr", "node-0")
    (command,) = commands
    assert command[1:6] == ["--hostfile", "HOSTS", "--master_addr", "node-0", str(LAUNCH_FILE)]
    assert_one_line(lfm("train", "--config", "demo", "mine.yaml"), "mine.yaml", "--config")


def test_under_a_launcher_it_is_the_launch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert_one_line(lfm("train", "--config", "demo", "--num-gpus", "2"), "--num-gpus", "launcher")


def test_a_dry_run_prints_the_plan(small_set: SmallSet, tmp_path: Path) -> None:
    settings = (
        "--set",
        f"data.shards={small_set.latents}",
        "--set",
        f"run={tmp_path / 'run'}",
        "--set",
        "condition=none",
    )
    planned = lfm("train", "--config", "demo", "--dry-run", "--rate", "9", *settings, "--set", "condition_dropout=0")
    assert planned.exit_code == 0, planned.output
    assert "num_steps: 1000" in planned.stdout
    assert not (tmp_path / "run").exists()


def test_it_trains_from_any_folder(small_set: SmallSet, tmp_path: Path) -> None:
    settings = [
        f"data.shards={small_set.latents}",
        f"run={tmp_path / 'a run'}",
        "condition=none",
        "condition_dropout=0",
    ]
    settings += ["train.num_steps=1", "train.warmup_steps=0", "train.global_batch=2", "model.size=Ti"]
    command = [sys.executable, "-m", "pipelines.cli.main", "train", "--config", "demo", "--num-gpus", "1"]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "weights.safetensors").exists()
    assert "2 samples seen" in done.stdout
