"""A trained model as an object: seeds and conditions in, images out.

    import lfm

    model = lfm.load("runs/pictures_256")
    samples = model.sample(range(16), class_index=3, guidance_scale=1.5)
    samples.pil_images[0].save("first.png")

An image depends on its seed, condition, solver, guidance and precision alone, not on the other images of its batch. On a GPU
its last bits also depend on the batch size, so each batch is filled up to that size there, and the surplus is discarded.
Classes, masks and segmentation maps are cycled over the seeds, so 16 seeds and one mask give 16 fillings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lfm import autoencoder as autoencoders
from lfm import weights_file
from lfm.autoencoder import Autoencoder
from lfm.data.random_draws import image_noise, kept_tokens
from lfm.errors import ConfigError
from lfm.flow.guidance import (
    AtNullClass,
    CountedVelocity,
    Guidance,
    GuidedVelocity,
    InternallyGuided,
    Network,
    NetworkVelocity,
    fill_up,
)
from lfm.flow.null_condition import null_condition
from lfm.inference.condition_inputs import encode_conditions
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.models.noise_prediction import NoisePrediction
from lfm.precision import precision_on, set_precision, trained_precision
from lfm.solvers import Solving
from lfm.solvers.batching import StepCallback, no_callback
from lfm.types import Condition, SolverResult
from lfm.weights_file import WeightsHeader

# Properties of the network that must agree for autoguidance: else the two do not describe the same distribution.
_SHARED_BY_GUIDANCE = ("latent_size", "condition_channels", "num_labels")


@dataclass(frozen=True)
class Samples:
    """Finished images."""

    seeds: tuple[int, ...]
    images: np.ndarray  # uint8 (B, H, W, 3)
    latents: Tensor  # float32 (B, C, h, w), scaled, on the CPU
    nfe: Tensor  # int64 (B,): network evaluations, guidance counted double

    @property
    def pil_images(self) -> list[Image.Image]:
        """The images as PIL objects."""
        return [Image.fromarray(image) for image in self.images]


def load(
    run: str,
    *,
    autoencoder: str | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> TrainedModel:
    """Load the model of a run folder, a checkpoint folder or a weights file, by path or URL.

    Args:
        run: path or URL of the EMA weights.
        autoencoder: path or hub id of the autoencoder of the latents, if it has moved since training.
        device: by default the GPU if there is one, else the CPU.
        precision: fp32, tf32 or bf16; by default the precision that the model was trained in. The autoencoder decodes in
            tf32 where the network computes in bf16.

    Raises:
        CheckpointError: there are no weights, or they do not fit their header.
        ConfigError: the autoencoder is not that of the latents, or the precision is unknown.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights, header = weights_file.load_weights(run)
    network: nn.Module = weights_file.build_network(weights, header, run)
    precision = precision_on(device, precision or trained_precision(header.config))
    set_precision(network, precision)
    if header.prediction == "noise":
        network = NoisePrediction(network)
    decoder_precision = (
        "tf32" if precision == "bf16" else precision
    )  # bfloat16 has fewer values than a channel has levels
    decoder = autoencoders.load_recorded(header.autoencoder, autoencoder, device, run, decoder_precision)
    return TrainedModel(network.to(device).eval(), header, decoder, run, precision)


class TrainedModel:
    """A velocity network with the autoencoder of its latents.

    Args:
        network: in eval mode.
        header: the description in its weights file.
        autoencoder: that of the latents, on the same device.
        name: path or URL, for messages.
        precision: fp32, tf32 or bf16, which `network` already has.
    """

    def __init__(
        self,
        network: nn.Module,
        header: WeightsHeader,
        autoencoder: Autoencoder,
        name: str = "the model",
        precision: str = "fp32",
    ) -> None:
        self.network, self.header, self.autoencoder = network, header, autoencoder
        self.name, self.precision = name, precision

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def fills_batches(self) -> bool:
        """Whether batches are filled up to the batch size: on a GPU, whose kernels differ in the last bits between sizes."""
        return self.device.type == "cuda"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of a latent."""
        return self.header.model.latent_shape

    def compile_blocks(self, **options: Any) -> None:
        """Compile the network's blocks at their first use, which pays for some hundred evaluations on a GPU.

        Images differ in their last bits from those of blocks that are not compiled.

        Args:
            options: of `torch.compile`, such as `backend`.
        """
        network = self.network.network if isinstance(self.network, NoisePrediction) else self.network
        assert isinstance(network, VelocityNetwork)
        network.compile_blocks(**options)

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
        internal_guidance: bool = False,
        sparse_guidance: bool = False,
        batch_size: int = 32,
        **solving: Any,
    ) -> Samples:
        """Make one image per seed.

        Args:
            seeds: at least one.
            class_index: of a class-conditional model; by default all classes.
            images: to inpaint, uint8 (..., H, W, 3) or PIL; pixels that `masks` hides have no influence.
            masks: uint8 or bool (..., H, W) or greyscale PIL; 0 is known, anything else is to be filled.
            segmentations: maps of class ids (..., H, W).
            composite: replace the known pixels of the result by those of `images`.
            guidance_scale: 1 means none.
            guidance_interval: times between which guidance applies.
            autoguidance: a weaker model to guide away from, in place of the null condition.
            internal_guidance: guide away from the velocity of the network's early blocks, in place of the null condition.
            sparse_guidance: guide away from the velocity with token dropout as in training, in place of the null condition.
            batch_size: images per forward pass; a GPU computes as many even for fewer seeds.
            **solving: `solver`, `num_steps`, `time_shift`, `times`, `atol` and `rtol` of `lfm.solvers.Solving`.

        Raises:
            ConfigError: there are no seeds, or the model does not take a condition, solver or guidance.
            LfmError: the solver fails.
        """
        if not len(seeds):
            raise ConfigError("`seeds`: is empty; pass at least one seed")
        options = Solving(**solving)
        guidance = self.guidance(guidance_scale, guidance_interval, autoguidance, internal_guidance, sparse_guidance)
        image_stack, masks, segmentations = _stack(images, ndim=3), _stack(masks, ndim=2), _stack(segmentations, ndim=2)
        conditions = encode_conditions(self.header, self.autoencoder, class_index, image_stack, masks, segmentations)
        pixels, latents, nfe = [], [], []
        for first in range(0, len(seeds), batch_size):
            numbers = range(first, min(first + batch_size, len(seeds)))
            batch_seeds, condition = [seeds[number] for number in numbers], conditions.condition(numbers)
            result = self.solve(batch_seeds, condition, options, guidance, batch_size=batch_size)
            decoded = self.decode(result.latents, batch_size)
            if conditions.masks is not None and composite:
                decoded = conditions.composite(numbers, decoded)
            pixels.append(decoded)
            latents.append(result.latents.cpu())
            nfe.append(result.nfe)
        return Samples(tuple(seeds), np.concatenate(pixels), torch.cat(latents), torch.cat(nfe))

    def guidance(
        self,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        autoguidance: TrainedModel | None = None,
        internal: bool = False,
        sparse: bool = False,
    ) -> Guidance:
        """Return the settings of guidance by the null condition, a weaker model, the network's early blocks, or dropped tokens.

        Raises:
            ConfigError: the weaker model has another autoencoder, latent size or condition, or other classes and no null
                condition; or the network has no velocity of its early blocks or was trained without token dropout.
        """
        ways = {"autoguidance": autoguidance, "internal_guidance": internal, "sparse_guidance": sparse}
        chosen = [f"`{name}`" for name, value in ways.items() if value]
        if len(chosen) > 1:
            raise ConfigError(f"{', '.join(chosen)}: are different ways of guidance; choose one")
        if internal and not self.header.model.has_internal_velocity:
            raise ConfigError(f"{self.name}: was trained without model.internal_head; choose another guidance")
        model = self.header.model
        if sparse and model.num_kept_tokens == model.num_tokens:
            raise ConfigError(f"{self.name}: was trained without model.token_dropout; choose another guidance")
        if sparse:
            return Guidance(scale, interval, TokenDropped(self.network, model))
        if autoguidance is None:
            return Guidance(scale, interval, internal=internal)
        pairs = {"autoencoder": (self.header.autoencoder.content_hash, autoguidance.header.autoencoder.content_hash)}
        for name in _SHARED_BY_GUIDANCE:
            pairs[name] = (getattr(self.header.model, name), getattr(autoguidance.header.model, name))
        for name, (own, weak) in pairs.items():
            if own != weak:
                raise ConfigError(
                    f"`autoguidance` {autoguidance.name}: its {name} is {weak}, that of {self.name} {own}"
                )
        if self._has_classes_of(autoguidance):
            return Guidance(scale, interval, autoguidance.network)
        weaker = autoguidance.header.model
        if weaker.num_classes and not weaker.has_null_condition:
            raise ConfigError(
                f"`autoguidance` {autoguidance.name}: its classes are others than those of {self.name}, and it has no null "
                "condition; name a model of the same classes, or one trained with condition_dropout"
            )
        return Guidance(scale, interval, AtNullClass(autoguidance.network, weaker.num_classes))

    def _has_classes_of(self, other: TrainedModel) -> bool:
        """Return whether the classes of two models are the same; those of an imported model are numbers, which say nothing."""
        if self.header.model.num_classes != other.header.model.num_classes:
            return False
        own, theirs = ([entry.name for entry in model.header.classes] for model in (self, other))
        return own == theirs or any(names == [str(index) for index in range(len(names))] for names in (own, theirs))

    def solve(
        self,
        seeds: Sequence[int],
        condition: Condition,
        solving: Solving,
        guidance: Guidance | None = None,
        on_step: StepCallback = no_callback,
        batch_size: int | None = None,
    ) -> SolverResult:
        """Compute the latents of these seeds, each under its row of the condition.

        With `batch_size`, on a GPU each evaluation of the network has that many rows, however many seeds there are and
        however many rows an adaptive solver has still to integrate.
        """
        noise = torch.from_numpy(image_noise(seeds, self.latent_shape)).to(self.device)
        velocity = self.velocity(condition.to(self.device), len(seeds), guidance or Guidance(), batch_size)

        def normals(step: int) -> Tensor:
            return torch.from_numpy(image_noise(seeds, self.latent_shape, step + 1))

        return SolverResult(solving(velocity, noise, normals=normals, on_step=on_step), velocity.nfe.cpu())

    def velocity(
        self, condition: Condition, count: int, guidance: Guidance, batch_size: int | None = None
    ) -> CountedVelocity:
        """Return the velocity field of `count` images under their condition; see `solve` for `batch_size`.

        Raises:
            ConfigError: the model has no null condition and cannot be guided by itself.
        """
        fill_to = batch_size if self.fills_batches else None
        return guided_velocity(self.network, self.header.model, condition, count, guidance, fill_to)

    def decode(self, latents: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Decode scaled latents (B, C, h, w) to images uint8 (B, H, W, 3); on a GPU as a batch of `batch_size`, if not None."""
        filled = fill_up(latents, batch_size if self.fills_batches else None)
        return self.autoencoder.decode(filled)[: len(latents)].permute(0, 2, 3, 1).cpu().numpy()


class TokenDropped:
    """A network with token dropout as in training, which makes it weaker and cheaper.

    Which tokens are kept is drawn anew for each time, and is the same for all images, so that an image does not depend on
    the others of its batch.
    """

    def __init__(self, network: Callable[..., Tensor], config: ModelConfig) -> None:
        self.network, self.config = network, config

    def __call__(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        numbers = (time.double() * 2**24).round().long()  # (B,)
        tokens = kept_tokens(0, numbers, self.config.num_tokens, self.config.num_kept_tokens)  # (B, tokens)
        return self.network(state, time, condition, tokens)


def guided_velocity(
    network: Network,
    config: ModelConfig,
    condition: Condition,
    count: int,
    guidance: Guidance,
    fill_to: int | None = None,
) -> CountedVelocity:
    """Return the velocity field of a network of this configuration for `count` images under their condition.

    Each evaluation of the network is filled up to `fill_to` rows, if not None; see `NetworkVelocity`.

    Raises:
        ConfigError: the model has no null condition and cannot be guided by itself.
    """
    if guidance.internal and guidance.scale != 1:
        return NetworkVelocity(InternallyGuided(network, guidance), condition, count, fill_to)
    velocity = NetworkVelocity(network, condition, count, fill_to)
    if guidance.weak is not None:
        weak = NetworkVelocity(guidance.weak, condition, count, fill_to)
    elif guidance.scale == 1:
        return velocity
    else:
        null = null_condition(
            condition, config.condition_dropout, num_classes=config.num_classes, num_labels=config.num_labels
        )
        weak = NetworkVelocity(network, null, count, fill_to)
    return GuidedVelocity(velocity, weak, guidance.scale, guidance.interval)


def _stack(values: Any, ndim: int) -> np.ndarray | None:
    """Return one or several arrays or PIL images of `ndim` axes and equal size as one array with a leading axis."""
    if values is None:
        return None
    array = (
        np.stack([np.asarray(value) for value in values]) if isinstance(values, list | tuple) else np.asarray(values)
    )
    return array[None] if array.ndim == ndim else array
