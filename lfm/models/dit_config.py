"""The configuration of the DiT, and its keys in an experiment."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from lfm.errors import ConfigError
from lfm.models.config import LABEL_CHANNELS, VALIDATED, AttentionBackend, BackboneOptions, ModelConfig, Share

Size = Literal["Ti", "XS", "S", "B", "L", "XL"]

FREQUENCY_SIZE = 256  # channels of the sinusoidal time embedding

# hidden_size, depth, num_heads: S to XL as published by Peebles & Xie 2022; Ti and XS are small enough to train on a CPU
DIT_SIZES: dict[Size, tuple[int, int, int]] = {
    "Ti": (192, 6, 3),
    "XS": (256, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclass(frozen=True, kw_only=True, config=VALIDATED)
class DiTArchitecture:
    """Architecture of a DiT, apart from its size."""

    execution_fields: ClassVar[frozenset[str]] = frozenset({"attention", "activation_checkpointing"})
    training_fields: ClassVar[frozenset[str]] = frozenset({"token_dropout"})

    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of the MLPs, in multiples of `hidden_size`."""
    time_scale: PositiveFloat = 1000.0
    """Factor of the time before its sinusoidal embedding; the paper's code has 1."""
    frequency_shift: Literal[0, 1] = 0
    """Shift of the frequencies of the time embedding; the paper's code has 0, and diffusers' DiT can express 1 only."""
    attention: AttentionBackend = "auto"
    """Library that computes the attention; auto chooses xformers on CUDA if it works there, and torch's own elsewhere."""
    activation_checkpointing: NonNegativeInt = 0
    """Recompute the activations of every n-th block in the backward pass, to save memory; 0 means none, 1 all."""
    position: Literal["sincos", "rope"] = "sincos"
    """Position embedding (beyond the paper): sincos is added to the tokens, rope rotates queries and keys."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization of the tokens (beyond the paper): LayerNorm or RMSNorm, both without weights."""
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """Activation of the MLPs (beyond the paper); relu2 is a squared ReLU, and a SwiGLU MLP has as many parameters as others."""
    qk_norm: bool = False
    """Normalize queries and keys (beyond the paper), which keeps the attention stable in bf16."""
    value_residual: bool = False
    """Mix the values of the first block's attention into those of all others (beyond the paper)."""
    token_dropout: Share = 0.0
    """Share of the tokens that bypass the middle blocks in training (beyond the paper)."""
    internal_head: bool = False
    """Add a second velocity after a third of the blocks (beyond the paper), for flow.internal_weight and internal guidance."""
    latent_head: bool = False
    """Predict the clean latent after a third of the blocks in training (beyond the paper), for flow.latent_weight."""


@dataclass(frozen=True, config=VALIDATED)
class DiTConfig(DiTArchitecture, ModelConfig):
    """Configuration of a `lfm.models.dit.DiT`.

    Raises:
        ConfigError: names the fields that are out of range or contradict each other.
    """

    adaptable_fields: ClassVar[frozenset[str]] = ModelConfig.adaptable_fields | {
        "patch_size",
        "internal_head",
        "latent_head",
    }

    patch_size: Annotated[int, Field(ge=1, le=1024)]
    """Height and width of a patch of latent elements, which becomes one token."""
    hidden_size: Annotated[int, Field(ge=1, le=65_536)]
    """Channels of a token."""
    depth: Annotated[int, Field(ge=1, le=1_000)]
    """Number of blocks."""
    num_heads: Annotated[int, Field(ge=1, le=4_096)]
    """Number of attention heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"`hidden_size` {self.hidden_size}: must be a multiple of `num_heads`, {self.num_heads}")
        if self.hidden_size % 4:
            raise ConfigError(f"`hidden_size` {self.hidden_size}: must be a multiple of 4, for the position embedding")
        if self.latent_size % self.patch_size:
            raise ConfigError(
                f"`latent_size` {self.latent_size}: must be a multiple of `patch_size`, {self.patch_size}"
            )
        if self.position == "rope" and self.head_dim % 4:
            raise ConfigError("`position` rope: `hidden_size` / `num_heads` must be a multiple of 4")

    @property
    def num_tokens(self) -> int:
        """Patches of a latent."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that the middle blocks see while `token_dropout` drops the others; at least 1."""
        return max(1, round(self.num_tokens * (1 - self.token_dropout)))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def middle_blocks(self) -> range:
        """The blocks that dropped tokens bypass: all but two at each end, or a quarter each of fewer than eight."""
        margin = min(2, self.depth // 4)
        return range(margin, self.depth - margin)

    @property
    def num_blocks_with_tokens(self) -> int:
        return self.depth

    @property
    def internal_block(self) -> int:
        """Number of the block after which the second velocity is computed, counted from 0."""
        return max(1, round(self.depth / 3)) - 1

    @property
    def has_internal_velocity(self) -> bool:
        return self.internal_head

    @property
    def has_latent_head(self) -> bool:
        return self.latent_head

    @property
    def mlp_width(self) -> int:
        """Hidden width of an MLP; SwiGLU has three matrices, so two thirds of it, rounded up to a multiple of 8."""
        inner = int(self.hidden_size * self.mlp_ratio)
        return inner if self.mlp != "swiglu" else -(-2 * inner // 24) * 8

    @property
    def flops_per_sample(self) -> int:
        """See `ModelConfig.flops_per_sample`."""
        width, tokens, patch_area = self.hidden_size, self.num_tokens, self.patch_size**2
        mlp = (3 if self.mlp == "swiglu" else 2) * width * self.mlp_width

        def block(tokens: int) -> int:
            return tokens * (4 * width**2 + 2 * tokens * width + mlp) + 6 * width**2

        middle = len(self.middle_blocks)
        blocks = (self.depth - middle) * block(tokens) + middle * block(self.num_kept_tokens)
        patching = tokens * width * patch_area * self.input_channels
        if self.num_labels:
            patching += (self.segmentation_size * LABEL_CHANNELS) ** 2
        time = FREQUENCY_SIZE * width + width**2
        final = tokens * width * patch_area * self.latent_channels + 2 * width**2
        latent_head = self.latent_head * tokens * (width**2 + width * patch_area * self.latent_channels)
        return 2 * (patching + time + blocks + (1 + self.internal_head) * final + latent_head)


@dataclass(frozen=True, kw_only=True, config=VALIDATED)
class DiTOptions(DiTArchitecture, BackboneOptions):
    """Keys of the `model:` section for the DiT: either `size`, or all of hidden_size, depth and num_heads."""

    backbone: Literal["dit"] = "dit"
    """Name of the network architecture."""
    size: Size | None = None
    """Size of the DiT family: S, B, L and XL as published, Ti and XS for a CPU."""
    hidden_size: Annotated[int, Field(ge=1, le=16_384)] | None = None
    """Channels of a token, in place of `size`."""
    depth: Annotated[int, Field(ge=1, le=1_000)] | None = None
    """Number of blocks, in place of `size`."""
    num_heads: Annotated[int, Field(ge=1, le=1_024)] | None = None
    """Number of attention heads, in place of `size`."""
    patch_size: PositiveInt = 2
    """Height and width of a patch of latent elements, which becomes one token."""
    frequency_shift: Literal[0, 1] = 1
    """Shift of the frequencies of the time embedding; the paper's code has 0, and diffusers' DiT can express 1 only."""

    @model_validator(mode="after")
    def _check_size(self) -> DiTOptions:
        if (self.size is None) == (None in (self.hidden_size, self.depth, self.num_heads)):
            raise ValueError("set either size, or all of hidden_size, depth and num_heads")
        return self

    def build_config(self, base: ModelConfig) -> DiTConfig:
        """Return the configuration of the DiT for what the latents and the task prescribe."""
        options = {name: value for name, value in asdict(self).items() if name not in ("backbone", "size", "compile")}
        if self.size is not None:
            options["hidden_size"], options["depth"], options["num_heads"] = DIT_SIZES[self.size]
        return DiTConfig(**asdict(base), **options)
