"""The configuration of the ADM U-Net, and its keys in an experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from lfm.errors import ConfigError
from lfm.models.config import LABEL_CHANNELS, VALIDATED, AttentionBackend, BackboneOptions, ModelConfig, Share

EMBEDDING_MULTIPLIER = 4  # channels of the embedded time and class, in multiples of `model_channels`
DEFAULT_HEAD_CHANNELS = 64


@dataclass(frozen=True, config=VALIDATED)
class BlockShape:
    """Position and shape of one block of the U-Net."""

    in_channels: int
    """Channels of the input, those of the skip connection included."""
    out_channels: int
    size: int
    """Height and width of the output."""
    level: int
    """Number of halvings of the latent at the output."""
    resample: Literal["down", "up"] | None = None
    attention: bool = False
    skip_channels: int = 0
    """Channels of the encoder's output that is concatenated to the input; 0 in encoder and middle."""


@dataclass(frozen=True, kw_only=True, config=VALIDATED)
class UNetArchitecture:
    """Architecture of an ADM U-Net. The defaults are those of the paper's unconditional models."""

    execution_fields: ClassVar[frozenset[str]] = frozenset({"attention", "activation_checkpointing", "channels_last"})
    training_fields: ClassVar[frozenset[str]] = frozenset({"dropout"})

    model_channels: Annotated[int, Field(ge=4, le=16_384, multiple_of=4)] = 256
    """Channels of the first level, before its multiplier."""
    channel_multipliers: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=16)
    ] = (1, 2, 3, 4)
    """Channels of each level in multiples of `model_channels`; each level halves the height and width of the one before."""
    num_blocks: Annotated[int, Field(ge=1, le=100)] = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[PositiveInt, ...] = (16, 8, 4)
    """Heights of the latent, in latent elements, at which residual blocks are followed by attention."""
    num_heads: PositiveInt | None = None
    """Attention heads at every level, in place of `head_channels`."""
    head_channels: PositiveInt | None = None
    """Channels of one attention head, in place of `num_heads`; 64 if neither is set."""
    resampling: Literal["residual", "convolution"] = "residual"
    """How levels are connected: by residual blocks that resample, or by convolutions."""
    scale_shift_norm: bool = True
    """Let time and class scale and shift the second norm of a residual block; else they are added before it."""
    class_embedding: Literal["table", "projection"] = "table"
    """A table of rows with a learned null class, or a projection of the one-hot class, whose null class is 0."""
    dropout: Share = 0.0
    """Share of activations that are dropped before the second convolution of a residual block in training."""
    time_scale: PositiveFloat = 1000.0
    """Factor of the time before its sinusoidal embedding; the paper's code has 1."""
    frequency_shift: Literal[0, 1] = 0
    """Shift of the frequencies of the time embedding."""
    attention: AttentionBackend = "auto"
    """Library that computes the attention; auto chooses xformers on CUDA if it works there, and torch's own elsewhere."""
    activation_checkpointing: NonNegativeInt = 0
    """Recompute the activations of the n levels of highest resolution in the backward pass, to save memory; 0 means none."""
    channels_last: bool = False
    """Lay out feature maps channels-last in memory, which some devices convolve faster."""


@dataclass(frozen=True, config=VALIDATED)
class UNetConfig(UNetArchitecture, ModelConfig):
    """Configuration of a `lfm.models.unet.UNet`.

    Raises:
        ConfigError: names the fields that are out of range or contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        halvings = len(self.channel_multipliers) - 1
        if self.latent_size % 2**halvings:
            raise ConfigError(
                f"`channel_multipliers` {self.channel_multipliers}: halve the latent {halvings} times, but `latent_size` "
                f"{self.latent_size} is no multiple of {2**halvings}"
            )
        sizes = [self.latent_size >> level for level in range(halvings + 1)]
        if unknown := sorted(set(self.attention_resolutions) - set(sizes)):
            raise ConfigError(f"`attention_resolutions` {unknown[0]}: no level has this size; the sizes are {sizes}")
        if self.num_heads and self.head_channels:
            raise ConfigError(f"`num_heads` {self.num_heads}: leave it out, or `head_channels`, {self.head_channels}")
        for shape in self.blocks:
            if shape.attention and shape.out_channels % (self.num_heads or self.channels_of_head):
                name = "num_heads" if self.num_heads else "head_channels"
                raise ConfigError(
                    f"`{name}` {self.num_heads or self.channels_of_head}: does not divide the {shape.out_channels} "
                    f"channels of level {shape.level}"
                )

    def structure(self) -> dict[str, Any]:
        """See `ModelConfig.structure`: attention must be at the same levels, whatever the size of the latent is."""
        structure = super().structure()
        levels = sorted(self.latent_size // size for size in self.attention_resolutions)
        structure["attention_resolutions"] = f"latent_size / {levels}"
        if self.num_classes is None:
            del structure["class_embedding"]
        return structure

    @property
    def channels_of_head(self) -> int:
        """Channels of one attention head, where `num_heads` is not set."""
        return self.head_channels or DEFAULT_HEAD_CHANNELS

    @property
    def embedding_channels(self) -> int:
        """Channels of the embedded time and class."""
        return EMBEDDING_MULTIPLIER * self.model_channels

    @property
    def first_channels(self) -> int:
        """Channels of the first level, which the input convolution makes."""
        return self.model_channels * self.channel_multipliers[0]

    def heads_of(self, channels: int) -> int:
        """Return the number of attention heads at a number of channels."""
        return self.num_heads or channels // self.channels_of_head

    @property
    def encoder_blocks(self) -> tuple[BlockShape, ...]:
        """The blocks after the input convolution, down to the lowest resolution."""
        return tuple(self._encoder())

    @property
    def middle_blocks(self) -> tuple[BlockShape, BlockShape]:
        """The two blocks at the lowest resolution; the first has attention whatever `attention_resolutions` are."""
        last = len(self.channel_multipliers) - 1
        channels = self.model_channels * self.channel_multipliers[last]
        size = self.latent_size >> last
        return (
            BlockShape(channels, channels, size, last, attention=True),
            BlockShape(channels, channels, size, last),
        )

    @property
    def decoder_blocks(self) -> tuple[BlockShape, ...]:
        """The blocks up to the resolution of the latent; all but the upsampling ones take a skip connection."""
        return tuple(self._decoder())

    @property
    def blocks(self) -> tuple[BlockShape, ...]:
        """All blocks in the order in which they run."""
        return self.encoder_blocks + self.middle_blocks + self.decoder_blocks

    def _encoder(self) -> Iterator[BlockShape]:
        channels = self.first_channels
        for level, multiplier in enumerate(self.channel_multipliers):
            size = self.latent_size >> level
            if level:
                yield BlockShape(channels, channels, size, level, resample="down")
            for _ in range(self.num_blocks):
                out_channels = self.model_channels * multiplier
                yield BlockShape(channels, out_channels, size, level, attention=size in self.attention_resolutions)
                channels = out_channels

    def _decoder(self) -> Iterator[BlockShape]:
        skips = [self.first_channels, *(shape.out_channels for shape in self._encoder())]
        channels = skips[-1]
        last = len(self.channel_multipliers) - 1
        for level in range(last, -1, -1):
            size = self.latent_size >> level
            if level < last:
                yield BlockShape(channels, channels, size, level, resample="up")
            for _ in range(self.num_blocks + 1):
                skip = skips.pop()
                out_channels = self.model_channels * self.channel_multipliers[level]
                attention = size in self.attention_resolutions
                yield BlockShape(channels + skip, out_channels, size, level, attention=attention, skip_channels=skip)
                channels = out_channels

    @property
    def flops_per_sample(self) -> int:
        embedding, area = self.embedding_channels, self.latent_size**2
        time = self.model_channels * embedding + embedding**2
        ends = 9 * area * self.first_channels * (self.input_channels + self.latent_channels)
        if self.num_labels:
            ends += (self.segmentation_size * LABEL_CHANNELS) ** 2
        if self.class_embedding == "projection" and self.num_classes:
            time += self.num_classes * embedding
        return 2 * (time + ends + sum(map(self._multiplications, self.blocks)))

    def _multiplications(self, shape: BlockShape) -> int:
        """Return the multiply-adds of one block."""
        tokens, channels = shape.size**2, shape.out_channels
        if shape.resample and self.resampling == "convolution":
            return 9 * tokens * channels**2
        total = 9 * tokens * channels * (shape.in_channels + channels)
        total += self.embedding_channels * channels * (2 if self.scale_shift_norm else 1)
        if shape.in_channels != channels:
            total += tokens * shape.in_channels * channels
        if shape.attention:
            total += tokens * 4 * channels**2 + 2 * tokens**2 * channels
        return total


@dataclass(frozen=True, kw_only=True, config=VALIDATED)
class UNetOptions(UNetArchitecture, BackboneOptions):
    """Keys of the `model:` section for the ADM U-Net."""

    backbone: Literal["unet"]
    """Name of the network architecture."""

    def build_config(self, base: ModelConfig) -> UNetConfig:
        """Return the configuration of the U-Net for what the latents and the task prescribe."""
        options = {name: value for name, value in asdict(self).items() if name not in ("backbone", "compile")}
        return UNetConfig(**asdict(base), **options)


def num_groups(channels: int) -> int:
    """Return the number of groups of a group norm: 32, or groups of four channels where there are fewer than 128."""
    groups = min(32, channels // 4)
    return groups if channels % groups == 0 else math.gcd(32, channels)
