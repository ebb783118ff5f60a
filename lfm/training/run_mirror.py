"""A run at a URL: trained in a local folder, and carried to the URL while training goes on.

    RUN_URL/checkpoints/samples-.../    complete as soon as its state.json is there, which is uploaded last
    RUN_URL/...                         all other files of the folder, uploaded before the checkpoint that they belong to
    FOLDER/.carried.json                what this folder has uploaded or downloaded: size and time of each file

Another machine, or this one with an empty folder, continues from the newest complete checkpoint at the URL. A checkpoint that
is removed from the folder is removed from the URL, its state.json first. What cannot be uploaded is tried again with the next
checkpoint and at the end of the run; training does not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from lfm import storage
from lfm.errors import CheckpointError, LfmError, StorageError, hide_credentials, on_one_line
from lfm.training.run_folder import CHECKPOINTS, STATE, RunFolder

RECORD = ".carried.json"
_SMALL_FILE = 64 << 20  # bytes of a file that is copied to memory first, since a log grows while it is read
_MOST_WAITING = 2  # carries: one that runs, and one that will carry everything since it began

logger = logging.getLogger(__name__)


class RunMirror:
    """The copy of a run at a URL, as a context manager around its training; on the main rank alone.

    Args:
        url: of the run.
        folder: where the run is trained, which no other process trains into.
    """

    def __init__(self, url: str, folder: RunFolder) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self._thread = ThreadPoolExecutor(1, "carry")
        self._jobs: list[Future[None]] = []
        self._carried = self._read_record()

    def __enter__(self) -> RunMirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Carry what is left; after an error without waiting for it, since other ranks wait for the message.

        Raises:
            StorageError: not everything can be carried; not raised in place of another error.
        """
        self._thread.submit(self._carry)
        self._thread.shutdown(wait=error is None)
        if error is None and (missing := self._missing()):
            raise StorageError(
                f"{self.url}: {len(missing)} files of {self.folder.path} could not be carried there, such as {missing[0]}; "
                "run the same command on this machine to carry them"
            )

    def carry(self) -> None:
        """Begin to carry what is new, in the background."""
        self._jobs = [job for job in self._jobs if not job.done()]
        if len(self._jobs) < _MOST_WAITING:
            self._jobs.append(self._thread.submit(self._carry))

    def fetch(self) -> None:
        """Download the newest intact checkpoint, and all files beside it, if it is newer than those of the folder.

        Raises:
            StorageError: the URL cannot be read, or the disk is full.
        """
        names = self._names_at_url()
        own = self.folder.newest()
        for name in sorted(_complete(names), reverse=True):
            if own is not None and name <= own.name:
                return
            if self._fetch_checkpoint(name, names):
                others = [path for path in names if not path.startswith(f"{CHECKPOINTS}/")]
                for path in others:
                    self._download(path, self.folder.path / path)
                self._write_record()
                return

    def _fetch_checkpoint(self, name: str, names: set[str]) -> bool:
        """Download a checkpoint, and return whether it is intact."""
        prefix, temporary = f"{CHECKPOINTS}/{name}/", self.folder.checkpoints / f"{storage.TEMPORARY_PREFIX}{name}"
        final = self.folder.checkpoints / name
        for path in sorted(names):
            if path.startswith(prefix):
                storage.download(storage.join(self.url, path), temporary / path.removeprefix(prefix))
        try:
            self.folder.read_state(temporary)
        except CheckpointError as error:
            reason = str(error).split("; ")[0].replace(str(temporary), storage.join(self.url, CHECKPOINTS, name))
            logger.warning("%s; resuming from the checkpoint before it", reason)
            shutil.rmtree(temporary)
            return False
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for file in final.rglob("*"):
            if file.is_file():
                self._note(file)
        return True

    def _download(self, name: str, path: Path) -> None:
        with storage.writing(str(path)) as temporary:
            storage.download(storage.join(self.url, name), temporary)
        self._note(path)

    def _carry(self) -> None:
        """Upload what has changed, checkpoints last, and remove old checkpoints; warn of what fails."""
        try:
            names = self._names_at_url()
            for path in self._files():
                if self._is_new(path, names) and not self._is_in_checkpoint(path):
                    self._upload(path)
            for checkpoint in self.folder.complete():
                self._carry_checkpoint(checkpoint, names)
            self._remove_old_checkpoints(names)
        except (LfmError, OSError) as error:
            logger.warning(
                "%s: the run is not carried there (%s); trying again with the next checkpoint",
                hide_credentials(self.url),
                on_one_line(error),
            )

    def _carry_checkpoint(self, checkpoint: Path, names: set[str]) -> None:
        """Upload a checkpoint, state.json last; one that is removed meanwhile is left incomplete."""
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != STATE)
        state = checkpoint / STATE
        new = [path for path in (*files, state) if self._is_new(path, names)]
        if not new:
            return
        if self._name(state) in names:
            storage.remove(storage.join(self.url, self._name(state)))
        for path in [*(path for path in new if path != state), state]:
            if not self._upload(path):
                return

    def _remove_old_checkpoints(self, names: set[str]) -> None:
        own = {path.name for path in self.folder.complete()}
        newest = max(own, default="")
        theirs = {name.split("/")[1] for name in names if name.startswith(f"{CHECKPOINTS}/")}
        for name in sorted(theirs - own):
            if name < newest:
                folder = storage.join(self.url, CHECKPOINTS, name)
                storage.remove(storage.join(folder, STATE))
                storage.remove(folder)

    def _upload(self, path: Path) -> bool:
        """Upload a file; return False if it no longer exists."""
        url = storage.join(self.url, self._name(path))
        try:
            signature = _signature(path)
            if signature[0] <= _SMALL_FILE:
                storage.write_bytes(url, path.read_bytes())
            else:
                storage.upload(path, url)
        except FileNotFoundError:
            return False
        except StorageError:
            if not path.exists():
                return False
            raise
        self._carried[self._name(path)] = signature
        self._write_record()
        return True

    def _missing(self) -> list[str]:
        """Return the names of files that are not carried as they are now."""
        return [self._name(path) for path in self._files() if self._carried.get(self._name(path)) != _signature(path)]

    def _is_new(self, path: Path, names: set[str]) -> bool:
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError):
            return name not in names or self._carried.get(name) != _signature(path)
        return False

    def _files(self) -> list[Path]:
        """Return all files of the run: without hidden ones, and of its checkpoints without those put aside."""
        complete = {path.name for path in self.folder.complete()}
        files = []
        for path in sorted(self.folder.path.rglob("*")):
            parts = path.relative_to(self.folder.path).parts
            is_hidden = any(part.startswith(".") for part in parts)
            if not is_hidden and path.is_file() and (parts[0] != CHECKPOINTS or parts[1] in complete):
                files.append(path)
        return files

    def _is_in_checkpoint(self, path: Path) -> bool:
        return self.folder.checkpoints in path.parents

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder.path).as_posix()

    def _names_at_url(self) -> set[str]:
        return set(storage.find(self.url)) if storage.exists(self.url) else set()

    def _note(self, path: Path) -> None:
        self._carried[self._name(path)] = _signature(path)

    def _read_record(self) -> dict[str, tuple[int, int]]:
        """Return size and time of the files that were carried; empty if the record is of another URL, or damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            content = json.loads((self.folder.path / RECORD).read_text())
            if content["url"] == hide_credentials(self.url):
                return {name: (int(size), int(time)) for name, (size, time) in content["files"].items()}
        return {}

    def _write_record(self) -> None:
        content = {"url": hide_credentials(self.url), "files": self._carried}
        storage.write_bytes(str(self.folder.path / RECORD), json.dumps(content).encode(), flush=False)


def _complete(names: set[str]) -> set[str]:
    """Return the names of the complete checkpoints among the files of a run."""
    parts = [name.split("/") for name in names]
    return {part[1] for part in parts if len(part) == 3 and part[0] == CHECKPOINTS and part[2] == STATE}


def _signature(path: Path) -> tuple[int, int]:
    """Return what changes when a file does: size in bytes, and time of its last change in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
