"""Agreement between the ranks of a training, and failures that end all of them.

The ranks share a key-value store, torch's TCPStore on rank 0, from the first check until the end of training:

    broadcast   rank 0 decides (which checkpoint, which data), and every rank receives its decision
    failure     the first rank that fails stores its message, and every other rank ends with it
    beat        each rank increments a counter every second; the rank before it in a ring reports it as lost when the
                counter has not changed for LEASE_SECONDS, since it was killed or cannot be reached

So all ranks end soon after one of them has failed, each with one line, whether or not a launcher watches them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from lfm.errors import ConfigError, LfmError, on_one_line
from lfm.world import World

CONNECT_SECONDS = 300.0  # ranks of a large job may start minutes apart
BEAT_SECONDS = 1.0
LEASE_SECONDS = 20.0  # a rank whose counter does not change for so long is lost
GRACE_SECONDS = 3.0  # for the main thread to end by itself, before the process is ended


class Ranks:
    """The ranks of one training, as a context manager around all of it.

    With one rank there is no store and no watching.

    Args:
        world: this process among the ranks.

    Raises:
        ConfigError: this rank cannot reach rank 0.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = _connect(world) if world.size > 1 else None
        self._num_broadcasts = 0
        self._failure: str | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch ranks", daemon=True)

    def __enter__(self) -> Ranks:
        if self.store is not None:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.store is None:
            return
        if isinstance(error, Exception) and not isinstance(error, LfmError):
            self._wait_for_failure()  # a broken connection is the consequence of another rank's failure
        self._ended.set()
        if error is None:
            self._leave()
        elif isinstance(error, Exception) and self._failure is None:
            self._announce(f"rank {self.world.rank}: {on_one_line(error)}")
        elif self._failure is not None:
            raise LfmError(self._failure) from error

    def broadcast(self, value: Any) -> Any:
        """Return the `value` of rank 0, which JSON can represent, on every rank; all ranks must call it.

        Raises:
            LfmError: another rank failed.
        """
        if self.store is None:
            return value
        key = f"broadcast/{self._num_broadcasts}"
        self._num_broadcasts += 1
        if self.world.is_main:
            self.store.set(key, json.dumps(value))
        else:
            while not self.store.check([key]):
                self._raise_failure()
                time.sleep(0.05)
        return json.loads(self.store.get(key))

    def gather(self) -> None:
        """Wait until every rank has called it.

        Raises:
            LfmError: another rank failed.
        """
        if self.store is None:
            return
        key = f"gather/{self._num_broadcasts}"
        self._num_broadcasts += 1
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world.size:
            self._raise_failure()
            time.sleep(0.05)

    def require_equal(self, name: str, value: Any) -> None:
        """Check that `value` is the same on every rank; all ranks must call it.

        Raises:
            ConfigError: this rank's value is not that of rank 0; names `name`.
        """
        if self.broadcast(value) != value:
            raise ConfigError(f"{name}: differs between rank 0 and rank {self.world.rank}; start all ranks alike")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LfmError(self._failure)

    def _leave(self) -> None:
        """Record that this rank has finished; rank 0 waits until all have, since the store ends with it."""
        assert self.store is not None
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.world.rank}", "")
            deadline = time.monotonic() + LEASE_SECONDS
            while self.world.is_main and time.monotonic() < deadline:
                if self.store.check([f"left/{rank}" for rank in range(self.world.size)]):
                    return
                time.sleep(0.05)

    def _announce(self, message: str) -> None:
        """Store a message for all other ranks; rank 0 waits a moment until they have read it."""
        assert self.store is not None
        with contextlib.suppress(RuntimeError):  # the store may be gone with rank 0
            if not self.store.check(["failure"]):
                self.store.set("failure", message)
            deadline = time.monotonic() + 2 * GRACE_SECONDS
            while self.world.is_main and time.monotonic() < deadline:  # the store ends with rank 0
                if self.store.add("failure_readers", 0) >= self.world.size - 1:
                    return
                time.sleep(0.1)

    def _wait_for_failure(self) -> None:
        deadline = time.monotonic() + LEASE_SECONDS + 2 * BEAT_SECONDS
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _watch(self) -> None:
        """Watch for failures until training has ended; end the process after one."""
        message = self._watch_until_failure()
        if message is None:
            return
        self._failure = message
        if self._ended.wait(GRACE_SECONDS):
            return
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    def _watch_until_failure(self) -> str | None:
        assert self.store is not None
        rank, neighbour = self.world.rank, (self.world.rank + 1) % self.world.size
        last_count, last_change = -1, time.monotonic()
        try:
            store = self.store.clone()  # a connection of this thread's own
            while not self._ended.wait(BEAT_SECONDS):
                store.add(f"beat/{rank}", 1)
                if store.check(["failure"]):
                    store.add("failure_readers", 1)
                    return store.get("failure").decode()
                count = store.add(f"beat/{neighbour}", 0)
                if count != last_count:
                    last_count, last_change = count, time.monotonic()
                elif time.monotonic() - last_change > LEASE_SECONDS and not store.check([f"left/{neighbour}"]):
                    store.set(
                        "failure",
                        f"rank {neighbour} has not answered for {LEASE_SECONDS:.0f} s: it was killed, or "
                        "its machine cannot be reached; run the same command to resume",
                    )
        except RuntimeError as error:
            if self._ended.is_set():
                return None
            return f"rank 0 has ended or cannot be reached ({on_one_line(error)}); run the same command to resume"
        return None


def _connect(world: World) -> Any:
    """Return the store that the ranks share, when all of them have connected to it."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        rendezvous = torch.distributed.rendezvous(
            "env://", rank=world.rank, world_size=world.size, timeout=timedelta(seconds=CONNECT_SECONDS)
        )
        store, _, _ = next(rendezvous)
    except ValueError as error:
        raise ConfigError(f"MASTER_ADDR, MASTER_PORT: {on_one_line(error)}; set them, or use a launcher") from error
    except torch.distributed.DistNetworkError as error:
        problem = (
            f"rank {world.rank} cannot reach rank 0 ({on_one_line(error)}): check MASTER_ADDR and MASTER_PORT, and that "
            "rank 0 is running"
        )
        if "EADDRINUSE" in str(error):
            problem = "the port is taken, perhaps by another training; choose one, as in deepspeed --master_port 29501"
        raise ConfigError(f"{address}: {problem}") from error
    return store
