"""Background threads that read ahead, so that reading, the network and writing overlap.

prefetch       the items of a generator, a few ahead of the consumer
map_ahead      a function of every item, computed by several threads, in order
ReadAhead      values by key, opened in an announced order and dropped when they are no longer requested
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    """Marks the end of the items."""


def prefetch(items: Generator[T], ahead: int) -> Generator[T]:
    """Yield the items of a generator that runs in a background thread, up to `ahead` items in advance.

    An exception of `items` is raised here, after the items before it. Closing this generator stops the thread and closes
    `items`.
    """
    ready: queue.Queue[T | _Failure | _End] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: T | _Failure | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def produce() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
            put(_End())
        except BaseException as error:  # any exception must reach the consumer, or it would wait for ever
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, computed by `threads` for a few items in advance."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ReadAhead(Generic[T]):
    """Values opened in the background in an announced order, each once, and dropped when no longer requested.

    Args:
        open_one: returns the value of a key; its exception is raised to the caller who gets that key, and to no other.
        threads: how many values are opened at the same time.
    """

    def __init__(self, open_one: Callable[[int], T], threads: int = 4) -> None:
        self._open_one, self._max_threads = open_one, threads
        self._lock, self._num_threads = threading.Lock(), 0
        self._values: dict[int, Future[T]] = {}

    def request(self, keys: Iterable[int]) -> None:
        """Open the values of `keys` in this order, and drop all others."""
        with self._lock:
            self._values = {key: self._values.get(key) or Future() for key in keys}
            waiting = sum(map(_is_waiting, self._values.values()))
            for _ in range(min(waiting, self._max_threads - self._num_threads)):
                self._num_threads += 1
                # Daemon threads: stopping a run must not wait for a store that does not answer.
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def get(self, key: int) -> T:
        """Return the value of `key`, waiting until it is open; request it if necessary."""
        if key not in self._values:
            self.request([*self._values, key])
        return self._values[key].result()

    def _work(self) -> None:
        while True:
            with self._lock:
                key = next((key for key, future in self._values.items() if _is_waiting(future)), None)
                if key is None:
                    self._num_threads -= 1
                    return
                future = self._values[key]
                future.set_running_or_notify_cancel()
            try:
                future.set_result(self._open_one(key))
            except BaseException as error:  # any exception must reach the caller who waits for the value
                future.set_exception(error)
            del future  # it would keep the value alive


def _is_waiting(future: Future[T]) -> bool:
    return not (future.running() or future.done())
