"""Leaving when asked to, after saving: by SIGTERM (Slurm, spot machines, launchers) or Ctrl-C."""

from __future__ import annotations

import signal


class StopRequest:
    """Whether this process was asked to leave within the block; asked again by the same signal, it dies."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.came = True
        signal.signal(number, self.before[signal.Signals(number)])
