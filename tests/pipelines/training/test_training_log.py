"""Tests of the training log: waiting times, means of losses, and what it leaves out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lfm.training.step_guard import StepGuard
from lfm.world import World
from pipelines.training import training_log
from pipelines.training.training_log import TrainingLog
from tests.support.commands import REPOSITORY


def fake_engine(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "world": World(),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "guard": StepGuard(),
        "gradient_norm": 1.0,
        "write_monitors": lambda figures, samples_seen: None,
    }
    return SimpleNamespace(**values | changes)


def fake_stream(wait_seconds: float = 0.0) -> Any:
    return SimpleNamespace(wait_seconds=wait_seconds, cache=SimpleNamespace(counts=Counter(retries=2)))


def open_log(folder: Path, samples_seen: int = 0, stream: Any = None, flops: int | None = None, **engine: Any) -> Any:
    return TrainingLog(folder, samples_seen, fake_engine(**engine), stream or fake_stream(), flops)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@dataclass
class Clock:
    """A clock of the log that stands still."""

    seconds: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = {"perf_counter": lambda: clock.seconds, "process_time": lambda: clock.seconds}
    monkeypatch.setattr(training_log, "time", SimpleNamespace(**times))
    return clock


def test_data_wait_is_the_share_of_the_interval_since_the_last_line(tmp_path: Path, clock: Clock) -> None:
    """Time that the stream waited before the log was opened does not count."""
    stream = fake_stream(wait_seconds=1000.0)
    log = open_log(tmp_path, stream=stream)
    for step, waited in ((1, 0.02), (2, 0.0), (3, 0.04)):
        clock.seconds += 0.05
        stream.wait_seconds += waited
        log.losses.append({"loss": 1.0})
        log.write(8 * step, step, 1e-3, {})
        assert lines(tmp_path)[-1]["data_wait"] == pytest.approx(waited / 0.05)
    log.close()


def test_pauses_count_in_goodput_and_not_in_the_rate_of_training(tmp_path: Path, clock: Clock) -> None:
    log = open_log(tmp_path)
    for step, pause in ((1, 0.15), (2, 0.0)):
        clock.seconds += 0.05
        with log.pause():
            clock.seconds += pause
        log.losses.append({"loss": 1.0})
        log.write(8 * step, step, 1e-3, {})
    log.close()
    first, second = lines(tmp_path)
    assert 8 / first["goodput"] - 8 / first["samples_per_second"] == pytest.approx(0.15)
    assert second["goodput"] == pytest.approx(second["samples_per_second"])


def test_losses_are_means_over_the_steps_at_which_they_were_finite(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.losses += [
        {"loss": 1.0, "loss_velocity": 3.0},
        {"loss": math.nan, "loss_velocity": 5.0},
        {"loss": 2.0, "loss_velocity": math.inf},
    ]
    figures = log.write(24, 3, 1e-3, {"validation_loss": 0.25})
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["loss_velocity"]) == (1.5, 4.0)
    assert figures["loss"] == "1.5000" and figures["validation_loss"] == "0.25" and figures["retries"] == "2"
    log.losses.append({"loss": math.nan})
    assert log.write(32, 4, 1e-3, {})["loss"] == "none finite"
    assert lines(tmp_path)[1]["loss"] is None
    log.close()


def test_utilization_is_logged_only_where_the_operations_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "matmul_rate", lambda device, dtype: 1e9)
    for number, flops in enumerate((10**6, None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        log = open_log(folder, flops=flops)
        log.losses.append({"loss": 1.0})
        figures = log.write(8, 1, 1e-3, {})
        log.close()
        (line,) = lines(folder)
        assert ("MFU" in figures) == ("model_flop_utilisation" in line) == (flops is not None)
        if flops:
            assert line["model_flop_utilisation"] == pytest.approx(flops * line["samples_per_second"] / 1e9)


def test_the_rate_of_matrix_products_is_not_measured_without_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(training_log, "matmul_rate", refuse)
    open_log(tmp_path).close()


def test_lines_beyond_the_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"samples_seen": 8}\n{"samples_seen": 16}\n{"samples_seen": 24}\n{"samp')
    open_log(tmp_path, samples_seen=16).close()
    assert [line["samples_seen"] for line in lines(tmp_path)] == [8, 16]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path, world=World(1, 1, 2))
    log.losses.append({"loss": 1.0})
    assert log.write(8, 1, 1e-3, {}) == {}
    log.plot()
    log.close()
    assert not list(tmp_path.iterdir())


def test_each_distance_has_a_plot_of_its_own(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (1, 2):
        log.losses.append({"loss": 1.0 / step})
        log.write(8 * step, step, 1e-3, {"fd-lite": 3.0 / step})
    log.plot("fd-lite", "not-measured-yet")
    log.close()
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fd-lite.png", "loss.png"]


def test_the_rate_of_matrix_products_is_positive() -> None:
    assert training_log.matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e6


def validated(validation: list[float], losses: list[float]) -> list[dict[str, Any]]:
    """The lines of a log: two for each training loss, the second with a validation loss."""
    log: list[dict[str, Any]] = []
    for number, (held_back, loss) in enumerate(zip(validation, losses, strict=True)):
        log += [{"samples_seen": 20 * number + 10, "loss": loss}]
        log += [{"samples_seen": 20 * number + 20, "loss": loss, "validation_loss": held_back}]
    return log


@pytest.mark.parametrize(
    ("validation", "losses", "warns"),
    [
        ([0.9, 0.5, 0.52, 0.54, 0.6], [0.9, 0.6, 0.5, 0.4, 0.3], True),
        ([0.9, 0.5, 0.52, 0.54, 0.6], [0.9, 0.4, 0.5, 0.6, 0.7], False),  # both rise: it diverges
        ([0.9, 0.5, 0.52, 0.51, 0.6], [0.9, 0.6, 0.5, 0.4, 0.3], False),  # up and down
        ([0.9, 0.5, 0.501, 0.502, 0.503], [0.9, 0.6, 0.5, 0.4, 0.3], False),  # by less than a hundredth
        ([0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.6, 0.5, 0.4, 0.3], False),
        ([0.5, 0.6], [0.9, 0.6], False),
    ],
)
def test_a_validation_loss_that_rises_while_the_training_loss_falls_is_a_warning(
    validation: list[float], losses: list[float], warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_log(tmp_path)
    for line in validated(validation, losses):
        log.losses.append({"loss": line["loss"]})
        log.write(line["samples_seen"], 1, 1e-3, {key: line[key] for key in line if key == "validation_loss"})
    log.close()
    assert ("has risen since 40 samples seen, from 0.5 to 0.6" in caplog.text) == warns


def test_the_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(1_000_000_000, np.uint8)
    code = (
        "import torch; from pipelines.training.training_log import peak_memory; print(peak_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 50_000_000 < int(done.stdout) < len(held)
