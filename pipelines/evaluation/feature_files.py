"""The feature pass: images in blocks -> files of what is measured on them.

A block in is a file out, so every process works by itself, as in `lfm encode`: it takes its part of the blocks and leaves
out those that are done, and whoever finds all of them there goes on. The files lie in a folder named after everything
that decides them, so what is found there is never of something else; memory holds one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from lfm import storage
from lfm.errors import DataError
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.frechet import FeatureSums, Gaussian
from lfm.metrics.reference import subset_rows
from lfm.types import RawSample
from lfm.world import World
from pipelines.common.progress import Progress

Block = dict[str, Tensor]  # one row for each image
T = TypeVar("T")


def compute(
    folder: str, counts: tuple[int, ...], make: Callable[[int], Iterable[Block]], world: World, title: str
) -> bool:
    """Make this rank's part of the blocks that are not there yet; returns whether all of them are there now.

    Args:
        counts: how many images each block holds.
        make: a block's parts, a batch of images each.
    """
    there = storage.sizes(folder)
    mine = range(world.rank, len(counts), world.size)
    before = sum(counts[block] for block in mine if _file(block) in there)
    with Progress(title, sum(counts[b] for b in mine), "images", done=before, quiet=not world.is_main) as bar:
        for block in mine:
            if _file(block) in there:
                continue
            parts: dict[str, list[Tensor]] = {}
            for part in make(block):
                for name, value in part.items():
                    parts.setdefault(name, []).append(value.cpu())
                bar.advance(len(next(iter(part.values()))))
            with storage.writing(storage.join(folder, _file(block)), flush=False) as temporary:
                save_file({name: torch.cat(values).contiguous() for name, values in parts.items()}, temporary)
    there = storage.sizes(folder)
    return all(_file(block) in there for block in range(len(counts)))


def read(folder: str, counts: tuple[int, ...]) -> Iterator[Block]:
    """The blocks in their order, one at a time."""
    for block in range(len(counts)):
        yield load_tensors(storage.read_bytes(storage.join(folder, _file(block))))


def describe(networks: list[FeatureNetwork], images: Tensor) -> Block:
    """What the networks say of images uint8 (B, 3, H, W): `0.pooled`, ... by the network's number.

    Raises:
        DataError: a feature is not finite.
    """
    found = {
        f"{number}.{name}": value
        for number, network in enumerate(networks)
        for name, value in vars(network(images)).items()
        if value is not None
    }
    for name, value in found.items():
        if not value.isfinite().all():
            network = networks[int(name.partition(".")[0])]
            raise DataError(f"network {network.name}: gives features that are not finite; are its weights damaged?")
    return found


def summarise(folder: str, counts: tuple[int, ...], number: int) -> tuple[dict[str, Gaussian], Tensor]:
    """Of one network's features: `pooled` and `spatial` as Gaussians, and the kept rows of `pooled`, float32 (K, D)."""
    sums: dict[str, FeatureSums] = {}
    rows, start, kept = torch.from_numpy(subset_rows(sum(counts))), 0, torch.empty(0)
    for block in read(folder, counts):
        for name in ("pooled", "spatial"):
            if (values := block.get(f"{number}.{name}")) is not None:
                part = FeatureSums.of(values)
                sums[name] = sums[name] + part if name in sums else part
        pooled = block[f"{number}.pooled"]
        if not start:
            kept = pooled.new_empty(len(rows), pooled.shape[1])
        here = (rows >= start) & (rows < start + len(pooled))
        kept[here] = pooled[rows[here] - start]
        start += len(pooled)
    return {name: value.gaussian() for name, value in sums.items()}, kept


def batched(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` things, the last one perhaps shorter."""
    rest = iter(things)
    while batch := list(islice(rest, size)):
        yield batch


def as_batch(samples: list[RawSample]) -> Tensor:
    """The images of samples: uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()


def _file(block: int) -> str:
    return f"{block:06d}.safetensors"
