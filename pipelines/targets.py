"""What is evaluated: a source of pictures in blocks, each of which any process can make by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lfm import solvers
from lfm.autoencoder import content_hash
from lfm.conditioning import class_condition, null_condition
from lfm.data.draws import picture_noise
from lfm.data.picture_sets import FolderPictures, PictureSet, blocks_of
from lfm.errors import DataError
from lfm.guidance import CountedVelocity, Guided, NetworkVelocity
from lfm.types import Condition
from lfm.world import World
from pipelines import factory, features


@dataclass(frozen=True)
class Made:
    """Some pictures of a target."""

    images: Tensor  # uint8 (B, 3, H, W)
    real: Tensor | None = None  # uint8 (B, 3, H, W): what each stands for
    segmentation: Tensor | None = None  # int64 (B, H, W): what each was to show
    nfe: Tensor | None = None  # int64 (B,)
    seconds: float = 0.0


class Target(Protocol):
    """Pictures to be judged."""

    name: str
    image_size: int
    rule: str | None
    counts: tuple[int, ...]  # pictures in each block
    offers: tuple[str, ...]  # pairs, maps, nfe: what `make` gives beside the pictures
    settings: dict[str, Any]  # for the report: all that decides the pictures
    identity: Any  # as JSON: equal where the pictures are

    def make(self, block: int) -> Iterator[Made]:
        """The pictures of a block, batch by batch."""


class Pictures:
    """Those of a folder or of raw shards."""

    def __init__(self, pictures: PictureSet, batch_size: int) -> None:
        self.pictures, self.batch_size = pictures, batch_size
        self.name, self.image_size, self.rule = pictures.name, pictures.image_size, pictures.rule
        self.counts, self.offers = pictures.blocks, tuple[str, ...]()
        self.identity: Any = pictures.digest
        self.settings: dict[str, Any] = {"pictures": pictures.name, "data_digest": pictures.digest}
        self.settings |= {"stored": pictures.stored}

    def make(self, block: int) -> Iterator[Made]:
        """As they are."""
        for samples in features.batched(self.pictures.read(block), self.batch_size):
            yield Made(features.as_batch(samples))


class PairedPictures(Pictures):
    """Those of a folder, each beside the real picture of the same key, in the order of the real ones.

    Raises:
        DataError: there are not as many, or keys without a picture.
    """

    def __init__(self, pictures: FolderPictures, real: PictureSet, batch_size: int) -> None:
        super().__init__(pictures, batch_size)
        if real.image_size != pictures.image_size:
            raise DataError(
                f"{real.name}: pictures of size {real.image_size}, {pictures.name} has {pictures.image_size}"
            )
        self.folder, self.real, self.counts = pictures, real, real.blocks
        self.offers = ("pairs", "maps") if "segmentation" in real.fields else ("pairs",)
        if len(pictures.by_key) != sum(real.blocks):
            raise DataError(
                f"{pictures.name}: {len(pictures.by_key):,} pictures, {real.name} has {sum(real.blocks):,}; every one "
                "needs its pair, and no other file may lie there"
            )
        self.identity = [pictures.digest, real.digest]
        self.settings |= {"pairs": real.name, "pairs_digest": real.digest}

    def make(self, block: int) -> Iterator[Made]:
        for samples in features.batched(self.real.read(block), self.batch_size):
            missing = [sample.key for sample in samples if sample.key not in self.folder.by_key]
            if missing:
                raise DataError(f"{self.name}: no picture of the key {missing[0]}, which {self.real.name} has")
            fakes = [self.folder.picture(self.folder.by_key[sample.key]) for sample in samples]
            maps = [sample.segmentation for sample in samples if sample.segmentation is not None]
            segmentation = torch.from_numpy(np.stack(maps).astype(np.int64)) if maps else None
            yield Made(features.as_batch(fakes), features.as_batch(samples), segmentation)


@dataclass(frozen=True)
class Sampling:
    """How pictures of a run are made."""

    num: int
    first_seed: int
    guidance_scale: float
    solver: str
    num_steps: int | None
    atol: float | None
    rtol: float | None


class Run:
    """`num` pictures of a run, without a condition or of all classes in turn: those of the seeds from the first on."""

    def __init__(self, name: str, sampling: Sampling, autoencoder: str | None, batch_size: int, world: World) -> None:
        self.name, self.sampling, self.batch_size = name, sampling, batch_size
        solvers.check_options(sampling.solver, num_steps=sampling.num_steps, atol=sampling.atol, rtol=sampling.rtol)
        self.model, self.header, self.autoencoder = factory.trained(name, autoencoder, world)
        if sampling.guidance_scale != 1:
            self._null(self._condition([0]))
        self.image_size, self.counts = self.header.image_size, blocks_of(sampling.num)
        self.rule = self.header.crop
        self.offers: tuple[str, ...] = ("nfe",)
        self.settings: dict[str, Any] = {
            "run": name,
            "samples_seen": self.header.samples_seen,
            "weights_hash": content_hash(self.model, 1.0, 0.0),
            "latents_digest": self.header.manifest_digest,
            "rule": self.rule,
            "autoencoder": self.header.autoencoder.model_dump(),
            "trained_by": self.header.code_version,
            **asdict(sampling),
        }
        free = ("run", "trained_by", "autoencoder")
        self.identity: Any = {key: value for key, value in self.settings.items() if key not in free}
        self.identity["autoencoder"] = self.autoencoder.content_hash

    def make(self, block: int) -> Iterator[Made]:
        start = sum(self.counts[:block])
        for numbers in features.batched(range(start, start + self.counts[block]), self.batch_size):
            began = time.perf_counter()
            images, nfe = self._pictures(numbers)
            yield Made(images, nfe=nfe, seconds=time.perf_counter() - began)

    def _pictures(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        sampling, model = self.sampling, self.header.model
        shape = (model.latent_channels, *[model.latent_size] * 2)
        device = self.model.position.device
        noise = torch.from_numpy(picture_noise([sampling.first_seed + number for number in numbers], shape)).to(device)
        velocity = self._velocity(self._condition(numbers).to(device), len(numbers))
        latents = solvers.solve(
            sampling.solver, velocity, noise, num_steps=sampling.num_steps, atol=sampling.atol, rtol=sampling.rtol
        )
        return self.autoencoder.decode(latents).cpu(), velocity.nfe.cpu()

    def _velocity(self, condition: Condition, count: int) -> CountedVelocity:
        conditional = NetworkVelocity(self.model, condition, count)
        if self.sampling.guidance_scale == 1:
            return conditional
        unconditional = NetworkVelocity(self.model, self._null(condition), count)
        return Guided(conditional, unconditional, self.sampling.guidance_scale)

    def _condition(self, numbers: list[int]) -> Condition:
        """The classes of these pictures: all of them take turns."""
        num_classes = self.header.model.num_classes
        return class_condition([n % num_classes for n in numbers], num_classes) if num_classes else Condition()

    def _null(self, condition: Condition) -> Condition:
        model = self.header.model
        return null_condition(condition, model.class_dropout, num_classes=model.num_classes)
