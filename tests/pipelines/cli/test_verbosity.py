"""-q hides progress, -v shows where an error occurred, before and after the command, and neither outlasts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lfm.errors import CheckpointError
from pipelines.common.progress import QUIET, Progress
from tests.support.commands import lfm


@pytest.mark.parametrize("arguments", [("scenes", "-q"), ("-q", "scenes"), ("scenes", "--quiet")])
def test_quiet(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    are_hidden: list[bool] = []
    begin = Progress.__init__

    def recorded(bar: Progress, *args: object, **kwargs: object) -> None:
        begin(bar, *args, **kwargs)  # type: ignore[arg-type]
        are_hidden.append(bar.disable)

    monkeypatch.setattr(Progress, "__init__", recorded)
    result = lfm(*arguments, tmp_path / "quiet", "--num", 2, "--image-size", 32)
    assert result.exit_code == 0 and "2 scenes of 32 x 32 pixels" in result.output
    assert are_hidden == [True]
    lfm("scenes", tmp_path / "shown", "--num", 2, "--image-size", 32)
    assert are_hidden == [True, False] and QUIET not in os.environ


@pytest.mark.parametrize("arguments", [("sample", "-v"), ("-v", "sample")])
def test_verbose(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "nothing"
    assert lfm("sample", run, "--out", tmp_path / "out").exit_code == 2
    with pytest.raises(CheckpointError, match="nothing: no such file or folder"):
        lfm(*arguments, run, "--out", tmp_path / "out")
    assert lfm("sample", run, "--out", tmp_path / "out").exit_code == 2, "the next command is as before"
