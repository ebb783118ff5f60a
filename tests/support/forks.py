"""Command lines in forks of this process, which saves the seconds that starting Python and torch takes."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Fork:
    """A child process that runs a function; `code` is its exit code, or minus the signal that ended it."""

    pid: int
    log: Path
    code: int | None = None
    peak_bytes: int = 0  # of its memory, after its end
    cpu_seconds: float = 0.0

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the process does not end in time."""
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.peak_bytes, self.cpu_seconds = usage.ru_maxrss << 10, usage.ru_utime + usage.ru_stime
            elif time.monotonic() > until:
                break
            else:
                time.sleep(0.005)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.wait(0) is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")


def fork(function: Callable[[], object], log: Path, environment: Mapping[str, str] = {}) -> Fork:
    """Run a function in a fork of this process, with its output in `log`.

    The exit code is that of the SystemExit that ends it, 0 without one, and 1 after any other exception.
    """
    pid = os.fork()
    if pid:
        return Fork(pid, log)
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        code = _exit_code(function)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
