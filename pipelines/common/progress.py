"""Progress of a stage: a bar with rate and time left on a terminal, and one line a minute elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from typing import TextIO

from tqdm import tqdm

from lfm.errors import hide_credentials

QUIET = "LFM_QUIET"  # environment variable: show no progress
COUNTS = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class LineWriter:
    """A stream for logs: each state of a bar becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write the text as one line, without the carriage return and the padding of a bar."""
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


class Progress(tqdm):
    """Counts the finished part of `total`; a context manager whose last line remains visible.

    Args:
        title: name of the stage.
        total: number of items.
        unit: name of the items.
        done: number of items that were finished before this process started; the rate excludes them.
        quiet: show nothing (on every rank but the main one); the environment variable `QUIET` does the same.
    """

    monitor_interval = 0  # no monitor thread

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        stream = stream or sys.stderr
        terminal = stream.isatty()
        super().__init__(
            desc=hide_credentials(title),
            total=total,
            unit=f" {unit}",
            initial=done,
            disable=quiet or bool(os.environ.get(QUIET)),
            file=stream if terminal else LineWriter(stream),
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 60.0,
            miniters=1,
            smoothing=0,  # the mean rate since the start
            bar_format=f"{'{l_bar}{bar}|' if terminal else '{desc}:'} {COUNTS}",
        )

    @property
    def done(self) -> int:
        """Number of finished items; settable, where other processes work on the same items."""
        return self.n

    @done.setter
    def done(self, count: int) -> None:
        self.n = count

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.disable:
            self.write(text, file=sys.stderr)

    def advance(self, count: int, **figures: str) -> None:
        """Count `count` more items; `figures` are shown behind the rate."""
        if figures:
            self.set_postfix(figures, refresh=False)
        self.update(count)


Progress.set_lock(threading.RLock())  # tqdm's own lock is a semaphore between processes, which nothing here needs
