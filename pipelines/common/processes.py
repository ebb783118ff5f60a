"""Several processes that share the work of a stage, and which part of it each of them takes."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lfm import storage
from lfm.errors import ConfigError, DataError, hide_credentials
from lfm.world import World
from pipelines.common import launcher

T = TypeVar("T")
C = TypeVar("C")
R = TypeVar("R")
SPAWN = multiprocessing.get_context("spawn")  # neither fsspec nor CUDA survives a fork
DIED = "a worker process died, perhaps for lack of memory; run the same command to resume"


def part_of(text: str) -> World:
    """Return part K of N, such as 3/16, as the world in which this machine has rank K - 1.

    Raises:
        ConfigError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError(f"`part` {text}: must be K/N, such as 3/16 for the third of sixteen parts")
    return World(part - 1, 0, parts)


def map_processes(function: Callable[[T], R], items: Sequence[T], num_processes: int) -> Iterator[R]:
    """Yield `function(item)` of all items as they are finished, in any order, computed by several processes.

    Raises:
        DataError: a process died.
        LfmError: raised by `function`; the remaining items are not started.
    """
    if num_processes == 1 or len(items) <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(min(num_processes, len(items)), SPAWN, start_worker)
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(DIED) from error
    except (SystemExit, KeyboardInterrupt):
        _terminate_children()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_on_every_gpu(work: Callable[[C, World], R], config: C, num_gpus: int | None) -> list[R]:
    """Return the results of `work(config, world)` of all ranks: one process per GPU, or `num_gpus` processes.

    Under a launcher this process is one of the ranks, and its result is the only one. The ranks must not wait for each
    other: if one dies, the others continue.

    Raises:
        ConfigError: there are fewer GPUs, or a launcher has started the processes already.
        DataError: every process died.
        LfmError: raised by a rank; the others are stopped.
    """
    if launcher.is_launched():
        if num_gpus:
            raise ConfigError("`num_gpus`: the launcher has started the processes already; leave it out")
        return [work(config, launcher.world())]
    size = num_processes(num_gpus)
    if size == 1:
        return [work(config, World())]
    threads = max(1, (os.cpu_count() or 1) // size)
    pools = [ProcessPoolExecutor(1, SPAWN, start_worker, (threads,)) for _ in range(size)]
    futures = [pool.submit(work, config, World(rank, rank, size)) for rank, pool in enumerate(pools)]
    try:
        _raise_first_error(futures)
    finally:
        _terminate_children()
    results = [future.result() for future in futures if not future.exception()]
    if not results:
        raise DataError(f"all {size} processes: {DIED}")
    if len(results) < size:
        print(f"{size - len(results)} of {size} processes died; the others finished their parts", file=sys.stderr)
    return results


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """End this process as an exception does when it receives SIGTERM in the block, so that no temporary file is left."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def logs_without_credentials() -> Iterator[None]:
    """Hide the credentials of URLs in all messages that are logged in the block."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_record_without_credentials)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def _record_without_credentials(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    record.msg, record.args = hide_credentials(record.getMessage()), ()
    return record


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _stop_worker(number: int, frame: object) -> None:
    storage.exit_at_once(128 + number)  # its executor would take an exception for the result of its work


def start_worker(threads: int = 1) -> None:
    """Prepare a worker process: exit when the parent is killed, so that it does not write beside the next run."""
    signal.signal(signal.SIGTERM, _stop_worker)
    logging.setLogRecordFactory(_record_without_credentials)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported
    parent: Any = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        parent.join()
        storage.exit_at_once(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def wait_for_json(path: str, content: Any, *, seconds: float = 120.0) -> None:
    """Wait until rank 0 has written `content` to a JSON file.

    Raises:
        DataError: it did not.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(DataError):  # damaged: rank 0 writes it again
            if storage.exists(path) and storage.read_json(path) == content:
                return
        time.sleep(0.2)
    raise DataError(f"{path}: rank 0 did not write it within {seconds:.0f} s; see its message")


def _terminate_children() -> None:
    for child in multiprocessing.active_children():
        child.terminate()


def num_processes(num_gpus: int | None) -> int:
    """Return `num_gpus`, or by default the number of this machine's GPUs, at least 1.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    import torch  # not at the top: processes that only pack images do without it

    available = torch.cuda.device_count()
    if available and num_gpus and num_gpus > available:
        raise ConfigError(f"`num_gpus` {num_gpus}: this machine has {available}")
    return num_gpus or available or 1


def _raise_first_error(futures: Sequence[Future[Any]]) -> None:
    """Wait for all ranks; raise the first error, except that of a process that died."""
    for future in as_completed(futures):
        if (error := future.exception()) and not isinstance(error, BrokenProcessPool):
            raise error
