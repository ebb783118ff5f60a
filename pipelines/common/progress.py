"""How far a stage is: a bar with rate and time left on a terminal, one line a minute elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

BAR_WIDTH = 20
SECONDS_BETWEEN = {True: 0.2, False: 60.0}  # by whether it is a terminal


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts what is done of `total`; a context manager whose last line stays.

    Args:
        title: of the stage.
        total: how many there are.
        unit: what is counted.
        done: how many were done before this process began; they do not count for the rate.
        quiet: show nothing (every rank but the main one).
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.unit, self.done, self.before = title, total, unit, done, done
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self.began = self.shown = time.monotonic()
        self.figures: dict[str, str] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._show()
        if self.on_terminal and not self.quiet:
            self.stream.write("\n")

    def advance(self, count: int, **figures: str) -> None:
        """Count `count` more; `figures` are shown behind the rate."""
        self.done += count
        self.figures.update(figures)
        if time.monotonic() - self.shown >= SECONDS_BETWEEN[self.on_terminal]:
            self._show()

    @property
    def line(self) -> str:
        """What is shown now."""
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.before) / elapsed if elapsed > 0 else 0.0
        share = self.done / self.total if self.total else 1.0
        parts = [f"{self.title}: {self.done:,} of {self.total:,} {self.unit}", f"{rate:,.1f}/s"]
        if self.done >= self.total:
            parts.append(f"took {duration(elapsed)}")
        elif rate:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self.figures.items()]
        bar = f"[{'#' * round(BAR_WIDTH * share):<{BAR_WIDTH}}] " if self.on_terminal else ""
        return bar + ", ".join(parts)

    def _show(self) -> None:
        self.shown = time.monotonic()
        if self.quiet:
            return
        if self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + self.line[:width].ljust(width))
        else:
            self.stream.write(self.line + "\n")
        self.stream.flush()
