"""Candidates: sets of images to evaluate, in blocks that any process can produce independently."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lfm.autoencoder import content_hash
from lfm.data.evaluation_images import FolderImages, ImageSet, blocks_of
from lfm.errors import ConfigError, DataError
from lfm.inference import trained_model
from lfm.inference.condition_inputs import Conditions, encode_conditions
from lfm.inference.trained_model import TrainedModel
from lfm.solvers import Solving
from lfm.types import RawSample
from pipelines.evaluation.evaluation_options import EvaluateConfig
from pipelines.evaluation.feature_files import batched, stack_images

DEFAULT_NUM = 50_000


@dataclass(frozen=True)
class CandidateBatch:
    """Some images of a candidate; None for what the candidate does not provide."""

    images: Tensor  # uint8 (B, 3, H, W)
    real: Tensor | None = None  # uint8 (B, 3, H, W): the ground truth of each image
    segmentation: Tensor | None = None  # int64 (B, H, W): the segmentation map of the ground truth
    nfe: Tensor | None = None  # int64 (B,)
    latents: Tensor | None = None  # float32 (B, C, h, w), scaled, of which the images were decoded
    seconds: float = 0.0  # time to generate the batch


class Candidate(Protocol):
    """A set of images to evaluate."""

    name: str
    image_size: int
    crop: str | None  # resize and crop rule of the images; None where it is unknown
    counts: tuple[int, ...]  # number of images in each block
    provides: tuple[str, ...]  # what each batch has besides images: pairs, segmentations, nfe
    settings: dict[str, Any]  # for the report: everything that determines the images
    identity: Any  # JSON value; equal identities mean equal images

    def batches(self, block: int) -> Iterator[CandidateBatch]:
        """Yield the images of a block."""


class StoredImages:
    """The images of a folder or of raw shards."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size
        self.name, self.image_size, self.crop = images.name, images.image_size, images.rule
        self.counts = images.blocks
        self.provides: tuple[str, ...] = ()
        self.identity: Any = images.digest
        self.settings: dict[str, Any] = {
            "pictures": images.name,
            "data_digest": images.digest,
            "stored": images.stored,
        }

    def batches(self, block: int) -> Iterator[CandidateBatch]:
        for samples in batched(self.images.read(block), self.batch_size):
            yield CandidateBatch(stack_images(samples))


class PairedImages(StoredImages):
    """The images of a folder, each with the ground-truth image of the same key, in the order of the ground truth.

    Raises:
        DataError: If sizes or numbers of images differ; while reading, if a key has no image.
    """

    def __init__(self, images: FolderImages, real: ImageSet, batch_size: int) -> None:
        super().__init__(images, batch_size)
        if real.image_size != images.image_size:
            raise DataError(f"{real.name}: images of size {real.image_size}, {images.name} has {images.image_size}")
        self.folder, self.real, self.counts = images, real, real.blocks
        self.provides = ("pairs", "segmentations") if "segmentation" in real.fields else ("pairs",)
        if len(images.by_key) != sum(real.blocks):
            raise DataError(
                f"{images.name}: {len(images.by_key):,} images, {real.name} has {sum(real.blocks):,}; the folder must "
                "hold exactly one image for each of them"
            )
        self.identity = [images.digest, real.digest]
        self.settings |= {"pairs": real.name, "pairs_digest": real.digest}

    def batches(self, block: int) -> Iterator[CandidateBatch]:
        for samples in batched(self.real.read(block), self.batch_size):
            missing = [sample.key for sample in samples if sample.key not in self.folder.by_key]
            if missing:
                raise DataError(f"{self.name}: no image of the key {missing[0]}, which {self.real.name} has")
            images = [self.folder.image(self.folder.by_key[sample.key]) for sample in samples]
            yield CandidateBatch(stack_images(images), stack_images(samples), _stack_segmentations(samples))


class ModelLoader:
    """Loads trained models and holds the last one: it is released before another one is loaded.

    Candidates ask for their model whenever they generate images, so that a curve over many checkpoints needs the memory of
    one network and one autoencoder.
    """

    def __init__(self, autoencoder: str | None, device: torch.device, precision: str | None) -> None:
        self.autoencoder, self.device, self.precision = autoencoder, device, precision
        self._name: str | None = None
        self._model: TrainedModel | None = None

    def load(self, name: str) -> TrainedModel:
        """Return the model of a run folder, checkpoint or weights file."""
        if self._model is None or self._name != name:
            self._model = None
            self._model = trained_model.load(
                name, autoencoder=self.autoencoder, device=self.device, precision=self.precision
            )
            self._name = name
        return self._model


class GeneratedImages:
    """Images generated by the model of a run.

    Without ground truth, `num` seeds from `first_seed` on, unconditionally or with all classes in turn. With it, one image
    for each ground-truth image, under its mask, segmentation map or class.

    Args:
        name: Run folder, checkpoint or weights file.
        guidance_scale: Scale of classifier-free guidance.
        config: Options of the evaluation.
        real: Ground truth with the masks or segmentation maps that the model takes.
        models: Loads the model, once to check these arguments and then for each batch.
        weak: The weaker model of `config.autoguidance`, if any.

    Raises:
        ConfigError, CheckpointError, DataError: If the model cannot be loaded, or cannot be sampled this way.
    """

    def __init__(
        self,
        name: str,
        guidance_scale: float,
        config: EvaluateConfig,
        real: ImageSet | None,
        models: ModelLoader,
        weak: TrainedModel | None = None,
    ) -> None:
        model = models.load(name)
        header = model.header
        self.models, self.name, self.image_size, self.crop = models, name, header.image_size, header.crop
        self.header = header
        self.real, self.batch_size, self.first_seed = real, config.batch_size, config.first_seed or 0
        self.solving = Solving(config.solver or "heun", config.num_steps, atol=config.atol, rtol=config.rtol)
        self.guidance = model.guidance(guidance_scale, autoguidance=weak)
        self.provides: tuple[str, ...] = ("nfe",)
        if real is None:
            if header.model.condition_channels or header.model.num_labels:
                raise ConfigError(
                    f"{model.name}: fills holes or draws segmentations; name raw shards that have these with `pairs`"
                )
            self.conditions = encode_conditions(header, model.autoencoder)
            model.velocity(self.conditions.condition([0]).to(model.device), 1, self.guidance)  # checks the guidance
            self.counts = blocks_of(config.num or DEFAULT_NUM)
        else:
            if not model.header.model.condition_channels and not model.header.model.num_labels:
                raise ConfigError(f"`pairs` {real.name}: {model.name} takes neither masks nor segmentation maps")
            check_conditions(model, real, "pairs")
            self.counts = real.blocks
            self.provides += ("pairs", "segmentations") if "segmentation" in real.fields else ("pairs",)
        self.settings: dict[str, Any] = {
            "run": name,
            "samples_seen": header.samples_seen,
            "weights_hash": content_hash(model.network, 1.0, 0.0),
            "latents_digest": header.manifest_digest,
            "rule": self.crop,
            "autoencoder": header.autoencoder.model_dump(),
            "trained_by": header.code_version,
            "first_seed": self.first_seed,
            "guidance_scale": guidance_scale,
            "solving": str(self.solving),
            "precision": model.precision,
            "pairs": real and real.name,
            "pairs_digest": real and real.digest,
        }
        names = ("weights_hash", "first_seed", "guidance_scale", "solving", "precision", "pairs_digest")
        self.identity: Any = [self.settings[key] for key in names]
        self.identity += [asdict(self.solving), header.autoencoder.content_hash]
        if weak is not None:
            self.settings["autoguidance"] = {"run": weak.name, "weights_hash": content_hash(weak.network, 1.0, 0.0)}
            self.identity.append(self.settings["autoguidance"]["weights_hash"])

    def batches(self, block: int) -> Iterator[CandidateBatch]:
        model, first = self.models.load(self.name), sum(self.counts[:block])
        if self.real is None:
            for numbers in batched(range(first, first + self.counts[block]), self.batch_size):
                yield self._generate(model, numbers, self.conditions, numbers)
            return
        for samples in batched(self.real.read(block), self.batch_size):
            rows = range(len(samples))
            numbers = [first + row for row in rows]
            batch = self._generate(model, numbers, conditions_of_samples(model, samples), rows)
            yield replace(batch, real=stack_images(samples), segmentation=_stack_segmentations(samples))
            first += len(samples)

    def _generate(
        self, model: TrainedModel, numbers: Sequence[int], conditions: Conditions, rows: Sequence[int]
    ) -> CandidateBatch:
        """Generate the images of some numbers, counted from the first seed, each under its row of `conditions`."""
        start = time.perf_counter()
        seeds = [self.first_seed + number for number in numbers]
        condition, batch_size = conditions.condition(rows), self.batch_size
        result = model.solve(seeds, condition, self.solving, self.guidance, batch_size=batch_size)
        images = model.decode(result.latents, batch_size)
        if conditions.masks is not None:
            images = conditions.composite(rows, images)
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        seconds = time.perf_counter() - start
        return CandidateBatch(tensor, nfe=result.nfe, latents=result.latents.cpu(), seconds=seconds)


def check_conditions(model: TrainedModel, images: ImageSet, option: str) -> None:
    """Check that images have the size of a model's, and the masks or segmentation maps that it takes.

    Raises:
        ConfigError: If not; names the option that the images come from.
    """
    config, size = model.header.model, model.header.image_size
    fields = ["mask"] if config.condition_channels else []
    fields += ["segmentation"] if config.num_labels else []
    if images.image_size != size:
        raise ConfigError(
            f"`{option}` {images.name}: has images of {images.image_size} pixels, those of {model.name} have {size}"
        )
    if not set(fields) <= set(images.fields):
        raise ConfigError(
            f"`{option}` {images.name}: {model.name} takes {' and '.join(fields)}; name raw shards that hold them"
        )


def conditions_of_samples(model: TrainedModel, samples: list[RawSample]) -> Conditions:
    """Return the conditions that a model takes from raw samples, one row for each sample.

    Raises:
        DataError: If a sample lacks one of them.
    """

    def stack(field: str, is_taken: bool) -> np.ndarray | None:
        if not is_taken:
            return None
        for sample in samples:
            if getattr(sample, field) is None:
                raise DataError(f"{sample.key}: has no {field}, which {model.name} takes as a condition")
        return np.stack([getattr(sample, field) for sample in samples])

    config = model.header.model
    has_masks = config.condition_channels > 0
    classes = stack("class_index", config.num_classes is not None)
    return encode_conditions(
        model.header,
        model.autoencoder,
        class_index=None if classes is None else classes.tolist(),
        images=stack("image", has_masks),
        masks=stack("mask", has_masks),
        segmentations=stack("segmentation", config.num_labels is not None),
        names=[sample.key for sample in samples],
    )


def _stack_segmentations(samples: list[RawSample]) -> Tensor | None:
    """Return the segmentation maps of samples, int64 (B, H, W); None if a sample has none."""
    maps = [sample.segmentation for sample in samples if sample.segmentation is not None]
    return torch.from_numpy(np.stack(maps).astype(np.int64)) if len(maps) == len(samples) else None
