"""Checkpoints that are written in the background, while training goes on.

    start       all ranks copy the state to host memory; the thread of each rank writes and syncs its part
    advance     at a later step, all ranks know that all parts are complete; the thread of rank 0 publishes the checkpoint
    finish      all ranks wait until the checkpoint is published: before the next one, and at the end

The threads make no collective calls. What the ranks must know of one another goes with the sums of every step: see `flags`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lfm import weights_file
from lfm.errors import StorageError, on_one_line
from lfm.training.engine import Engine, HostBuffers, StateCopy, write_parts
from lfm.training.run_folder import RunFolder, RunState, flush
from lfm.weights_file import WEIGHTS, WeightsHeader


class CheckpointWriter:
    """Writes the checkpoints of one rank in one background thread; all ranks must call `start` and `finish`.

    Args:
        engine: the model in training.
        folder: run folder.
        keep: number of checkpoints to keep.
        average: name of the average whose weights are the weights of the run.
        subsets_digest: of the data; see `Mixture.subsets_digest`.
        on_publish: called in the thread of rank 0 after a checkpoint is published.
    """

    def __init__(
        self,
        engine: Engine,
        folder: RunFolder,
        keep: int,
        average: str = "ema",
        subsets_digest: str | None = None,
        on_publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.folder, self.keep, self.average = engine, folder, keep, average
        self.subsets_digest, self.on_publish = subsets_digest, on_publish
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None  # writes this rank's part, then publishes; None between checkpoints
        self._state: RunState | None = None  # of the checkpoint that is written
        self._publishes = False  # whether all ranks know that all parts are complete

    def start(self, header: WeightsHeader) -> None:
        """Copy the state of training, and begin to write it; wait for the checkpoint before it.

        Args:
            header: header of the weights.

        Raises:
            StorageError: the checkpoint before it cannot be written.
        """
        self.finish()
        copy = self.engine.copy_state(self._buffers, self.average)
        self._state = RunState(
            samples_seen=header.samples_seen,
            world_size=self.engine.world.size,
            manifest_digest=header.manifest_digest,
            subsets_digest=self.subsets_digest,
            data_history=header.data_history,
            code_version=header.code_version,
            config=header.config,
            engine=copy.numbers,
            prediction=header.prediction,
            initialized_from=asdict(header.initialized_from) if header.initialized_from else None,
        )
        temporary = self.folder.checkpoints / self.folder.temporary_tag(header.samples_seen)
        self._publishes = False
        self._job = self._submit(self._write, temporary, copy, header)

    def flags(self) -> tuple[bool, bool]:
        """Return whether this rank's part is complete but not yet published, and whether writing failed.

        All ranks sum both at every step, and pass the sums to `advance`.
        """
        is_done = self._job is not None and self._job.done()
        has_failed = self._job is not None and is_done and self._job.exception() is not None
        return is_done and not self._publishes and not has_failed, has_failed

    def advance(self, num_complete: int, num_failed: int) -> None:
        """Publish the checkpoint in the background if the parts of all ranks are complete.

        Args:
            num_complete: number of ranks whose part was complete at an earlier step since `start`.
            num_failed: number of ranks on which writing had failed.

        Raises:
            StorageError: the checkpoint cannot be written.
        """
        if num_failed:
            self._raise_failure()
        if num_complete == self.engine.world.size and not self._publishes:
            self._publishes = True
            if self.engine.world.is_main:
                self._job = self._submit(self._publish)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is published.

        Raises:
            StorageError: it cannot be written.
        """
        if self._job is None:
            return
        self._wait()
        self.advance(self.engine.world.size, 0)
        self._wait()
        self._job, self._state = None, None

    def close(self) -> None:
        """Wait for the thread, and end it.

        After an error of training, a checkpoint that is not yet known to be complete on all ranks is not published.
        """
        if self.engine.world.size == 1:
            with contextlib.suppress(StorageError):  # it must not hide the error of training
                self.finish()
        self._thread.shutdown()

    def _wait(self) -> None:
        """Wait until the jobs of all ranks have ended."""
        assert self._job is not None
        has_failed = float(self._job.exception() is not None)
        if self.engine.sum_over_ranks(torch.tensor(has_failed, device=self.engine.device)) > 0:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._job is not None:
            self._job.result()
        # `Ranks` replaces it by the message of the rank that failed.
        raise RuntimeError("a checkpoint could not be written on another rank")

    def _submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        return self._thread.submit(self._report_errors, function, *arguments)

    def _report_errors(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"{self.folder.checkpoints}: a checkpoint cannot be written ({on_one_line(error)}); is there no space "
                "left? Make room, and run the same command to resume from the checkpoint before it"
            ) from error

    def _write(self, temporary: Path, copy: StateCopy, header: WeightsHeader) -> None:
        for path in write_parts(temporary, self.engine.world.rank, copy.parts):
            flush(path)
        if self.engine.world.is_main:
            weights_file.save_weights(str(temporary / WEIGHTS), copy.weights, header)

    def _publish(self) -> None:
        assert self._state is not None
        self.folder.publish(self._state.samples_seen, self._state, self.keep)
        self.on_publish()
