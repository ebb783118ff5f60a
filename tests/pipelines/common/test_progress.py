"""Progress: a bar on a terminal, one line a minute elsewhere."""

from __future__ import annotations

import io

import pytest

from pipelines.common import progress
from pipelines.common.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_it_is_one_line_a_minute_with_rate_and_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("encode", 600, "images", stream=stream) as bar:
        for _ in range(600):
            clock[0] += 1
            bar.advance(1, psnr="20 dB")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11  # ten minutes, and the end
    assert lines[0] == "encode: 60 of 600 images, 1.0/s, 9:00 left, psnr 20 dB"
    assert lines[-1] == "encode: 600 of 600 images, 1.0/s, took 10:00, psnr 20 dB"


def test_on_a_terminal_it_stays_on_its_line(clock: list[float]) -> None:
    stream = Terminal()
    with Progress("train", 100, "samples", stream=stream) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance(1)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.count("\r") == 101
    assert max(map(len, text.replace("\n", "").split("\r"))) < 200


def test_what_was_done_before_does_not_count_for_the_rate(clock: list[float]) -> None:
    bar = Progress("train", 100, "samples", done=90, stream=io.StringIO())
    clock[0] += 10
    bar.advance(5)
    assert "95 of 100" in bar.line and "0.5/s" in bar.line and "0:10 left" in bar.line


def test_other_ranks_are_quiet_and_nothing_to_do_is_no_error(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("train", 0, "samples", quiet=True, stream=stream):
        pass
    assert stream.getvalue() == ""
    assert "0 of 0" in Progress("train", 0, "samples", stream=stream).line


def test_durations_read_as_a_clock() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3600, 7325)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "2:02:05",
    ]
