"""Progress: a bar on a terminal, one line a minute elsewhere."""

from __future__ import annotations

import io

import pytest
import tqdm.std

from pipelines.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_elsewhere_it_is_one_line_a_minute_with_rate_and_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("encode", 600, "images", stream=stream) as bar:
        for _ in range(600):
            clock[0] += 1
            bar.advance(1, psnr="20 dB")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12  # the start, ten minutes, and the end
    assert lines[0].startswith("encode: 0/600 [00:00<?")
    assert lines[1] == "encode: 60/600 [01:00<09:00,  1.00 images/s, psnr=20 dB]"
    assert lines[-1] == "encode: 600/600 [10:00<00:00,  1.00 images/s, psnr=20 dB]"


def test_on_a_terminal_it_stays_on_its_line(clock: list[float]) -> None:
    stream = Terminal()
    with Progress("train", 100, "samples", stream=stream) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance(1)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") == 102
    assert "100/100" in text and "50%" in text


def test_items_of_an_earlier_run_do_not_count_for_the_rate(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("train", 100, "samples", done=90, stream=stream) as bar:
        clock[0] += 10
        bar.advance(5)
    assert stream.getvalue().splitlines()[-1] == "train: 95/100 [00:10<00:10,  0.50 samples/s]"


def test_the_count_can_be_set_to_that_of_all_processes(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("encode", 100, "images", stream=stream) as bar:
        bar.advance(10)
        bar.done = 70
        assert bar.done == 70
    assert "70/100" in stream.getvalue().splitlines()[-1]


def test_other_ranks_are_quiet_and_an_empty_stage_is_no_error(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("train", 0, "samples", quiet=True, stream=stream) as bar:
        bar.advance(1, loss="0.1")
    assert stream.getvalue() == ""
    with Progress("train", 0, "samples", stream=stream):
        pass
    assert "train: 0/" in stream.getvalue()


def test_an_error_leaves_the_last_state(clock: list[float]) -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="damaged"), Progress("verify", 3, "shards", stream=stream) as bar:
        bar.advance(2)
        raise ValueError("damaged")
    assert "2/3" in stream.getvalue().splitlines()[-1]
