"""Work that runs ahead of who takes it, in a thread: reading and decoding beside the network, the network beside writing."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    """After the last item."""


def prefetch(items: Generator[T], ahead: int) -> Generator[T]:
    """The items as they come, up to `ahead` of them made before they are asked for.

    What `items` raises is raised here, at its place among them. Closing this generator stops the thread and closes `items`.
    """
    ready: queue.Queue[T | _Failure | _End] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: T | _Failure | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
            put(_End())
        except BaseException as error:  # whatever it is, who waits must hear of it
            put(_Failure(error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
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
    """`function` of every item, in order, computed by `threads` for a few items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
