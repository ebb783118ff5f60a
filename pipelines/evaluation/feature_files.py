"""Per-image results in files, one file per block of images.

Every process computes its share of the blocks and skips those whose files exist, so that an interrupted evaluation resumes.
The process that finds all files complete continues with the metrics. The name of the folder is a digest of everything that
determines the contents. Memory holds one block at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lfm import storage, tensor_file
from lfm.errors import DataError
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.frechet import FeatureSums, Gaussian
from lfm.metrics.reference import subset_rows
from lfm.types import RawSample
from lfm.world import World
from pipelines.common.progress import Progress

logger = logging.getLogger(__name__)

Block = dict[str, Tensor]  # results by name, one row for each image
T = TypeVar("T")


@dataclass(frozen=True)
class FeatureFiles:
    """The files of one set of images.

    Columns of the features of network number n are called `n.pooled`, `n.spatial` and `n.probabilities`.
    """

    folder: str
    counts: tuple[int, ...]  # number of images in each block

    @property
    def total(self) -> int:
        """Number of images in all blocks."""
        return sum(self.counts)

    def compute(self, measure: Callable[[int], Iterable[Block]], world: World, title: str) -> bool:
        """Write this rank's share of the missing or damaged files, and return whether all files exist afterwards.

        Args:
            measure: returns the results of a block by its number, batch by batch.
            world: the ranks that share the blocks.
            title: title of the progress bar.
        """
        existing = storage.sizes(self.folder)
        mine = range(world.rank, len(self.counts), world.size)
        missing = [block for block in mine if _name(block) not in existing or self._is_damaged(block)]
        total, remaining = (sum(self.counts[block] for block in blocks) for blocks in (mine, missing))
        with Progress(title, total, "images", done=total - remaining, quiet=not world.is_main) as progress:
            for block in missing:
                result = concatenate(measure(block), progress)
                tensor_file.save(storage.join(self.folder, _name(block)), result, {})
        existing = storage.sizes(self.folder)
        return all(_name(block) in existing for block in range(len(self.counts)))

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in order."""
        for block in range(len(self.counts)):
            yield self.load(block)

    def load(self, block: int) -> Block:
        """Return the results of one block.

        Raises:
            DataError, StorageError: If its file is damaged or does not exist.
        """
        path = storage.join(self.folder, _name(block))
        tensors, header = tensor_file.load(path)
        lengths = {len(tensor) for name, tensor in tensors.items() if name.endswith(".pooled")}
        if header is None or lengths != {self.counts[block]}:
            raise DataError(
                f"{path}: not a block of {self.counts[block]} images; run the same command to make it again"
            )
        return tensors

    def _is_damaged(self, block: int) -> bool:
        try:
            self.load(block)
        except DataError as error:
            logger.warning("%s; making it again", error)
            return True
        return False

    def column(self, name: str) -> Tensor:
        """Return one result of all images, (N, ...)."""
        return torch.cat([block[name] for block in self.blocks()])

    def statistics(self, network: int) -> tuple[dict[str, Gaussian], Tensor]:
        """Return statistics of the features of one network.

        Returns:
            Gaussians `pooled` and, if the network computes spatial features, `spatial`; and the pooled features of the
            images `subset_rows`, float32 (K, D).
        """
        sums: dict[str, FeatureSums] = {}
        rows, first, subset = torch.from_numpy(subset_rows(self.total)), 0, []
        for block in self.blocks():
            for name in ("pooled", "spatial"):
                if (values := block.get(f"{network}.{name}")) is not None:
                    block_sums = FeatureSums.of(values)
                    sums[name] = sums[name] + block_sums if name in sums else block_sums
            pooled = block[f"{network}.pooled"]
            subset.append(pooled[rows[(rows >= first) & (rows < first + len(pooled))] - first])
            first += len(pooled)
        return {name: value.gaussian() for name, value in sums.items()}, torch.cat(subset)


def concatenate(batches: Iterable[Block], progress: Progress) -> Block:
    """Return the results of all batches as one block on the CPU, and advance `progress` by their images."""
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, value in batch.items():
            columns.setdefault(name, []).append(value.cpu())
        progress.advance(len(next(iter(batch.values()))))
    return {name: torch.cat(values).contiguous() for name, values in columns.items()}


def _name(block: int) -> str:
    return f"{block:06d}.safetensors"


def describe(networks: list[FeatureNetwork], images: Tensor) -> Block:
    """Return the features of images uint8 (B, 3, H, W), with the column names of `FeatureFiles`.

    Raises:
        DataError: If a feature is not finite.
    """
    result: Block = {}
    for number, network in enumerate(networks):
        features = network(images)
        values = {"pooled": features.pooled, "spatial": features.spatial, "probabilities": features.probabilities}
        for name, value in values.items():
            if value is None:
                continue
            if not value.isfinite().all():
                raise DataError(f"network {network.name}: computes features that are not finite; check its weights")
            result[f"{number}.{name}"] = value
    return result


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def stack_images(samples: list[RawSample]) -> Tensor:
    """Return the images of samples, uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()
