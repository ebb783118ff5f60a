"""Images of the EMA weights during training, for previews and for the choice of the best weights.

The images are comparable over a run: their seeds and conditions are fixed. The solver takes fixed steps, so that under
ZeRO 3, where every network evaluation is a collective operation, all ranks evaluate the network equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lfm import solvers
from lfm.autoencoder import Autoencoder
from lfm.data.random_draws import image_noise
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import Mixture
from lfm.flow.guidance import Guidance, Network
from lfm.inference.trained_model import guided_velocity
from lfm.models.config import ModelConfig
from lfm.training.engine import Engine
from lfm.types import Condition
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment.config_schema import ExperimentConfig

SOLVER, NUM_STEPS = "heun", 25  # of previews


class EmaSampler:
    """Generates latents and images with the network of an engine; used inside `engine.averaged`."""

    def __init__(
        self, config: ExperimentConfig, model: ModelConfig, engine: Engine, autoencoder: Autoencoder, network: Network
    ) -> None:
        self.config, self.model, self.engine, self.autoencoder = config, model, engine, autoencoder
        self.network = network  # the engine, as a velocity network
        self.micro_batch = factory.micro_batch(config, engine.world)

    def open_stream(self, mixture: Mixture, batch_size: int, world: World) -> LatentStream:
        """Return a stream of fixed samples in batches of `batch_size` over all ranks, without condition dropout."""
        options = replace(
            factory.stream_options(self.config, self.model),
            seed=0,
            condition_dropout=0.0,
            coupling_group=1,
            num_noises=1,
            global_batch=batch_size,
        )
        cache = factory.cache(self.config.data.cache, self.config.data.cache_gigabytes)
        return LatentStream(mixture, options, world, cache, self.engine.device)

    def latents(
        self, seeds: Sequence[int], condition: Condition, guidance: Guidance | None = None, num_steps: int = NUM_STEPS
    ) -> Tensor:
        """Return one latent for each seed, float32 (B, C, h, w); all ranks must call it with as many seeds."""
        noise = torch.from_numpy(image_noise(seeds, self.model.latent_shape)).to(self.engine.device)
        condition = condition.to(noise.device)
        velocity = guided_velocity(self.network, self.model, condition, len(seeds), guidance or Guidance())
        return solvers.solve(SOLVER, velocity, noise, num_steps=num_steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents as the autoencoder does, on the CPU, one micro-batch at a time."""
        return torch.cat([self.autoencoder.decode(part).cpu() for part in latents.split(self.micro_batch)])
