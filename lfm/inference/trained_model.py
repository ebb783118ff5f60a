"""A trained model as an object: seeds and conditions in, images out.

    import lfm

    model = lfm.load("runs/pictures_256")
    samples = model.sample(range(16), class_index=3, guidance_scale=1.5)
    samples.pil_images[0].save("first.png")

An image depends on its seed, condition, solver and guidance alone, never on the batch that it is made in. Where there
are fewer classes, masks or maps than seeds, the seeds take them in turns, so that 16 seeds and one mask are 16 fillings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lfm import autoencoder as autoencoders
from lfm import weights_file
from lfm.autoencoder import Autoencoder
from lfm.data.random_draws import image_noise
from lfm.errors import CheckpointError, ConfigError
from lfm.flow.guidance import CountedVelocity, GuidedVelocity, NetworkVelocity
from lfm.flow.null_condition import null_condition
from lfm.inference.condition_inputs import encode_conditions
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.noise_prediction import NoisePrediction
from lfm.solvers import Solving
from lfm.solvers.batching import StepCallback, no_callback
from lfm.types import Condition, SolverResult
from lfm.weights_file import WeightsHeader


@dataclass(frozen=True)
class Guidance:
    """How far to lead away, when, and from which model; from the null condition where `weak` is None."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    weak: TrainedModel | None = None


@dataclass(frozen=True)
class Samples:
    """Finished images."""

    seeds: tuple[int, ...]
    images: np.ndarray  # uint8 (B, H, W, 3)
    latents: Tensor  # float32 (B, C, h, w), scaled, on the CPU
    nfe: Tensor  # int64 (B,): network evaluations, guidance counted double

    @property
    def pil_images(self) -> list[Image.Image]:
        """For people."""
        return [Image.fromarray(image) for image in self.images]


def load(run: str, *, autoencoder: str | None = None, device: torch.device | str | None = None) -> TrainedModel:
    """The model of a run folder, a checkpoint folder or a weights file, by path or URL.

    Args:
        run: where its EMA weights are.
        autoencoder: where the one of its latents is now, if it has moved.
        device: by default the GPU, where there is one.

    Raises:
        CheckpointError: there are no weights, or they do not fit their header.
        ConfigError: the autoencoder is not that of the latents.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights, header = weights_file.load_weights(run)
    model = registry.build_network(header.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{run}: its weights do not fit its header; take another checkpoint") from error
    network = NoisePrediction(model) if header.prediction == "noise" else model
    decoder = autoencoders.load_recorded(header.autoencoder, autoencoder, device, run)
    return TrainedModel(network.to(device).eval(), header, decoder, run)


class TrainedModel:
    """A network with the autoencoder of its latents.

    Args:
        network: in eval mode.
        header: what its weights say of themselves.
        autoencoder: the one that the latents are of, on the same device.
        name: where it comes from, for messages.
    """

    def __init__(
        self, network: nn.Module, header: WeightsHeader, autoencoder: Autoencoder, name: str = "the model"
    ) -> None:
        self.network, self.header, self.autoencoder, self.name = network, header, autoencoder, name

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        config = self.header.model
        return (config.latent_channels, config.latent_size, config.latent_size)

    def sample(
        self,
        seeds: Sequence[int],
        *,
        class_index: int | Sequence[int] | None = None,
        images: Any = None,
        masks: Any = None,
        segmentations: Any = None,
        composite: bool = True,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        autoguidance: TrainedModel | None = None,
        batch_size: int = 32,
        **solving: Any,
    ) -> Samples:
        """An image of each seed.

        Args:
            seeds: one for each image.
            class_index: of a class-conditional model; by default all classes.
            images: what to fill in, uint8 (..., H, W, 3) or PIL; only what `masks` does not hide is looked at.
            masks: uint8 or bool (..., H, W) or grey PIL: all but 0 is to be filled.
            segmentations: class ids (..., H, W).
            composite: put the known pixels of `images` back into the result.
            guidance_scale: 1 means none.
            guidance_interval: the times between which there is guidance.
            autoguidance: a weaker model to lead away from, in place of the null condition.
            batch_size: images at once.
            **solving: `solver`, `num_steps`, `time_shift`, `times`, `atol`, `rtol` of `lfm.solvers.Solving`.

        Raises:
            ConfigError: a condition, solver or guidance that the model does not take.
        """
        options, guidance = Solving(**solving), Guidance(guidance_scale, guidance_interval, autoguidance)
        conditions = encode_conditions(
            *(self.header, self.autoencoder, class_index),
            *(_stack(images, 3), _stack(masks, 2), _stack(segmentations, 2)),
        )
        parts = []
        for first in range(0, len(seeds), batch_size):
            numbers = range(first, min(first + batch_size, len(seeds)))
            result = self.solve([seeds[number] for number in numbers], conditions.condition(numbers), options, guidance)
            decoded = self.decode(result.latents)
            if conditions.masks is not None and composite:
                decoded = conditions.composite(numbers, decoded)
            parts.append((decoded, result.latents.cpu(), result.nfe))
        images, latents, nfe = zip(*parts, strict=True)
        return Samples(tuple(seeds), np.concatenate(images), torch.cat(latents), torch.cat(nfe))

    def solve(
        self,
        seeds: Sequence[int],
        condition: Condition,
        solving: Solving,
        guidance: Guidance | None = None,
        on_step: StepCallback = no_callback,
    ) -> SolverResult:
        """The latents of these seeds, each under its row of the condition."""
        noise = torch.from_numpy(image_noise(seeds, self.latent_shape)).to(self.device)
        velocity = self.velocity(condition.to(self.device), len(seeds), guidance or Guidance())

        def normals(step: int) -> Tensor:
            return torch.from_numpy(image_noise(seeds, self.latent_shape, step + 1))

        return SolverResult(solving(velocity, noise, normals=normals, on_step=on_step), velocity.nfe.cpu())

    def velocity(self, condition: Condition, count: int, guidance: Guidance) -> CountedVelocity:
        """The field that leads `count` images to their condition.

        Raises:
            ConfigError: the model cannot be guided, or not by that one.
        """
        if guidance.weak is not None:
            self._check_alike(guidance.weak)
        return guided_velocity(self.network, self.header.model, condition, count, guidance)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, C, h, w) as images uint8 (B, H, W, 3)."""
        return self.autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()

    def _check_alike(self, weak: TrainedModel) -> None:
        """The two must see the same latents and conditions, or one would lead the other nowhere."""
        for what, ours, theirs in (
            ("autoencoder", self.header.autoencoder.content_hash, weak.header.autoencoder.content_hash),
            *(
                (name, getattr(self.header.model, name), getattr(weak.header.model, name))
                for name in ("latent_size", "num_classes", "condition_channels", "num_labels")
            ),
        ):
            if ours != theirs:
                raise ConfigError(f"--autoguidance {weak.name}: its {what} is {theirs}, that of {self.name} {ours}")


def _stack(given: Any, ndim: int) -> np.ndarray | None:
    """Arrays or images of `ndim` axes, one or several of equal size, as one array with a first axis that counts them."""
    if given is None:
        return None
    array = np.stack([np.asarray(one) for one in given]) if isinstance(given, list | tuple) else np.asarray(given)
    return array[None] if array.ndim == ndim else array


def guided_velocity(
    network: nn.Module, model: ModelConfig, condition: Condition, count: int, guidance: Guidance
) -> CountedVelocity:
    """The field of a network of this shape that leads `count` images to their condition.

    Raises:
        ConfigError: the model has no null condition, and so cannot be guided by itself.
    """
    own = NetworkVelocity(network, condition, count)
    if guidance.weak is not None:
        weak = NetworkVelocity(guidance.weak.network, condition, count)
    elif guidance.scale == 1:
        return own
    else:
        null = null_condition(
            condition, model.condition_dropout, num_classes=model.num_classes, num_labels=model.num_labels
        )
        weak = NetworkVelocity(network, null, count)
    return GuidedVelocity(own, weak, guidance.scale, guidance.interval)
