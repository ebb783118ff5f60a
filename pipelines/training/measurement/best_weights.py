"""The best weights of a training: the EMA weights whose images have the smallest Frechet distance to a reference.

The score of a task is measured on the same images; without a reference it is measured alone, and no weights are saved.

Every so many steps the EMA weights generate the same images, from the same seeds and under the conditions of the first
training samples; each rank generates its part. The distances of one run are comparable with each other. With few images
they are larger than with many, and inpainted images are compared as the model generates them.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm import storage, weights_file
from lfm.data.manifest import Manifest
from lfm.data.stream.mixture import Mixture
from lfm.errors import ConfigError, DataError
from lfm.flow.guidance import Guidance
from lfm.metrics.frechet import FeatureSums, frechet_distance
from lfm.types import Condition
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment.config_schema import EvaluationConfig, ExperimentConfig
from pipelines.common.reference_features import ReferenceSet
from pipelines.training.measurement.ema_sampler import NUM_STEPS, EmaSampler
from pipelines.training.measurement.task_scores import RECOGNISED, TASK_SCORES

logger = logging.getLogger(__name__)

BEST, RECORD = "best.safetensors", "best.json"


def load_reference_set(config: ExperimentConfig, manifest: Manifest, world: World) -> ReferenceSet | None:
    """Load the reference of an experiment and its feature network; None if it measures no distance.

    Raises:
        ConfigError: the reference is of another image size or crop rule than the latents, or its network is missing.
        DataError: the file is not a reference.
    """
    evaluation = config.evaluation
    assert evaluation, "the experiment is evaluated during training"
    if evaluation.guidance_scale != 1 and not (config.condition_dropout or evaluation.autoguidance):
        raise ConfigError(
            "evaluation.guidance_scale: guidance needs a condition and condition_dropout; set them too, or leave it out"
        )
    if evaluation.reference is None:
        return None
    networks = (evaluation.network,) if evaluation.network else ()
    reference_set = ReferenceSet.load(
        evaluation.reference, factory.device(world), networks, trust_code=evaluation.trust_code
    )
    reference_set.check_comparable("the latents", manifest.image_size, manifest.recipe.get("crop"))
    return reference_set


class BestRecord:
    """The smallest distance so far and how it was measured, as in best.json.

    Args:
        path: JSON file of the record; need not exist.
        name: name of the distance.
        evaluation: how distances are measured.
    """

    def __init__(self, path: str, name: str, evaluation: EvaluationConfig) -> None:
        self.path, self.name = path, name
        self.measurement = evaluation.model_dump(exclude={"every", "task_score", "network", "trust_code"})
        self.content: dict[str, Any] = {}
        try:
            content = storage.read_json(path) if storage.exists(path) else {}
        except DataError as error:
            logger.warning("%s: damaged; the next weights are the best so far", error)
            return
        if isinstance(content, dict) and "samples_seen" in content:
            self.content = {"num_steps": NUM_STEPS, "autoguidance": None, **content}  # records of before name neither

    def update(self, distance: float, samples_seen: int) -> bool:
        """Return whether a distance is the smallest so far, and take it into the record if it is.

        A record of another measurement is not comparable. One of the same or more samples seen was written by a run that
        was killed after its last checkpoint and is now repeated; it is replaced.
        """
        is_comparable = (
            bool(self.content)
            and all(key in self.content and self.content[key] == value for key, value in self.measurement.items())
            and self.content["samples_seen"] < samples_seen
        )
        if is_comparable and self.content.get(self.name, math.inf) <= distance:
            return False
        self.content = {self.name: distance, "samples_seen": samples_seen, **self.measurement}
        return True

    def save(self) -> None:
        """Write the record."""
        storage.write_json(self.path, self.content)


class BestWeights:
    """Measures the EMA weights, and saves them when their distance is the smallest so far; all ranks take part."""

    def __init__(
        self,
        sampler: EmaSampler,
        folder: Path,
        mixture: Mixture,
        reference_set: ReferenceSet | None,
        guidance: Guidance,
    ) -> None:
        config, world = sampler.config, sampler.engine.world
        assert config.evaluation, "the experiment is evaluated during training"
        self.sampler, self.engine, self.reference_set = sampler, sampler.engine, reference_set
        self.evaluation, self.every = config.evaluation, config.evaluation.every
        self.folder, self.guidance = folder, guidance
        self.stream = sampler.open_stream(mixture, world.size * sampler.micro_batch, world)

    def measure(self, header: WeightsHeader) -> dict[str, float]:
        """Return the distance and the task score by name; save the weights with `header` if the distance is the smallest."""
        sums, num_recognised = self._measure_images()
        figures = {}
        if self.reference_set:
            figures[self.reference_set.network.frechet] = self._compare(sums, self.reference_set, header)
        if self.evaluation.task_score:
            figures[RECOGNISED] = num_recognised / self.evaluation.num
        return figures

    def _compare(self, sums: FeatureSums, reference_set: ReferenceSet, header: WeightsHeader) -> float:
        """Return the distance of the images, and save the weights if it is the smallest; on all ranks."""
        name = reference_set.network.frechet
        record = BestRecord(str(self.folder / RECORD), name, self.evaluation)
        decision = torch.zeros(2, dtype=torch.float64, device=self.engine.device)  # of the main rank, for all
        if self.engine.world.is_main:
            distance = frechet_distance(reference_set.reference.gaussians["pooled"], sums.gaussian())
            decision[0], decision[1] = distance, record.update(distance, header.samples_seen)
        distance, is_best = self.engine.sum_over_ranks(decision).tolist()
        if is_best:
            weights = self.engine.average_weights("ema")
            if self.engine.world.is_main:
                weights_file.save_weights(str(self.folder / BEST), weights, header)
                record.save()
        return float(distance)

    def _measure_images(self) -> tuple[FeatureSums, float]:
        """Return the sums of the features of all images, on the CPU, and the number that are recognised; over all ranks."""
        device = self.engine.device
        dimensions = len(self.reference_set.reference.gaussians["pooled"].mean) if self.reference_set else 0
        total = torch.zeros(dimensions, dtype=torch.float64, device=device)
        sums = FeatureSums(0, total, torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device))
        num_recognised = torch.zeros((), dtype=torch.float64, device=device)
        with self.engine.averaged("ema"):
            for first in range(0, self.evaluation.num, self.stream.options.global_batch):
                images, condition, is_counted = self._images(first)
                if self.evaluation.task_score:
                    is_recognised = TASK_SCORES[self.evaluation.task_score](images, condition)
                    num_recognised += (is_recognised.to(is_counted.device) & is_counted).sum()
                if self.reference_set:
                    sums += FeatureSums.of(self.reference_set.network(images).pooled[is_counted])
        self.stream.close()  # so that no shards stay mapped until the next evaluation
        for part in (sums.total, sums.products, num_recognised):
            self.engine.sum_over_ranks(part)
        return FeatureSums(self.evaluation.num, sums.total.cpu(), sums.products.cpu()), float(num_recognised)

    def _images(self, first: int) -> tuple[Tensor, Condition, Tensor]:
        """Return this rank's images of the batch that begins at image `first`, their conditions, and which are counted."""
        batch = self.stream.batch(first)
        evaluation, seeds = self.evaluation, batch.sample_numbers.tolist()
        latents = self.sampler.latents(seeds, batch.condition, self.guidance, evaluation.num_steps)
        return self.sampler.autoencoder.decode(latents), batch.condition, batch.sample_numbers < evaluation.num
