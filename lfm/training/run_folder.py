"""What a run leaves behind: checkpoints, from which training goes on, and weights, from which images are made.

    RUN/checkpoints/samples-000000064000/   complete if it has this name: it is written under another and renamed
        state.json                          samples seen, configuration, code version, manifest digest
        weights.safetensors                 the EMA in float32
        master-00000.safetensors, ...       weights, moments and averages, as whole tensors, a part by each rank
    RUN/weights.safetensors                 the newest checkpoint's, all that sampling needs
    RUN/snapshots/                          averages of other widths, from which more are made afterwards

A weights file carries in its header everything that sampling must know and check.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from lfm import storage
from lfm.errors import CheckpointError, LfmError, on_one_line
from lfm.training.ranks import Ranks
from lfm.weights_file import WEIGHTS

STATE = "state.json"
_FOLDER = "checkpoints"
_SNAPSHOTS = "snapshots"
_PREFIX = "samples-"
DAMAGED = "damaged-"  # before the name of a checkpoint that was put aside
_REPAIR = "remove that folder to resume from the checkpoint before it"
SHARED_FOLDER_SECONDS = 15.0  # for a new file to appear in the listings of other machines

logger = logging.getLogger(__name__)


def tag(samples_seen: int) -> str:
    """The name of the checkpoint at this point."""
    return f"{_PREFIX}{samples_seen:012d}"


class RunState(BaseModel):
    """What a checkpoint says of itself: the last file that is written into it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_seen: NonNegativeInt
    world_size: PositiveInt
    manifest_digest: str
    code_version: str
    config: dict[str, Any]  # the resolved experiment
    engine: dict[str, Any] = {}  # the few numbers that belong to its tensors
    files: dict[str, int] = {}  # crc32 of every other file


class RunFolder:
    """The checkpoints of one run on the local disk."""

    def __init__(self, path: str) -> None:
        if not storage.is_local(path):
            raise CheckpointError(f"{path}: a run is written to a local folder; copy it to object storage afterwards")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{path}: is a file, not a folder; name another with run")
        self.checkpoints = self.path / _FOLDER

    def temporary_tag(self, samples_seen: int) -> str:
        """The name it has while it is written."""
        return storage.TEMPORARY_PREFIX + tag(samples_seen)

    def snapshot(self, samples_seen: int, width: float) -> Path:
        """Where the power-function average of this relative width is put aside at this point."""
        return self.path / _SNAPSHOTS / f"{tag(samples_seen)}-{width:g}.safetensors"

    def snapshots(self) -> list[tuple[Path, int, float]]:
        """The snapshots, each with its samples seen and its relative width, the oldest first."""
        paths = sorted((self.path / _SNAPSHOTS).glob(f"{_PREFIX}*-*.safetensors"))
        parts = [path.stem.removeprefix(_PREFIX).split("-", 1) for path in paths]
        return [(path, int(samples), float(width)) for path, (samples, width) in zip(paths, parts, strict=True)]

    def complete(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        paths = self.checkpoints.glob(f"{_PREFIX}{'[0-9]' * 12}")
        return sorted(path for path in paths if (path / STATE).is_file())

    def newest(self) -> Path | None:
        """The checkpoint to go on from."""
        return next(reversed(self.complete()), None)

    def newest_intact(self) -> tuple[Path, RunState] | None:
        """Return the newest checkpoint whose files are as they were written; None if there is no checkpoint.

        Newer ones that are damaged are put aside under the prefix "damaged-", with a warning that names them.

        Raises:
            CheckpointError: all checkpoints are damaged; the last of them is left in place.
        """
        checkpoints = self.complete()
        while checkpoints:
            newest = checkpoints.pop()
            try:
                return newest, self.read_state(newest)
            except CheckpointError as error:
                if not checkpoints:
                    raise CheckpointError(
                        f"{on_one_line(error)} (it is the only checkpoint); or name another folder with run"
                    ) from error
                aside = newest.with_name(f"{DAMAGED}{newest.name}-{uuid.uuid4().hex[:4]}")
                newest.rename(aside)
                logger.warning(
                    "%s; put aside as %s, resuming from %s", str(error).split("; ")[0], aside.name, checkpoints[-1].name
                )
        return None

    def require_shared(self, ranks: Ranks) -> None:
        """Check that all ranks see the same folder: rank 0 writes a token file, which the others must find.

        Raises:
            CheckpointError: this rank does not see it.
        """
        token = ranks.broadcast(f".shared-{uuid.uuid4().hex[:12]}")
        path = self.path / token
        if ranks.world.is_main:
            path.touch()
        ranks.broadcast("the token is written")
        deadline = time.monotonic() + SHARED_FOLDER_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.path.absolute()}: is not shared: rank {ranks.world.rank} does not see what rank 0 writes there; "
                    "name a folder of a file system that all machines share with run"
                )
            next(self.path.parent.iterdir(), None)  # makes a network file system look again
            time.sleep(0.2)
        ranks.gather()
        if ranks.world.is_main:
            path.unlink()

    def read_state(self, checkpoint: Path, *, verify: bool = True) -> RunState:
        """The state of a checkpoint; with `verify` all of its files are checked against it.

        Raises:
            CheckpointError: it is damaged; names the file.
        """
        try:
            state = RunState.model_validate(storage.read_json(str(checkpoint / STATE)))
            files = state.files.items() if verify else ()
            wrong = [name for name, crc32 in files if storage.checksums(checkpoint / name).crc32 != crc32]
        except (ValidationError, LfmError, OSError) as error:
            raise CheckpointError(f"{checkpoint}: is damaged ({on_one_line(error)}); {_REPAIR}") from error
        if wrong:
            raise CheckpointError(f"{checkpoint / wrong[0]}: is not what was written; {_REPAIR}")
        return state

    @contextlib.contextmanager
    def only_one(self) -> Iterator[None]:
        """Hold the folder for this process, and remove what a killed one left half-written.

        Raises:
            CheckpointError: another process is training into it, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.path / ".lock").open("wb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{self.path}: another process trains into it; wait, or name another run"
                ) from error
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be written: {error}; name another folder with run"
                ) from error
            for path in self.checkpoints.glob(f"{storage.TEMPORARY_PREFIX}*"):
                storage.remove(str(path))
            for folder in (self.path, *self.path.iterdir()):  # snapshots and previews too
                storage.sweep(str(folder))
            yield

    def require_space(self, size: int, keep: int, beside: int = 0) -> None:
        """See that there is room for the checkpoints to come, of `size` bytes each, and for `beside` bytes.

        Raises:
            CheckpointError: there is not; says how much is missing.
        """
        above = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        needed = size * max(1, keep + 1 - len(self.complete())) + beside
        free = shutil.disk_usage(above).free
        if free < needed:
            raise CheckpointError(
                f"{self.path}: {free / 1e9:,.1f} GB are free, {needed / 1e9:,.1f} GB are needed for checkpoints of "
                f"{size / 1e9:,.1f} GB; make room, name another folder with run, or set train.keep_checkpoints lower"
            )

    def publish(self, samples_seen: int, state: RunState, keep: int) -> Path:
        """Make the checkpoint that was written under its temporary name visible, and drop the oldest beyond `keep`.

        Its weights become the run's.
        """
        temporary, final = (self.checkpoints / name(samples_seen) for name in (self.temporary_tag, tag))
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        for path in paths:
            _flush(path)
        files = {str(path.relative_to(temporary)): storage.checksums(path).crc32 for path in paths}
        storage.write_json(str(temporary / STATE), state.model_copy(update={"files": files}).model_dump(mode="json"))
        with storage.writing(str(self.path / WEIGHTS)) as weights:  # first: never older than the newest checkpoint
            shutil.copyfile(temporary / WEIGHTS, weights)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(self.checkpoints)
        for path in self.complete()[:-keep]:
            shutil.rmtree(path)
        return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
