"""Several processes of one machine that do one job, each as another rank."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lfm.errors import ConfigError, DataError
from lfm.world import World

C = TypeVar("C")
R = TypeVar("R")
SPAWN = multiprocessing.get_context("spawn")  # neither fsspec nor CUDA may be forked


def on_every_gpu(work: Callable[[C, World], R], config: C, num_gpus: int | None) -> list[R]:
    """What `work(config, world)` gives on each rank: a process for every GPU there is, or for `num_gpus` of them.

    Under a launcher this process is one of its ranks, and works alone. The ranks must not wait for each other: where one
    dies, the others go on.

    Raises:
        ConfigError: there are fewer GPUs, or a launcher has started the processes already.
        DataError: every process died.
        LfmError: what a rank raised; the others are stopped.
    """
    import torch  # here: the workers that only pack images do without it

    from pipelines.common import factory

    if "WORLD_SIZE" in os.environ:
        if num_gpus:
            raise ConfigError("--num-gpus: the launcher has started the processes already; leave it out")
        return [work(config, factory.world())]
    there = torch.cuda.device_count()
    if there and num_gpus and num_gpus > there:
        raise ConfigError(f"--num-gpus {num_gpus}: this machine has {there}")
    size = num_gpus or there or 1
    if size == 1:
        return [work(config, World())]
    threads = max(1, (os.cpu_count() or 1) // size)
    pools = [ProcessPoolExecutor(1, SPAWN, begin_worker, (threads,)) for _ in range(size)]
    futures = [pool.submit(work, config, World(rank, rank, size)) for rank, pool in enumerate(pools)]
    try:
        for future in as_completed(futures):
            if (error := future.exception()) and not isinstance(error, BrokenProcessPool):
                raise error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
    results = [future.result() for future in futures if not future.exception()]
    if not results:
        raise DataError("every process died, perhaps for lack of memory; run the same command again, it goes on")
    if len(results) < size:
        print(f"{size - len(results)} of {size} processes died; the others have done their part", file=sys.stderr)
    return results


def begin_worker(threads: int = 1) -> None:
    """In a worker: die at once where the parent is killed, so that nobody writes beside the next run."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
