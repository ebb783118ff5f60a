"""The best weights of a training: the EMA whose images come nearest to the real ones, by the Frechet distance.

Every so many steps the EMA makes the same images: of the same seeds, under the conditions of the training's first samples,
each rank its share. So distances of one run compare; with few images they lie above those of many, and what a mask leaves
is as the model makes it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm import solvers, storage, weights_file
from lfm.autoencoder import Autoencoder
from lfm.data.manifest import Manifest
from lfm.data.random_draws import image_noise
from lfm.data.stream.latent_stream import LatentStream
from lfm.errors import ConfigError
from lfm.flow.guidance import Guidance
from lfm.inference.trained_model import guided_velocity
from lfm.metrics.frechet import FeatureSums, frechet_distance
from lfm.models.config import ModelConfig
from lfm.training.engine import Engine
from lfm.types import Condition
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.config_schema import ExperimentConfig
from pipelines.common.reference_features import ReferenceSet

SOLVER, NUM_STEPS = "heun", 25
BEST, RECORD = "best.safetensors", "best.json"


def load_reference_set(config: ExperimentConfig, manifest: Manifest, world: World) -> ReferenceSet:
    """Load the reference of an experiment and its feature network.

    Raises:
        ConfigError: If the reference is of another image size or crop rule than the latents, or its network is missing.
        DataError: If it is not a reference.
    """
    assert config.evaluation, "the experiment is evaluated during training"
    if config.evaluation.guidance_scale != 1 and not config.condition_dropout:
        raise ConfigError(
            "evaluation.guidance_scale: guidance needs a condition and condition_dropout; set them too, or leave it out"
        )
    reference_set = ReferenceSet.load(config.evaluation.reference, factory.device(world))
    reference_set.check_comparable("the latents", manifest.image_size, manifest.recipe.get("crop"))
    return reference_set


class BestWeights:
    """Measures a model in training, and keeps the best of its weights; all ranks measure together."""

    def __init__(
        self,
        config: ExperimentConfig,
        manifest: Manifest,
        model: ModelConfig,
        engine: Engine,
        autoencoder: Autoencoder,
        standard: ReferenceSet,
    ) -> None:
        assert config.evaluation, "the experiment is evaluated while it trains"
        self.evaluation, self.every = config.evaluation, config.evaluation.every
        self.engine, self.autoencoder, self.model = engine, autoencoder, model
        self.standard, self.name, self.folder = standard, standard.network.frechet, Path(config.run)
        options = replace(
            factory.stream_options(config, model),
            seed=0,
            condition_dropout=0.0,
            coupling_group=1,
            global_batch=engine.world.size * factory.micro_batch(config, engine.world),
        )
        cache = factory.cache(config.data.cache, config.data.cache_gigabytes)
        self.stream = LatentStream(config.data.shards, manifest, options, engine.world, cache, engine.device)
        record = str(self.folder / RECORD)
        best = storage.read_json(record) if storage.exists(record) else {}
        self.best: dict[str, Any] = best if isinstance(best, dict) and "samples_seen" in best else {}

    def measure(self, header: WeightsHeader) -> dict[str, float]:
        """The distance by its name; weights that come nearer than all before are kept under this header."""
        distance = self.distance()
        if self.is_best(distance, header.samples_seen):
            weights = self.engine.average_weights("ema")
            if self.engine.world.is_main:
                weights_file.save_weights(str(self.folder / BEST), weights, header)
                storage.write_json(str(self.folder / RECORD), self.best)
        return {self.name: distance}

    def distance(self) -> float:
        """The Frechet distance of the EMA's images to the reference."""
        dimensions = len(self.standard.reference.gaussians["pooled"].mean)
        total = torch.zeros(dimensions, dtype=torch.float64, device=self.engine.device)
        sums = FeatureSums(0, total, torch.zeros(dimensions, dimensions, dtype=torch.float64, device=total.device))
        with self.engine.averaged("ema"):
            for first in range(0, self.evaluation.num, self.stream.options.global_batch):
                batch = self.stream.batch(first)
                images = self.autoencoder.decode(self._latents(batch.sample_numbers, batch.condition))
                counted = batch.sample_numbers < self.evaluation.num  # on a rank at the end, perhaps none
                sums += FeatureSums.of(self.standard.network(images).pooled[counted])
        self.stream.close()  # so that no shards stay mapped until the next evaluation
        for part in (sums.total, sums.products):
            self.engine.sum_over_ranks(part)
        found = torch.zeros(1, dtype=torch.float64, device=self.engine.device)
        if self.engine.world.is_main:
            made = FeatureSums(self.evaluation.num, sums.total.cpu(), sums.products.cpu()).gaussian()
            found += frechet_distance(self.standard.reference.gaussians["pooled"], made)
        return float(self.engine.sum_over_ranks(found))

    def _latents(self, seeds: Tensor, condition: Condition) -> Tensor:
        """One image for each seed; fixed steps, so that under ZeRO 3 the ranks compute in step."""
        model, guidance = self.model, Guidance(self.evaluation.guidance_scale)
        noise = torch.from_numpy(image_noise(seeds.tolist(), (model.latent_channels, *[model.latent_size] * 2)))
        velocity = guided_velocity(self.engine, model, condition, len(seeds), guidance)
        return solvers.solve(SOLVER, velocity, noise.to(self.engine.device), num_steps=NUM_STEPS)

    def is_best(self, distance: float, samples_seen: int) -> bool:
        """Whether the weights of now are to be kept, as every rank finds; they are the best from then on.

        A record of what is yet to come is of a run that was killed since: it will come again. One of another measure
        does not compare.
        """
        measured = self.evaluation.model_dump(exclude={"every"})
        comparable = {*measured.items()} <= {*self.best.items()} and self.best["samples_seen"] < samples_seen
        if comparable and self.best.get(self.name, math.inf) <= distance:
            return False
        self.best = {self.name: distance, "samples_seen": samples_seen, **measured}
        return True
