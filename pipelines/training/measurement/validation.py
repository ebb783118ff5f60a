"""Validation of the EMA weights during training: a grid of images and a loss on held-back shards.

Both are comparable over a run and between runs: seeds, conditions, noise and times are fixed, and the times are uniform
whatever distribution the training uses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lfm.data.stream.mixture import Mixture
from lfm.flow.null_condition import class_condition
from lfm.flow.path import path_sample, squared_error
from lfm.flow.time_samplers import uniform_time
from lfm.training import run_folder
from lfm.types import Condition, LatentBatch
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import image_files
from pipelines.training.measurement.ema_sampler import EmaSampler

MOST_IMAGES, MOST_COLUMNS, MOST_SAMPLES = 32, 20, 4096
SMALLEST_SIDE = 128  # pixels; smaller images are enlarged by a whole factor


class Validation:
    """Grids of images and a validation loss; all ranks take part.

    Args:
        sampler: generates the images.
        folder: run folder.
        training_shards: mixture of the shards whose first conditions the images have.
        held_back: mixture of the shards of the validation loss; if it has none, there is no loss.
    """

    def __init__(self, sampler: EmaSampler, folder: Path, training_shards: Mixture, held_back: Mixture) -> None:
        config, classes = sampler.config, sampler.model.num_classes
        assert config.train.validate_every, "the experiment is validated"
        self.sampler, self.engine = sampler, sampler.engine
        self.every, self.folder = config.train.validate_every, folder / "previews"
        self.sigma_min = config.flow.sigma_min
        self.columns = classes if classes and classes <= MOST_COLUMNS else None
        self.num_images = MOST_IMAGES // self.columns * self.columns if self.columns else MOST_IMAGES
        self.condition = self._conditions(training_shards)
        self.batches: list[LatentBatch] = []
        if held_back.manifest.shards:
            size = config.train.global_batch
            stream = sampler.open_stream(held_back, size, self.engine.world)
            num_batches = max(1, min(held_back.manifest.num_samples, MOST_SAMPLES) // size)
            self.batches = [stream.batch(number * size) for number in range(num_batches)]
            stream.close()

    def measure(self, header: WeightsHeader) -> dict[str, float]:
        """Save the images, and return the validation loss by its name; empty without held-back shards."""
        figures = {}
        with self.engine.averaged("ema"):
            if self.batches:
                figures["validation_loss"] = self._validation_loss()
            # On every rank: under ZeRO 3 all ranks must evaluate the network together.
            latents = self.sampler.latents(range(self.num_images), self.condition)
        if self.engine.world.is_main:
            images = self.sampler.decode(latents).permute(0, 2, 3, 1).numpy()
            grid = image_files.grid(images, columns=self.columns, enlarge=max(1, SMALLEST_SIDE // images.shape[1]))
            image_files.save(grid, self.folder / f"{run_folder.tag(header.samples_seen)}.png", flush=False)
            self.engine.write_image("train/preview", np.asarray(grid), header.samples_seen)
        return figures

    def _conditions(self, mixture: Mixture) -> Condition:
        """Return the conditions of the first samples; classes are balanced, or every n-th one if there are many."""
        stream = self.sampler.open_stream(mixture, self.num_images, World())
        condition = stream.batch(0).condition
        stream.close()
        if classes := self.sampler.model.num_classes:
            stride = max(1, classes // self.num_images)
            index = [number * stride % classes for number in range(self.num_images)]
            condition = replace(condition, class_index=class_condition(index, classes).class_index)
        return condition

    def _validation_loss(self) -> float:
        total = torch.zeros(2, device=self.engine.device)  # sum of the errors, number of samples
        for batch in self.batches:
            for rows in torch.arange(len(batch.latents), device=self.engine.device).split(self.sampler.micro_batch):
                part = batch.rows(rows)
                example = path_sample(part.latents, part.noise, uniform_time(part.uniform), self.sigma_min)
                errors = squared_error(
                    self.sampler.network(example.state, example.time, part.condition), example.velocity
                )
                total += torch.stack([errors.sum(), torch.tensor(float(len(errors)), device=errors.device)])
        self.engine.sum_over_ranks(total)
        return float(total[0] / total[1])
