"""The training stream: latents gathered from mapped shards by one background thread, in the order of `Order`.

A batch is one strided gather per shard of its window: no file is opened and nothing is decoded per sample, so one thread
is enough, and there are no worker processes whose state would have to be saved. State is the number of samples seen.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from lfm import storage
from lfm.conditioning import drop_condition
from lfm.data.draws import draw
from lfm.data.manifest import Manifest
from lfm.data.order import Order
from lfm.data.shards import LatentShard
from lfm.errors import DataError
from lfm.types import Condition, LatentBatch
from lfm.world import World


@dataclass(frozen=True)
class StreamOptions:
    """What decides the stream beside its data."""

    seed: int = 0
    window: int = 8  # shards shuffled together
    global_batch: int = 256  # samples per step over all ranks
    class_conditional: bool = False
    class_dropout: float = 0.0


class LatentStream:
    """The batches of one rank, from any sample of the global order on.

    Args:
        folder: of the latent shards, a path or URL.
        manifest: theirs.
        options: the same on every rank.
        world: this rank's place; its part of every global batch is a contiguous slice.
        cache: where remote shards are kept.
    """

    def __init__(
        self, folder: str, manifest: Manifest, options: StreamOptions, world: World, cache: storage.Cache
    ) -> None:
        if manifest.autoencoder is None or manifest.num_samples == 0:
            raise DataError(f"{folder}: holds no latents to train on")
        self.folder, self.manifest, self.options, self.world, self.cache = folder, manifest, options, world, cache
        self.order = Order([shard.samples for shard in manifest.shards], options.seed, options.window)
        self.scale, self.shift = manifest.autoencoder.scale_factor, manifest.autoencoder.shift
        self.has_flips = any(member.suffix == "latent_flip.npy" for member in manifest.members)
        self.wait_seconds = 0.0
        self._open: OrderedDict[int, LatentShard] = OrderedDict()

    def batches(self, samples_seen: int, *, ahead: int = 4) -> Generator[LatentBatch]:
        """Endless batches of this rank from `samples_seen` on; time spent waiting adds up in `wait_seconds`."""
        ready: queue.Queue[LatentBatch | BaseException] = queue.Queue(ahead)
        stopped = threading.Event()

        def put(item: LatentBatch | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            position = samples_seen
            try:
                while not stopped.is_set():
                    put(self.batch(position))
                    position += self.options.global_batch
            except BaseException as error:  # whatever it is, the training thread must hear of it
                put(error)

        thread = threading.Thread(target=read, name="latent-stream", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def batch(self, samples_seen: int) -> LatentBatch:
        """This rank's part of the global batch that begins at sample `samples_seen`."""
        part = self.world.slice_of(self.options.global_batch)
        shards, rows = self.order.at(samples_seen + part.start, part.stop - part.start)
        by_shard = np.argsort(shards, kind="stable")  # the order within a batch is free: everything is per sample
        shards, rows = shards[by_shard], rows[by_shard]
        numbers = samples_seen + part.start + by_shard
        member = next(member for member in self.manifest.members if member.suffix == "latent.npy")
        shape = (member.shape[0] // 2, *member.shape[1:])
        draws = draw(self.options.seed, numbers, shape)
        posterior, classes = self._gather(shards, rows, draws.flip & self.has_flips, member.shape)

        moments = torch.from_numpy(posterior).float().unflatten(1, (2, shape[0]))
        latents = moments[:, 0] + moments[:, 1] * torch.from_numpy(draws.posterior_noise)
        condition = Condition(torch.from_numpy(classes) if self.options.class_conditional else None)
        dropped = torch.from_numpy(draws.drop < self.options.class_dropout)
        return LatentBatch(
            sample_numbers=torch.from_numpy(numbers),
            latents=(latents - self.shift) * self.scale,
            noise=torch.from_numpy(draws.noise),
            uniform=torch.from_numpy(draws.uniform),
            condition=drop_condition(condition, dropped, num_classes=len(self.manifest.classes)),
        )

    def _gather(
        self, shards: np.ndarray, rows: np.ndarray, flip: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posteriors float16 (B, 2C, h, w) and class indices int64 (B,) of rows sorted by shard."""
        posterior = np.empty((len(rows), *shape), np.float16)
        classes = np.zeros(len(rows), np.int64)
        borders = np.flatnonzero(np.diff(shards)) + 1
        for begin, end in zip([0, *borders], [*borders, len(rows)], strict=True):
            shard = self._shard(int(shards[begin]))
            part = slice(begin, end)
            for suffix, wanted in (("latent.npy", ~flip[part]), ("latent_flip.npy", flip[part])):
                if wanted.any():
                    posterior[part][wanted] = shard.columns[suffix][rows[part][wanted]]
            if "cls" in shard.columns:
                classes[part] = shard.columns["cls"][rows[part]].astype(np.int64)
        return posterior, classes

    def _shard(self, index: int) -> LatentShard:
        """A mapped shard; as many stay mapped as two windows hold."""
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        record = self.manifest.shards[index]
        path = self.cache.fetch(storage.join(self.folder, record.name), record.bytes, record.crc32)
        self._open[index] = LatentShard(path, record.samples, self.manifest.members, self.manifest.stride)
        if len(self._open) > 2 * self.options.window:
            self._open.popitem(last=False)
        return self._open[index]
