"""What a training has learned so far, seen through its EMA in eval mode: a grid of images and a validation loss.

Everything is fixed, so that they compare: the seeds and labels of the images, and the samples, noise and times of the
loss. Its times are uniform whatever training prefers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lfm import solvers
from lfm.autoencoder import Autoencoder
from lfm.data.manifest import Manifest
from lfm.data.random_draws import image_noise
from lfm.data.stream.latent_stream import LatentStream
from lfm.errors import DataError
from lfm.flow.guidance import NetworkVelocity
from lfm.flow.null_condition import class_condition
from lfm.flow.path import path_sample, squared_error
from lfm.flow.time_samplers import uniform_time
from lfm.models.config import ModelConfig
from lfm.training import run_folder
from lfm.training.engine import Engine
from lfm.world import World
from pipelines.common import factory, image_files
from pipelines.common.config_schema import ExperimentConfig

SOLVER, NUM_STEPS = "heun", 25
MOST_IMAGES, MOST_COLUMNS, MOST_SAMPLES = 32, 20, 4096


def split(manifest: Manifest, held_back: int) -> tuple[Manifest, Manifest]:
    """The shards to train on, and the last ones, which are held back.

    Raises:
        DataError: none would be left to train on.
    """
    if held_back >= len(manifest.shards):
        raise DataError(
            f"data.held_back {held_back}: there are {len(manifest.shards)} shards, and some must be trained on; "
            "lower it, or encode with fewer samples per shard"
        )
    border = len(manifest.shards) - held_back
    trained, rest = manifest.shards[:border], manifest.shards[border:]
    return manifest.model_copy(update={"shards": trained}), manifest.model_copy(update={"shards": rest})


class Validation:
    """Grids of images and a validation loss of a model in training; all ranks take part.

    Args:
        held_back: what the validation loss is taken on; may have no shards.
        autoencoder: decodes the images, on the main rank.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        manifest: Manifest,
        held_back: Manifest,
        model: ModelConfig,
        engine: Engine,
        autoencoder: Autoencoder,
    ) -> None:
        assert config.train.validate_every, "the experiment is validated"
        self.every, self.folder = config.train.validate_every, Path(config.run) / "previews"
        self.config, self.engine, self.autoencoder, self.model = config, engine, autoencoder, model
        cache = factory.cache(config.data.cache, config.data.cache_gigabytes)
        self.micro_batch = factory.micro_batch(config, engine.world)
        classes = model.num_classes
        self.columns = classes if classes and classes <= MOST_COLUMNS else None
        count = MOST_IMAGES // self.columns * self.columns if self.columns else MOST_IMAGES
        options = replace(
            factory.stream_options(config, model), seed=0, condition_dropout=0.0, coupling_group=1, global_batch=count
        )
        self.condition = LatentStream(config.data.shards, manifest, options, World(), cache).batch(0).condition
        if classes:  # as many images of each, or every n-th class
            index = [i * max(1, classes // count) % classes for i in range(count)]
            self.condition = replace(self.condition, class_index=class_condition(index, classes).class_index)
        self.noise = torch.from_numpy(image_noise(range(count), model.latent_shape))
        self.validation = []
        if held_back.shards:
            batch = config.train.global_batch
            options = replace(options, global_batch=batch)
            stream = LatentStream(config.data.shards, held_back, options, engine.world, cache, engine.device)
            batches = max(1, min(held_back.num_samples, MOST_SAMPLES) // batch)
            self.validation = [stream.batch(number * batch) for number in range(batches)]

    def measure(self, samples_seen: int) -> dict[str, float]:
        """The validation loss, if there are held-back shards; the images are saved."""
        found = {}
        with self.engine.averaged("ema"):
            if self.validation:
                found["validation_loss"] = self._validation_loss()
            latents = self._latents()
        if self.engine.world.is_main:
            images = torch.cat([self.autoencoder.decode(some).cpu() for some in latents.split(self.micro_batch)])
            enlarge = max(1, 128 // images.shape[-1])
            grid = image_files.grid(images.permute(0, 2, 3, 1).numpy(), columns=self.columns, enlarge=enlarge)
            image_files.save(grid, self.folder / f"{run_folder.tag(samples_seen)}.png", flush=False)
        return found

    def _validation_loss(self) -> float:
        total = torch.zeros(2, device=self.engine.device)
        for whole in self.validation:
            for rows in torch.arange(len(whole.latents), device=self.engine.device).split(self.micro_batch):
                batch = whole.rows(rows)
                time = uniform_time(batch.uniform)
                example = path_sample(batch.latents, batch.noise, time, self.config.flow.sigma_min)
                losses = squared_error(self.engine(example.state, example.time, batch.condition), example.velocity)
                total += torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=losses.device)])
        self.engine.sum_over_ranks(total)
        return float(total[0] / total[1])

    def _latents(self) -> torch.Tensor:
        """Every rank makes all of them: under ZeRO 3 the ranks must compute in step."""
        condition = self.condition.to(self.engine.device)
        velocity = NetworkVelocity(self.engine, condition, len(self.noise))
        return solvers.solve(SOLVER, velocity, self.noise.to(self.engine.device), num_steps=NUM_STEPS)
