"""Train with a disk that is slow or full: python slow_disk.py SECONDS FULL_FROM [options of launch/train.py].

Writing a rank's part of a checkpoint takes SECONDS longer; from FULL_FROM samples on (0: never), the last rank finds no space
left. When a checkpoint is published, its name and the number of lines in the log are printed.
"""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from lfm.training import checkpoint_writer
from lfm.training.run_folder import RunFolder
from tests.support.commands import REPOSITORY


def main() -> None:
    seconds, full_from = float(sys.argv[1]), int(sys.argv[2])
    sys.argv[1:3] = []
    write_parts, publish = checkpoint_writer.write_parts, RunFolder.publish

    def write_slowly(folder: Path, rank: int, parts: dict[str, Any]) -> list[Path]:
        time.sleep(seconds)
        if full_from and int(folder.name.rpartition("-")[2]) >= full_from and rank + 1 == int(os.environ["WORLD_SIZE"]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_parts(folder, rank, parts)

    def publish_and_print(folder: RunFolder, *arguments: Any) -> Path:
        path = publish(folder, *arguments)
        num_lines = len((folder.path / "log.jsonl").read_text().splitlines())
        print(f"published {path.name} {num_lines}", flush=True)
        return path

    checkpoint_writer.write_parts = write_slowly
    RunFolder.publish = publish_and_print  # type: ignore[method-assign]
    runpy.run_path(str(REPOSITORY / "launch" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
