"""What is evaluated: a source of images in blocks, each of which any process can make by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lfm.autoencoder import content_hash
from lfm.data.image_sets import FolderImages, ImageSet, blocks_of
from lfm.errors import ConfigError, DataError
from lfm.flow.guidance import Guidance
from lfm.inference import trained_model
from lfm.inference.condition_inputs import Conditions, encode_conditions
from lfm.solvers import Solving
from lfm.types import RawSample
from lfm.world import World
from pipelines.common import factory
from pipelines.evaluation import feature_files


@dataclass(frozen=True)
class GeneratedBatch:
    """Some images of a target."""

    images: Tensor  # uint8 (B, 3, H, W)
    real: Tensor | None = None  # uint8 (B, 3, H, W): what each stands for
    segmentation: Tensor | None = None  # int64 (B, H, W): what each was to show
    nfe: Tensor | None = None  # int64 (B,)
    seconds: float = 0.0


class Target(Protocol):
    """Images to be judged."""

    name: str
    image_size: int
    rule: str | None
    counts: tuple[int, ...]  # images in each block
    offers: tuple[str, ...]  # pairs, maps, nfe: what `make` gives beside the images
    settings: dict[str, Any]  # for the report: all that decides the images
    identity: Any  # as JSON: equal where the images are

    def make(self, block: int) -> Iterator[GeneratedBatch]:
        """The images of a block, batch by batch."""


class StoredImages:
    """Those of a folder or of raw shards."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.name, self.image_size, self.rule = images.name, images.image_size, images.rule
        self.counts = images.blocks
        self.offers: tuple[str, ...] = ()
        self.identity: Any = images.digest
        self.settings: dict[str, Any] = {"pictures": images.name, "data_digest": images.digest}
        self.settings |= {"stored": images.stored}

    def make(self, block: int) -> Iterator[GeneratedBatch]:
        """As they are."""
        for samples in feature_files.batched(self.images.read(block), self.batch_size):
            yield GeneratedBatch(feature_files.as_batch(samples))


class PairedImages(StoredImages):
    """Those of a folder, each beside the real image of the same key, in the order of the real ones.

    Raises:
        DataError: there are not as many, or keys without an image.
    """

    def __init__(self, images: FolderImages, real: ImageSet, batch_size: int) -> None:
        super().__init__(images, batch_size)
        if real.image_size != images.image_size:
            raise DataError(f"{real.name}: images of size {real.image_size}, {images.name} has {images.image_size}")
        self.folder, self.real, self.counts = images, real, real.blocks
        self.offers = ("pairs", "maps") if "segmentation" in real.fields else ("pairs",)
        if len(images.by_key) != sum(real.blocks):
            raise DataError(
                f"{images.name}: {len(images.by_key):,} images, {real.name} has {sum(real.blocks):,}; every one "
                "needs its pair, and no other file may lie there"
            )
        self.identity = [images.digest, real.digest]
        self.settings |= {"pairs": real.name, "pairs_digest": real.digest}

    def make(self, block: int) -> Iterator[GeneratedBatch]:
        for samples in feature_files.batched(self.real.read(block), self.batch_size):
            missing = [sample.key for sample in samples if sample.key not in self.folder.by_key]
            if missing:
                raise DataError(f"{self.name}: no image of the key {missing[0]}, which {self.real.name} has")
            fakes = [self.folder.image(self.folder.by_key[sample.key]) for sample in samples]
            yield GeneratedBatch(feature_files.as_batch(fakes), feature_files.as_batch(samples), _maps(samples))


class Run:
    """Images of a run: of `num` seeds, without a condition or of all classes in turn; or of what each real one tells.

    Args:
        name: a run folder, checkpoint or weights file.
        num: how many, without `real`.
        first_seed: the seeds count on from it.
        real: images with the masks or maps that the model takes.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be done so; nothing has been made.
    """

    def __init__(
        self,
        name: str,
        num: int,
        first_seed: int,
        solving: Solving,
        guidance_scale: float,
        real: ImageSet | None,
        autoencoder: str | None,
        batch_size: int,
        world: World,
    ) -> None:
        self.model = trained_model.load(name, autoencoder=autoencoder, device=factory.device(world))
        header = self.model.header
        self.name, self.image_size, self.rule, self.real = name, header.image_size, header.crop, real
        self.solving, self.guidance = solving, Guidance(guidance_scale)
        self.offers: tuple[str, ...] = ("nfe",)
        self.first_seed, self.batch_size = first_seed, batch_size
        if real is None:
            self.conditions = encode_conditions(header, self.model.autoencoder)
            self.model.velocity(
                self.conditions.condition([0]).to(self.model.device), 1, self.guidance
            )  # refused here or never
            self.counts = blocks_of(num)
        else:
            self.needs = ["mask"] * bool(header.model.condition_channels) + ["segmentation"] * bool(
                header.model.num_labels
            )
            if not self.needs or not {*self.needs} <= {*real.fields} or real.image_size != header.image_size:
                wanted = " and ".join(self.needs) or "neither masks nor maps"
                raise ConfigError(
                    f"--pairs {real.name}: {name} takes {wanted}, of {header.image_size} pixels; name raw shards of such"
                )
            self.counts, self.offers = real.blocks, ("nfe", "pairs", *["maps"] * ("segmentation" in real.fields))
        self.settings: dict[str, Any] = {
            "run": name,
            "samples_seen": header.samples_seen,
            "weights_hash": content_hash(self.model.network, 1.0, 0.0),
            "latents_digest": header.manifest_digest,
            "rule": self.rule,
            "autoencoder": header.autoencoder.model_dump(),
            "trained_by": header.code_version,
            "first_seed": first_seed,
            "guidance_scale": guidance_scale,
            "solving": str(solving),
            "pairs": real and real.name,
            "pairs_digest": real and real.digest,
        }
        names = ("weights_hash", "first_seed", "guidance_scale", "solving", "pairs_digest")
        self.identity: Any = [self.settings[key] for key in names] + [asdict(solving), header.autoencoder.content_hash]

    def make(self, block: int) -> Iterator[GeneratedBatch]:
        start = sum(self.counts[:block])
        if self.real is None:
            for numbers in feature_files.batched(range(start, start + self.counts[block]), self.batch_size):
                yield self._made(numbers, self.conditions, numbers)
            return
        for samples in feature_files.batched(self.real.read(block), self.batch_size):
            rows = range(len(samples))
            made = self._made([start + row for row in rows], self._conditions(samples), rows)
            yield replace(made, real=feature_files.as_batch(samples), segmentation=_maps(samples))
            start += len(samples)

    def _conditions(self, samples: list[RawSample]) -> Conditions:
        def stacked(field: str) -> np.ndarray:
            return np.stack([getattr(sample, field) for sample in samples])

        images, masks = (stacked(field) if "mask" in self.needs else None for field in ("image", "mask"))
        maps = stacked("segmentation") if "segmentation" in self.needs else None
        classes = stacked("class_index").tolist() if self.model.header.model.num_classes else None
        keys = [sample.key for sample in samples]
        return encode_conditions(self.model.header, self.model.autoencoder, classes, images, masks, maps, keys)

    def _made(self, numbers: Sequence[int], conditions: Conditions, rows: Sequence[int]) -> GeneratedBatch:
        """The images of some numbers, each under its row of the conditions."""
        began = time.perf_counter()
        seeds = [self.first_seed + number for number in numbers]
        result = self.model.solve(seeds, conditions.condition(rows), self.solving, self.guidance)
        images = self.model.decode(result.latents)
        if conditions.masks is not None:
            images = conditions.composite(rows, images)
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return GeneratedBatch(batch, nfe=result.nfe, seconds=time.perf_counter() - began)


def _maps(samples: list[RawSample]) -> Tensor | None:
    """int64 (B, H, W), where every sample has one."""
    maps = [sample.segmentation for sample in samples if sample.segmentation is not None]
    return torch.from_numpy(np.stack(maps).astype(np.int64)) if len(maps) == len(samples) else None
