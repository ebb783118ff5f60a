"""A local disk that is full after some more files, without mounting one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest


class SmallDisk:
    """Lets the next files be published, and no others: renaming them into place raises the error of a full disk.

    Attributes:
        room: number of files that still fit; None for any number.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        replace = Path.replace

        def replace_if_it_fits(path: Path, target: Path | str) -> Path:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.room is not None:
                self.room -= 1
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replace_if_it_fits)
