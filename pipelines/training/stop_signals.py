"""Stopping after saving, on SIGTERM (Slurm, spot machines, launchers) or Ctrl-C."""

from __future__ import annotations

import signal


class StopRequest:
    """Records whether SIGTERM or SIGINT was received within the block; the same signal again ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopRequest:
        self.handlers = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self.handlers[signal.Signals(number)])
