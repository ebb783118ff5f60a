"""The command that is printed as the next one runs once its placeholders are named."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lfm.weights_file import load_header
from pipelines.common.sample_jobs.sample_command import sample_command
from tests.support.commands import Tasks, lfm


@pytest.mark.parametrize("task", ["none", "class", "inpaint", "semantic", "both"])
def test_the_next_command_runs_with_raw_shards(tasks: Tasks, tmp_path: Path, task: str) -> None:
    run = tasks.runs / task
    names = {"DIR": str(tmp_path / "out"), "RAW_SHARDS": str(tasks.raw)}
    command = shlex.split(sample_command(str(run), load_header(str(run))))
    assert ("RAW_SHARDS" in command) == (task in ("inpaint", "semantic", "both"))
    arguments = [names.get(part, part) for part in command[1:]]
    result = lfm(*arguments, "--seeds", "0", "--num-steps", 1)
    assert result.exit_code == 0, result.stderr
