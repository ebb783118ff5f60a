"""The run folder: checkpoints, from which training resumes, and the weights for sampling.

RUN/checkpoints/samples-000000064000/   a complete checkpoint: it is written under another name and renamed
    state.json                          samples seen, configuration, code version, manifest digest
    weights.safetensors                 EMA weights in float32
    master-00000.safetensors, ...       weights, moments and averages as whole tensors; each rank writes a part
RUN/checkpoints/damaged-.../            a checkpoint whose files have changed since they were written, put aside
RUN/weights.safetensors                 EMA weights of the newest checkpoint, all that sampling needs
RUN/snapshots/                          power-function averages, of which `lfm ema` makes averages of other widths
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

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from lfm import storage, weights_file
from lfm.data.versions import Segment
from lfm.errors import CheckpointError, LfmError, on_one_line
from lfm.training.ranks import Ranks
from lfm.weights_file import WEIGHTS

STATE = "state.json"
CHECKPOINTS = "checkpoints"
_SNAPSHOTS = "snapshots"
_PREFIX = "samples-"
DAMAGED = "damaged-"  # prefix of a checkpoint that was put aside
_REPAIR = "remove that folder to resume from the checkpoint before it"
SHARED_FOLDER_SECONDS = 15.0  # for a new file to appear in the listings of other machines

logger = logging.getLogger(__name__)


def tag(samples_seen: int) -> str:
    """Return the name of the checkpoint at `samples_seen`."""
    return f"{_PREFIX}{samples_seen:012d}"


class RunState(BaseModel):
    """The description of a checkpoint; state.json, which is written into it last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_seen: NonNegativeInt
    world_size: PositiveInt
    manifest_digest: str
    subsets_digest: str | None = None  # of the samples that are read, if they are chosen by columns
    data_history: tuple[Segment, ...] = ()  # versions of the data that were read, as in the header of the weights
    code_version: str
    config: dict[str, Any]  # the resolved experiment
    engine: dict[str, Any] = {}  # returned by `Engine.save`
    prediction: str = "velocity"  # of the network, as in the header of the weights
    initialized_from: dict[str, Any] | None = None  # the source of the first weights, as in the header of the weights
    files: dict[str, int] = {}  # crc32 of every other file


class RunFolder:
    """A run's folder on a local or network file system; it need not exist yet.

    Args:
        path: the folder.
        key: of the configuration that names the folder, for messages.

    Raises:
        CheckpointError: the path is a URL, or a file.
    """

    def __init__(self, path: str, key: str = "run") -> None:
        if not storage.is_local(path):
            raise CheckpointError(f"{path}: must be a local folder; copy the run to one")
        self.path, self.key = Path(path), key
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{path}: is a file, not a folder; name another with {key}")
        self.checkpoints = self.path / CHECKPOINTS

    def temporary_tag(self, samples_seen: int) -> str:
        """Return the name of the checkpoint at `samples_seen` while it is written."""
        return storage.TEMPORARY_PREFIX + tag(samples_seen)

    def snapshot(self, samples_seen: int, width: float) -> Path:
        """Return the path of the snapshot of the power-function average of a relative width at `samples_seen`."""
        return self.path / _SNAPSHOTS / f"{tag(samples_seen)}-{width:g}.safetensors"

    def snapshots(self) -> list[tuple[Path, int, float]]:
        """Return path, samples seen and relative width of each snapshot, the oldest first."""
        paths = sorted((self.path / _SNAPSHOTS).glob(f"{_PREFIX}*-*.safetensors"))
        parts = [path.stem.removeprefix(_PREFIX).split("-", 1) for path in paths]
        return [(path, int(samples), float(width)) for path, (samples, width) in zip(paths, parts, strict=True)]

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        paths = self.checkpoints.glob(f"{_PREFIX}{'[0-9]' * 12}")
        return sorted(path for path in paths if (path / STATE).is_file())

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; None if there is none."""
        return next(reversed(self.complete()), None)

    def newest_intact(self) -> tuple[Path, RunState] | None:
        """Return the newest undamaged checkpoint with its state; None if there is no checkpoint.

        Damaged checkpoints that are newer are renamed to "damaged-...", with a warning that names them.

        Raises:
            CheckpointError: all checkpoints are damaged; the oldest of them is not renamed.
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

    def repair_weights(self, checkpoint: Path) -> None:
        """Replace the weights of the run by those of a checkpoint, if they are missing or damaged."""
        try:
            weights_file.load_weights(str(self.path))
        except CheckpointError as error:
            logger.warning("%s; taken from %s", str(error).split("; ")[0], checkpoint.name)
            self._take_weights(checkpoint)

    def require_shared(self, ranks: Ranks) -> None:
        """Check that all ranks see the same folder: a file that rank 0 writes must become visible to the others.

        Raises:
            CheckpointError: it does not become visible to this rank.
        """
        token = ranks.broadcast(f".shared-{uuid.uuid4().hex[:12]}")
        path = self.path / token
        if ranks.world.is_main:
            path.touch()
        ranks.broadcast(None)  # the file exists from here on
        deadline = time.monotonic() + SHARED_FOLDER_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.path.absolute()}: is not shared: rank {ranks.world.rank} does not see what rank 0 writes; "
                    f"set {self.key} to a folder on a file system that all machines share"
                )
            next(self.path.parent.iterdir(), None)  # makes a network file system look again
            time.sleep(0.2)
        ranks.gather()
        if ranks.world.is_main:
            path.unlink()

    def read_state(self, checkpoint: Path, *, verify: bool = True) -> RunState:
        """Read the state of a checkpoint; with `verify`, compare the checksums of all its files.

        Raises:
            CheckpointError: the checkpoint is damaged; names the file.
        """
        try:
            state = RunState.model_validate(storage.read_json(str(checkpoint / STATE)))
            files = state.files.items() if verify else ()
            wrong = [name for name, crc32 in files if storage.checksums(checkpoint / name).crc32 != crc32]
            state.model_dump(mode="json")  # as the ranks compare it
        except (ValueError, LfmError, OSError) as error:  # ValueError: not of this form, or nested too deeply
            raise CheckpointError(f"{checkpoint}: is damaged ({on_one_line(error)}); {_REPAIR}") from error
        if wrong:
            raise CheckpointError(f"{checkpoint / wrong[0]}: is not what was written; {_REPAIR}")
        return state

    @contextlib.contextmanager
    def only_one(self) -> Iterator[None]:
        """Lock the folder within the block, and remove files that a killed process has not completed.

        Raises:
            CheckpointError: another process has locked the folder, or it cannot be written.
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
                    f"{self.path}: cannot be written: {error}; name another folder with {self.key}"
                ) from error
            for path in self.checkpoints.glob(f"{storage.TEMPORARY_PREFIX}*"):
                storage.remove(str(path))
            for folder in (self.path, *self.path.iterdir()):  # snapshots and previews too
                storage.sweep(str(folder))
            yield

    def require_space(self, size: int, keep: int, beside: int = 0) -> None:
        """Check that the disk has room for the next checkpoints and the weights.

        Args:
            size: bytes of one checkpoint.
            keep: number of checkpoints to keep; one more exists while it is written.
            beside: bytes of all else that is written.

        Raises:
            CheckpointError: there is too little room; names both sizes.
        """
        existing = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        needed = size * max(1, keep + 1 - len(self.complete())) + beside
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise CheckpointError(
                f"{self.path}: {free / 1e9:,.1f} GB are free, {needed / 1e9:,.1f} GB are needed for checkpoints of "
                f"{size / 1e9:,.1f} GB; make room, name another folder with {self.key}, or set train.keep_checkpoints lower"
            )

    def publish(self, samples_seen: int, state: RunState, keep: int) -> Path:
        """Complete the checkpoint that was written under its temporary name, and return its path.

        Its weights become those of the run. The oldest checkpoints beyond the newest `keep` are removed.
        """
        temporary, final = (self.checkpoints / name(samples_seen) for name in (self.temporary_tag, tag))
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        for path in paths:
            flush(path)
        files = {str(path.relative_to(temporary)): storage.checksums(path).crc32 for path in paths}
        storage.write_json(
            str(temporary / STATE), state.model_copy(update={"files": files}).model_dump(mode="json"), sealed=True
        )
        self._take_weights(temporary)  # before the checkpoint: the run's weights are never older
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush(self.checkpoints)
        for path in self.complete()[:-keep]:
            shutil.rmtree(path)
        return final

    def _take_weights(self, checkpoint: Path) -> None:
        with storage.writing(str(self.path / WEIGHTS)) as weights:
            shutil.copyfile(checkpoint / WEIGHTS, weights)


def flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
