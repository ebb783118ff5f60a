"""The training stream: latents gathered from mapped shards by one background thread, in the order of `Order`.

A batch is one strided gather per shard of its window: no file is opened and nothing is decoded per sample, so one thread
is enough, and there are no worker processes whose state would have to be saved. The next window's shards are fetched while
this one's are read. What is random is drawn on the device: only what is stored has to travel there, as it is stored.
State is the number of samples seen.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.data.latent_shards import LatentShard, Scattered
from lfm.data.manifest import Manifest
from lfm.data.random_draws import draw, draw_noise, kept_tokens
from lfm.data.stream.ahead import Ahead
from lfm.data.stream.sample_order import Order
from lfm.errors import ConfigError, DataError
from lfm.flow.coupling import couple
from lfm.flow.null_condition import drop_condition
from lfm.prefetch import prefetch
from lfm.storage.cache import Cache
from lfm.types import Condition, LatentBatch
from lfm.world import World

_PLANNED = 16  # batches whose draws are made together

# What each condition needs of a sample: the member that holds it, and that of the mirrored image.
_FIELDS = {
    "none": {"latent": ("latent.npy", "latent_flip.npy")},
    "class": {"class": ("cls", "cls")},
    "inpaint": {"masked": ("masked.npy", "masked_flip.npy"), "mask": ("mask.npy", "mask.npy")},
    "semantic": {"segmentation": ("seg.npy", "seg.npy")},
}


@dataclass(frozen=True)
class StreamOptions:
    """What decides the stream beside its data."""

    seed: int = 0
    window: int = 8  # shards shuffled together
    global_batch: int = 256  # samples per step over all ranks
    conditions: frozenset[str] = frozenset()  # of class, inpaint and semantic
    condition_dropout: float = 0.0  # share of samples whose condition is the null
    skip_shards: tuple[str, ...] = ()  # names of shards that are left out
    coupling_group: int = 1  # samples among which noise is dealt out by optimal transport; divides every rank's part
    num_tokens: int = 0  # of a latent, and
    num_kept_tokens: int = 0  # how many of them the model's middle blocks see


class LatentStream:
    """The batches of one rank, from any sample of the global order on.

    Args:
        folder: of the latent shards, a path or URL.
        manifest: theirs.
        options: the same on every rank.
        world: this rank's place; its part of every global batch is a contiguous slice.
        cache: where remote shards are kept.
        device: where the batches are wanted.

    Raises:
        DataError: there are no latents, no shard of a name that is to be left out, or not what the condition needs.
        ConfigError: the cache does not hold two windows of shards.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        options: StreamOptions,
        world: World,
        cache: Cache,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = shard_sizes(manifest, options.skip_shards, folder)
        if manifest.autoencoder is None or not sum(sizes):
            raise DataError(f"{folder}: holds no latents to train on")
        self.folder, self.manifest, self.options, self.world, self.cache = folder, manifest, options, world, cache
        self.device = torch.device(device)
        self.order = Order(sizes, options.seed, options.window)
        self.scale, self.shift = manifest.autoencoder.scale_factor, manifest.autoencoder.shift
        self.members = {member.suffix: member for member in manifest.members}
        self.has_flips = "latent_flip.npy" in self.members
        self.fields = {
            name: pair for need in ("none", *sorted(options.conditions)) for name, pair in _FIELDS[need].items()
        }
        for name, (suffix, _) in self.fields.items():
            if suffix not in self.members:
                raise DataError(f"{folder}: the latents hold no {name}; encode shards that do, or change condition")
        needed = sum(heapq.nlargest(2 * options.window, (shard.bytes for shard in manifest.shards)))
        if not storage.is_local(folder) and needed > cache.limit:
            raise ConfigError(
                f"{folder}: two windows of {options.window} shards take {needed:,} bytes, the cache may hold "
                f"{cache.limit:,.0f}; raise its limit or lower window"
            )
        self.wait_seconds = 0.0
        self._ahead = Ahead(self._open)
        self._window: tuple[int, int] | None = None
        self._uses = np.zeros(0, np.int64)
        self._index = {shard.name: index for index, shard in enumerate(manifest.shards)}

    def batches(self, samples_seen: int, *, ahead: int = 4) -> Generator[LatentBatch]:
        """Endless batches of this rank from `samples_seen` on; time spent waiting adds up in `wait_seconds`."""

        try:
            with closing(prefetch(self._gathered(samples_seen), ahead)) as ready:
                while True:
                    began = time.perf_counter()
                    found = next(ready)
                    self.wait_seconds += time.perf_counter() - began
                    yield self._finish(found)
        finally:
            self._window = None
            self._ahead.want(())

    def batch(self, samples_seen: int) -> LatentBatch:
        """This rank's part of the global batch that begins at sample `samples_seen`."""
        (plan,) = self._plans(samples_seen, 1)
        return self._finish(self._gather(samples_seen, plan))

    def _gathered(self, samples_seen: int) -> Generator[dict[str, Tensor]]:
        for first in itertools.count(samples_seen, _PLANNED * self.options.global_batch):
            for batch, plan in enumerate(self._plans(first, _PLANNED)):
                yield self._gather(first + batch * self.options.global_batch, plan)

    def _plans(self, samples_seen: int, count: int) -> list[dict[str, Tensor]]:
        """Which rows of which shards make up each of `count` batches, and what is drawn for them.

        For many at once, since so many small operations cost as much as a batch's bytes.
        """
        batch, part = self.options.global_batch, self.world.slice_of(self.options.global_batch)
        places = self.order.at(samples_seen, count * batch)
        shards, rows = (torch.from_numpy(place).view(count, batch)[:, part] for place in places)
        numbers = torch.arange(samples_seen, samples_seen + count * batch).view(count, batch)[:, part]
        draws = draw(self.options.seed, numbers)
        flip = draws.flip & self.has_flips
        # The order within a batch is free, since everything is per sample: by shard, each is gathered in one go.
        groups, by_group = torch.sort(2 * shards + flip, stable=True)
        drop = draws.drop < self.options.condition_dropout
        small = {"number": numbers, "uniform": draws.uniform, "flip": flip, "dropped": drop}
        plans = {name: self._pinned(value.gather(1, by_group)) for name, value in small.items()}
        plans |= {"group": groups, "row": rows.gather(1, by_group)}
        return [dict(zip(plans, plan, strict=True)) for plan in zip(*plans.values(), strict=True)]

    def _gather(self, samples_seen: int, plan: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of a batch as they are stored, by field, and what was drawn for them."""
        groups, rows, found = plan["group"], plan["row"], {name: plan[name] for name in plan.keys() - {"group", "row"}}
        for name, (suffix, _) in self.fields.items():
            member = self.members[suffix]
            dtype = torch.int64 if suffix == "cls" else torch.from_numpy(np.empty(0, member.dtype)).dtype
            found[name] = self._empty((len(rows), *member.shape), dtype)
        self._look_ahead(samples_seen)
        present, counts = (part.tolist() for part in groups.unique_consecutive(return_counts=True))
        targets = zip(*(found[name].split(counts) for name in self.fields), strict=True)
        for group, taken, parts in zip(present, rows.split(counts), targets, strict=True):
            columns = self._ahead.take(group // 2)
            for pair, out in zip(self.fields.values(), parts, strict=True):
                _take(columns[pair[group % 2]], taken, out)
        return found

    def _finish(self, found: dict[str, Tensor]) -> LatentBatch:
        """A batch on the device: latents drawn from their posteriors and scaled, noise, and conditions."""
        options = self.options
        found = {name: value.to(self.device, non_blocking=True) for name, value in found.items()}
        mean, std = found["latent"].float().chunk(2, dim=1)
        numbers = found["number"]
        posterior_noise, noise = draw_noise(options.seed, numbers, mean.shape[1:])
        latents = (mean + std * posterior_noise - self.shift) * self.scale
        condition = drop_condition(
            Condition(found.get("class"), self._spatial(found), self._segmentation(found)),
            found["dropped"],
            num_classes=len(self.manifest.classes),
            num_labels=self.manifest.num_labels,
        )
        return LatentBatch(
            sample_numbers=numbers,
            latents=latents,
            noise=couple(latents, noise, numbers, options.coupling_group),
            uniform=found["uniform"],
            condition=condition,
            kept_tokens=kept_tokens(options.seed, numbers, options.num_tokens, options.num_kept_tokens),
        )

    def _spatial(self, found: dict[str, Tensor]) -> Tensor | None:
        """The condition of inpainting, float32 (B, C + 1, h, w)."""
        if "masked" not in found:
            return None
        masked = (found["masked"].float() - self.shift) * self.scale
        return torch.cat([masked, _mirrored(found["mask"], found["flip"]).float()[:, None]], dim=1)

    def _segmentation(self, found: dict[str, Tensor]) -> Tensor | None:
        """Labels, int64 (B, H, W)."""
        return _mirrored(found["segmentation"].long(), found["flip"]) if "segmentation" in found else None

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory to gather into; pinned memory is torch's to reuse, once it has been copied to the device."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _pinned(self, value: Tensor) -> Tensor:
        return value.pin_memory() if self.device.type == "cuda" else value

    def _look_ahead(self, position: int) -> None:
        """Where a window begins, want its shards and the next window's, and let the others go."""
        window = self.order.window_at(position)
        if window != self._window:
            self._window, self._uses = window, self.order.next_use(position)
            self._ahead.want(self.order.upcoming_shards(position, 2 * self.options.window))

    def _open(self, index: int) -> dict[str, Tensor | Scattered]:
        """A shard's columns; the shard stays mapped, and its copy in the cache, for as long as one of them lives."""
        record = self.manifest.shards[index]
        path = storage.join(self.folder, record.name)
        with self.cache.open(path, record.bytes, record.crc32, self._next_use) as file:
            shard = LatentShard(file, record.samples, self.manifest.members, self.manifest.stride, name=path)
        columns: dict[str, Tensor | Scattered] = {
            suffix: column if isinstance(column, Scattered) else torch.from_numpy(column)
            for suffix, column in shard.columns.items()
            if suffix != "cls"
        }
        return columns if shard.class_indices is None else columns | {"cls": torch.from_numpy(shard.class_indices)}

    def _next_use(self, copy: str) -> float:
        """How soon a copy in the cache is needed again, among this stream's shards; never, where it is none of them."""
        index = self._index.get(copy.rpartition("-")[2])
        if index is None:
            return math.inf
        record = self.manifest.shards[index]
        known = self.cache.copy_of(storage.join(self.folder, record.name), record.bytes, record.crc32)
        return float(self._uses[index]) if known.name == copy else math.inf


def shard_sizes(manifest: Manifest, skip_shards: tuple[str, ...], folder: str) -> list[int]:
    """Samples of each shard of a manifest, none in those that are to be left out.

    So every other shard keeps its place in the sequence: a run that stopped at a bad shard goes on where it was.

    Raises:
        DataError: there is no shard of that name.
    """
    unknown = sorted(set(skip_shards) - {shard.name for shard in manifest.shards})
    if unknown:
        raise DataError(f"{folder}: no shard {unknown[0]} to leave out; name it as its file")
    return [0 if shard.name in skip_shards else shard.samples for shard in manifest.shards]


def _take(column: Tensor | Scattered, rows: Tensor, out: Tensor) -> None:
    if isinstance(column, Tensor):
        torch.index_select(column, 0, rows, out=out)
    else:
        out.copy_(torch.from_numpy(column[rows.numpy()]))


def _mirrored(maps: Tensor, flip: Tensor) -> Tensor:
    """Maps (B, h, w), from right to left in the rows where `flip`, bool (B,), is true."""
    return torch.where(flip[:, None, None], maps.flip(-1), maps)
