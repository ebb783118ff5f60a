"""`lfm status`: what it says of runs that train, stopped and finished, and of folders that hold none."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.monitoring.run_status import LEVELS, RunStatus, run, sparkline
from pipelines.monitoring.status_options import StatusConfig
from tests.support.commands import assert_one_line, lfm


def line(step: int, **values: Any) -> dict[str, Any]:
    rates = {
        "samples_per_second": 20.0,
        "goodput": 10.0,
        "gradient_norm": 0.5,
        "learning_rate": 1e-4,
        "skipped_steps": 0,
    }
    return {"samples_seen": 8 * step, "step": step, "loss": 1 / step, **rates, **values}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 100 steps of 8 that has made 40."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"train": {"num_steps": 100, "global_batch": 8}}))
    lines = [line(step) for step in range(1, 41)]
    lines[9] |= {"validation_loss": 0.5, "fd-lite": 90.0, "recognised": 0.2}
    lines[19] |= {"validation_loss": 0.3, "fd-lite": 70.0, "recognised": 0.6, "loss": None}
    lines[29] |= {"validation_loss": 0.4, "fd-lite": 60.0, "recognised": 0.5}
    (path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"samples_seen": 3')
    for name in (
        "samples-000000000160",
        "samples-000000000080",
        "damaged-samples-000000000040-1a2b",
        "samples-000000000240",
    ):
        (path / "checkpoints" / name).mkdir(parents=True)
        if name != "samples-000000000240":  # which is being written
            (path / "checkpoints" / name / "state.json").write_text("{}")
    return path


def status_of(path: Path | str) -> RunStatus:
    return run(StatusConfig(str(path)))


def test_a_run_that_was_stopped(folder: Path) -> None:
    status = status_of(folder)
    assert status.state.startswith("stopped") and status.seconds_left is None
    assert (status.samples_seen, status.num_samples, status.checkpoints) == (320, 800, [80, 160])
    assert (status.samples_per_second, status.goodput) == (20.0, pytest.approx(10.0))
    values = {each.name: (each.value, each.best, each.best_samples_seen) for each in status.measurements}
    assert values == {"validation_loss": (0.4, 0.3, 160), "fd-lite": (60.0, 60.0, 240), "recognised": (0.5, 0.6, 160)}
    text = lfm("status", folder).stdout
    for part in (
        "40.0%, 320 of 800 samples",
        "1 -> 0.025",
        "checkpoints  80, 160",
        "best 0.3 at 160",
        "0.5 at 240 samples",
    ):
        assert part in text, text
    assert text.count("\n") < 24, "one screen"


def test_a_run_that_trains(folder: Path) -> None:
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = status_of(folder)
        assert status.state == "training" and status.seconds_left == pytest.approx(48.0)
        assert "time left    00:48" in str(status)
    assert status_of(folder).state.startswith("stopped"), "looking at it leaves no lock"


def test_a_run_that_is_finished_or_new(folder: Path) -> None:
    (folder / "log.jsonl").write_text(json.dumps(line(100)))
    assert status_of(folder).state == "finished" and "100.0%" in str(status_of(folder))
    (folder / "log.jsonl").unlink()
    status = status_of(folder)
    assert status.samples_seen == 0 and status.goodput is None and "0.0%" in str(status)


def test_a_run_at_a_url(folder: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(folder), "/status/run", recursive=True)
    status = status_of("memory://status/run")
    assert (status.state, status.samples_seen, status.checkpoints) == ("recorded", 320, [80, 160])


def test_json_is_the_whole_status(folder: Path) -> None:
    content = json.loads(lfm("status", folder, "--json").stdout)
    assert (
        content["samples_seen"] == 320
        and len(content["loss"]) == 40
        and content["measurements"][0]["name"] == "fd-lite"
    )


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"train": {"num_steps": 0, "global_batch": 8}}', '{"train": 3}']
)
def test_other_folders_are_one_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert_one_line(lfm("status", tmp_path), tmp_path, "holds no run of lfm", "name the run folder")


def test_a_path_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    assert_one_line(lfm("status", tmp_path / "nowhere"), tmp_path / "nowhere", "no such folder; name the run folder")
    (tmp_path / "file").touch()
    assert_one_line(lfm("status", tmp_path / "file"), tmp_path / "file", "is a file; name the run folder")


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=300), st.integers(1, 80))
def test_a_sparkline_fits_and_spans_all_levels(values: list[float | None], width: int) -> None:
    curve = sparkline(values, width)
    assert len(curve) <= width and set(curve) <= {*LEVELS, " "}
    if len(values) <= width:
        finite = {value for value in values if value is not None}
        assert len(curve) == len(values)
        if len(finite) > 1:
            assert curve[values.index(min(finite))] == LEVELS[0] and curve[values.index(max(finite))] == LEVELS[-1]
