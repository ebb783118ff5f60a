"""The training input: latent batches gathered from mapped shards by one background thread, in the mixture's order.

A batch is one strided gather per shard of its window. No file is opened and nothing is decoded per sample, so one thread is
enough, and no worker processes have a state to save. The shards of the next window are fetched while the current one is
read. Random numbers are drawn on the device, so that only stored bytes are copied to it. The state of the stream is the number
of samples seen.
"""

from __future__ import annotations

import heapq
import itertools
import time
from bisect import bisect_right
from collections.abc import Generator, Hashable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.data.latent_shards import LatentShard, ScatteredColumn
from lfm.data.random_draws import draw, draw_candidates, draw_noise, kept_tokens
from lfm.data.stream.data_history import num_open_windows, order_of
from lfm.data.stream.mixture import MEMBERS_OF_CONDITION, LatentSource, Mixture
from lfm.data.stream.shard_file import ShardFiles
from lfm.errors import DataError
from lfm.flow.coupling import couple, nearest
from lfm.flow.null_condition import drop_condition
from lfm.prefetch import ReadAhead, prefetch
from lfm.storage.cache import Cache
from lfm.types import Condition, LatentBatch
from lfm.world import World

_PLANNED_BATCHES = 16  # whose rows and random numbers are computed together


class PartialColumn:
    """A member of the samples of a shard that a file holds, indexed by their rows in the shard like an array."""

    def __init__(self, values: np.ndarray | ScatteredColumn, rows: np.ndarray) -> None:
        self.values, self.rows = values, rows  # (num, ...), and ascending int64 (num,)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.values[np.searchsorted(self.rows, rows)]


Column = Tensor | ScatteredColumn | PartialColumn


@dataclass(frozen=True)
class StreamOptions:
    """What determines the batches, besides the data."""

    seed: int = 0
    window: int = 8  # number of shards that are shuffled together
    global_batch: int = 256  # samples per step over all ranks
    conditions: frozenset[str] = frozenset()  # of class, inpaint and semantic
    condition_dropout: float = 0.0  # share of samples that get the null condition
    coupling_group: int = 1  # samples whose noise is assigned by optimal transport; divides every rank's part
    num_noises: int = 1  # noises of each sample, of which the nearest to its data is taken
    num_tokens: int = 0  # tokens of a latent
    num_kept_tokens: int = 0  # number of them that the model's middle blocks see


class LatentStream:
    """The batches of one rank, from any sample of the global order on.

    Args:
        mixture: the data sets to read.
        options: the same on every rank.
        world: this rank, which reads a contiguous slice of every global batch.
        cache: the cache of remote shards.
        device: device of the batches.

    Raises:
        DataError: the shards hold no latents or no member that the condition needs, or a shard to leave out is unknown.
        ConfigError: the cache does not hold two windows of shards of each source, or all shards of a balanced one.
    """

    def __init__(
        self, mixture: Mixture, options: StreamOptions, world: World, cache: Cache, device: torch.device | str = "cpu"
    ) -> None:
        sizes = [source.shard_sizes() for source in mixture.sources]
        manifest = mixture.manifest
        if manifest.autoencoder is None or not all(map(sum, sizes)):
            raise DataError(f"{mixture.name}: holds no latents to train on")
        self.manifest, self.options, self.world, self.cache = manifest, options, world, cache
        self.device = torch.device(device)
        self.order = order_of(mixture, options.seed, options.window)
        self.scale, self.shift = manifest.autoencoder.scale_factor, manifest.autoencoder.shift
        self.members = {member.suffix: member for member in manifest.members}
        self.fields: dict[str, tuple[str, str]] = {}
        for condition in ("none", *sorted(options.conditions)):
            self.fields |= MEMBERS_OF_CONDITION[condition]
        for name, (suffix, _) in self.fields.items():
            if suffix not in self.members:
                raise DataError(
                    f"{mixture.name}: the latents hold no {name}; encode shards that do, or change condition"
                )
        has_flips = [source.flips and "latent_flip.npy" in source.suffixes for source in mixture.sources]
        self.has_flips = torch.tensor(has_flips).repeat_interleave(
            torch.tensor([len(part) for part in sizes])
        )  # by shard
        self._files = [ShardFiles(source) for source in mixture.sources]
        self._copies: dict[int, str] = {}  # names of the cached copies of remote shards, by number
        self._reserve(mixture)
        self.wait_seconds = 0.0
        # Not a method of this object: the cycle would keep a stream's shards open after its last use.
        self._shards = ReadAhead(partial(_open_columns, mixture, self.order.first_shards.tolist(), self._files, cache))
        self._window: tuple[Hashable, ...] | None = None

    def _reserve(self, mixture: Mixture) -> None:
        """Reserve room in the cache for two windows of each remote source, or for all shards if classes are balanced.

        While new samples are mixed with the rest of a pass, both have windows of their own.
        """
        needed, windows = 0, 2 * num_open_windows(mixture.history)
        for source, files, first in zip(mixture.sources, self._files, self.order.first_shards.tolist(), strict=False):
            if not storage.is_local(source.folder):
                num_open = windows * self.options.window if source.balance is None else len(source.manifest.shards)
                copies = {number: (file.copy_name, file.num_bytes) for number, file in enumerate(files, first)}
                needed += sum(heapq.nlargest(num_open, (num_bytes for _, num_bytes in copies.values())))
                self._copies |= {number: name for number, (name, _) in copies.items()}
        if self._copies:
            self.cache.reserve(self, needed)

    def batches(self, samples_seen: int, *, ahead: int = 4) -> Generator[LatentBatch]:
        """Yield batches of this rank from `samples_seen` on, without end; add the time spent waiting to `wait_seconds`."""
        try:
            with closing(prefetch(self._gather_all(samples_seen), ahead)) as ready:
                while True:
                    began = time.perf_counter()
                    stored = next(ready)
                    self.wait_seconds += time.perf_counter() - began
                    yield self._to_batch(stored)
        finally:
            self.close()

    def batch(self, samples_seen: int) -> LatentBatch:
        """Return this rank's part of the global batch that begins at sample `samples_seen`."""
        (plan,) = self._plans(samples_seen, 1)
        return self._to_batch(self._gather(samples_seen, plan))

    def close(self) -> None:
        """Close the open shards; the next batch opens its own."""
        self._window = None
        self._shards.request(())

    def _gather_all(self, samples_seen: int) -> Generator[dict[str, Tensor]]:
        for first in itertools.count(samples_seen, _PLANNED_BATCHES * self.options.global_batch):
            for batch, plan in enumerate(self._plans(first, _PLANNED_BATCHES)):
                yield self._gather(first + batch * self.options.global_batch, plan)

    def _plans(self, samples_seen: int, count: int) -> list[dict[str, Tensor]]:
        """Return for each of `count` batches the rows of shards to gather, and the random numbers of the samples.

        Many batches are planned together, since so many small operations cost as much as gathering a batch.
        """
        batch, part = self.options.global_batch, self.world.slice_of(self.options.global_batch)
        places = self.order.at(samples_seen, count * batch)
        shards, rows = (torch.from_numpy(place).view(count, batch)[:, part] for place in places)
        numbers = torch.arange(samples_seen, samples_seen + count * batch).view(count, batch)[:, part]
        draws = draw(self.options.seed, numbers)
        flip = draws.flip & self.has_flips[shards]
        # The order within a batch is free, since everything is per sample; sorted, each shard is gathered in one call.
        groups, by_group = torch.sort(2 * shards + flip, stable=True)
        drop = draws.drop < self.options.condition_dropout
        small = {"number": numbers, "uniform": draws.uniform, "flip": flip, "dropped": drop}
        plans = {name: self._pinned(value.gather(1, by_group)) for name, value in small.items()}
        plans |= {"group": groups, "row": rows.gather(1, by_group)}
        return [dict(zip(plans, plan, strict=True)) for plan in zip(*plans.values(), strict=True)]

    def _gather(self, samples_seen: int, plan: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of a batch as they are stored, by name, and their random numbers."""
        groups, rows = plan["group"], plan["row"]
        stored = {name: value for name, value in plan.items() if name not in ("group", "row")}
        for name, (suffix, _) in self.fields.items():
            member = self.members[suffix]
            dtype = torch.int64 if suffix == "cls" else torch.from_numpy(np.empty(0, member.dtype)).dtype
            stored[name] = self._empty((len(rows), *member.shape), dtype)
        self._request_shards(samples_seen)
        present, counts = (part.tolist() for part in groups.unique_consecutive(return_counts=True))
        targets = zip(*(stored[name].split(counts) for name in self.fields), strict=True)
        for group, rows_of_shard, outputs in zip(present, rows.split(counts), targets, strict=True):
            columns = self._shards.get(group // 2)
            for suffixes, output in zip(self.fields.values(), outputs, strict=True):
                _copy_rows(columns[suffixes[group % 2]], rows_of_shard, output)
        if "segmentation" in stored and stored["segmentation"].numpy().max(initial=0) >= self.manifest.num_labels:
            raise DataError("a segmentation holds class ids beyond the labels of the manifest; encode the shards again")
        return stored

    def _to_batch(self, stored: dict[str, Tensor]) -> LatentBatch:
        """Return a batch on the device: scaled latents drawn from their posteriors, noise, and conditions."""
        options = self.options
        stored = {name: value.to(self.device, non_blocking=True) for name, value in stored.items()}
        mean, std = stored["latent"].float().chunk(2, dim=1)
        numbers = stored["number"]
        posterior_noise, noise = draw_noise(options.seed, numbers, mean.shape[1:])
        latents = (mean + std * posterior_noise - self.shift) * self.scale
        noise = nearest(latents, noise, draw_candidates(options.seed, numbers, mean.shape[1:], options.num_noises - 1))
        condition = drop_condition(
            Condition(stored.get("class"), self._spatial(stored), self._segmentation(stored)),
            stored["dropped"],
            num_classes=len(self.manifest.classes),
            num_labels=self.manifest.num_labels,
        )
        return LatentBatch(
            sample_numbers=numbers,
            latents=latents,
            noise=couple(latents, noise, numbers, options.coupling_group),
            uniform=stored["uniform"],
            condition=condition,
            kept_tokens=kept_tokens(options.seed, numbers, options.num_tokens, options.num_kept_tokens),
        )

    def _spatial(self, stored: dict[str, Tensor]) -> Tensor | None:
        """Return the condition of inpainting, float32 (B, C + 1, h, w): the masked image's latent and the mask."""
        if "masked" not in stored:
            return None
        masked = (stored["masked"].float() - self.shift) * self.scale
        return torch.cat([masked, _mirrored(stored["mask"], stored["flip"]).float()[:, None]], dim=1)

    def _segmentation(self, stored: dict[str, Tensor]) -> Tensor | None:
        """Return class ids, int64 (B, H, W)."""
        return _mirrored(stored["segmentation"].long(), stored["flip"]) if "segmentation" in stored else None

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory to gather into; torch reuses pinned memory after it has been copied to the device."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _pinned(self, value: Tensor) -> Tensor:
        return value.pin_memory() if self.device.type == "cuda" else value

    def _request_shards(self, position: int) -> None:
        """At the start of a window, request its shards and those of the next one, and close all others."""
        window = self.order.window_at(position)
        if window != self._window:
            self._window = window
            if self._copies:
                upcoming = self.order.upcoming_shards(position)
                self.cache.announce(self, [self._copies[index] for index in upcoming if index in self._copies])
            self._shards.request(self.order.upcoming_shards(position, 2))


def _open_columns(
    mixture: Mixture, first_shards: list[int], files: list[ShardFiles], cache: Cache, number: int
) -> dict[str, Column]:
    """Open a shard; it stays mapped, and its copy in the cache, as long as one of its columns is in use."""
    index = bisect_right(first_shards, number) - 1
    source = mixture.sources[index]
    shard, rows = files[index][number - first_shards[index]].open(cache)
    columns = {suffix: column for suffix, column in shard.columns.items() if suffix != "cls"}
    columns["cls"] = _classes(mixture, source, shard)
    if rows is not None:
        return {suffix: PartialColumn(column, rows) for suffix, column in columns.items()}
    return {
        suffix: column if isinstance(column, ScatteredColumn) else torch.from_numpy(column)
        for suffix, column in columns.items()
    }


def _classes(mixture: Mixture, source: LatentSource, shard: LatentShard) -> np.ndarray:
    """Return the mixture's class of each sample of a shard, int64."""
    classes = shard.class_indices
    if classes is None or source.class_map == ():
        return np.full(shard.samples, len(mixture.manifest.classes))  # the null class
    num_classes = len(source.manifest.classes)
    if len(classes) and not 0 <= classes.min() <= classes.max() < max(1, num_classes):
        raise DataError(f"{shard.name}: holds classes beyond the {num_classes} of the manifest; make it again")
    return classes if source.class_map is None else np.array(source.class_map)[classes]


def _copy_rows(column: Column, rows: Tensor, output: Tensor) -> None:
    if isinstance(column, Tensor):
        torch.index_select(column, 0, rows, out=output)
    else:
        output.copy_(torch.from_numpy(column[rows.numpy()]))


def _mirrored(maps: Tensor, flip: Tensor) -> Tensor:
    """Return maps (B, h, w), mirrored left to right in the rows where `flip`, bool (B,), is true."""
    return torch.where(flip[:, None, None], maps.flip(-1), maps)
