"""Shards opened ahead of need: in a known sequence, a bounded number at once, and closed when they are no longer wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """What `open_one` makes of the shards that are wanted, each once.

    Args:
        open_one: of a shard's index; what it raises is raised to who takes that shard, and to nobody else.
        at_once: how many are opened at the same time.
    """

    def __init__(self, open_one: Callable[[int], T], at_once: int = 4) -> None:
        self._open_one, self._at_once = open_one, at_once
        self._lock, self._threads = threading.Lock(), 0
        self._shards: dict[int, Future[T]] = {}

    def want(self, indices: Iterable[int]) -> None:
        """Open these in their sequence, and let go of all others."""
        with self._lock:
            self._shards = {index: self._shards.get(index) or Future() for index in indices}
            waiting = sum(map(_waits, self._shards.values()))
            for _ in range(min(waiting, self._at_once - self._threads)):
                self._threads += 1
                # Daemons, so that nobody who stops a run waits for the requests of a store that does not answer.
                threading.Thread(target=self._work, name="ahead", daemon=True).start()

    def take(self, index: int) -> T:
        """The shard of this index, waiting for it; one that was not wanted is from now on."""
        if index not in self._shards:
            self.want([*self._shards, index])
        return self._shards[index].result()

    def _work(self) -> None:
        while True:
            with self._lock:
                index = next((index for index, future in self._shards.items() if _waits(future)), None)
                if index is None:
                    self._threads -= 1
                    return
                future = self._shards[index]
                future.set_running_or_notify_cancel()
            try:
                future.set_result(self._open_one(index))
            except BaseException as error:  # whatever it is, who takes the shard must hear of it
                future.set_exception(error)
            del future  # it keeps the shard open


def _waits(future: Future[T]) -> bool:
    return not (future.running() or future.done())
