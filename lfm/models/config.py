"""The configuration that every backbone has.

`ModelConfig` holds what the latents and the task prescribe. A backbone adds a subclass of it with its architecture, and a
subclass of `BackboneOptions` with the keys of the `model:` section of an experiment; see `lfm.models.dit_config`. These
modules import no torch.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lfm.errors import ConfigError

LABEL_CHANNELS = 8  # channels of an embedded segmentation map

AttentionBackend = Literal["auto", "xformers", "sdpa"]
"""Library that computes the attention; auto is xformers on CUDA if it works there, else sdpa, which is torch's own."""
Share = Annotated[float, Field(ge=0, lt=1)]

VALIDATED = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, config=VALIDATED)
class ModelConfig:
    """What the latents and the task prescribe to any backbone.

    Raises:
        ConfigError: names the fields that are out of range or contradict each other.
    """

    execution_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how fast the network computes and with how much memory, and nothing else."""
    training_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change the network in training, but not the velocity of trained weights."""
    adaptable_fields: ClassVar[frozenset[str]] = frozenset(
        {"latent_size", "num_classes", "condition_dropout", "condition_channels", "num_labels", "downsample_factor"}
    )
    """Fields in which the network may differ from that whose weights it starts from; see `lfm.models.adaptation`."""

    latent_channels: Annotated[int, Field(ge=1, le=1024)]
    latent_size: Annotated[int, Field(ge=1, le=16_384)]
    """Height and width of a latent."""
    _: KW_ONLY
    num_classes: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Number of classes; None for a model without class condition."""
    condition_dropout: Share = 0.0
    """Share of training samples whose condition is replaced by the null condition; 0 means no null condition."""
    condition_channels: Annotated[int, Field(ge=0, le=4096)] = 0
    """Channels of `Condition.spatial`."""
    num_labels: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Number of class ids in segmentation maps; None for a model without segmentation condition."""
    downsample_factor: Annotated[int, Field(ge=1, le=1024)] = 8
    """Pixels per latent element along each side."""

    def __post_init__(self) -> None:
        if self.condition_dropout and not self.is_conditional:
            raise ConfigError(
                f"`condition_dropout` {self.condition_dropout}: needs a condition, such as `num_classes`; set one, or "
                "`condition_dropout` to 0"
            )

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, handler: Any) -> Any:
        """Describe the first field that is out of range in one line."""
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            value = "" if first["type"] == "missing" else f" {first['input']}"
            raise ConfigError(f"`{first['loc'][0]}`{value}: {first['msg'].lower()}") from error

    def structure(self) -> dict[str, Any]:
        """Return by name what must be equal in two networks, if the weights of one are to be adapted to the other."""
        free = self.execution_fields | self.training_fields | self.adaptable_fields
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of a latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def is_conditional(self) -> bool:
        """Whether the model takes any condition."""
        return self.num_classes is not None or self.condition_channels > 0 or self.num_labels is not None

    @property
    def has_null_condition(self) -> bool:
        """Whether the model was trained with condition dropout, which classifier-free guidance needs."""
        return self.condition_dropout > 0

    @property
    def num_blocks_with_tokens(self) -> int:
        """Number of blocks whose output tokens a loss term may use; 0 for a backbone without tokens."""
        return 0

    @property
    def has_internal_velocity(self) -> bool:
        """Whether the network has a second, weaker velocity from its early blocks, for internal guidance."""
        return False

    @property
    def has_latent_head(self) -> bool:
        """Whether the network predicts the clean latent from its early blocks in training."""
        return False

    @property
    def input_channels(self) -> int:
        """Channels of the state and the conditions concatenated to it."""
        return self.latent_channels + self.condition_channels + (LABEL_CHANNELS if self.num_labels else 0)

    @property
    def segmentation_size(self) -> int:
        """Height and width in pixels of the segmentation maps; 0 for a model that takes none."""
        return 0 if self.num_labels is None else self.latent_size * self.downsample_factor

    @property
    def num_tokens(self) -> int:
        """Tokens of a latent; 0 for a backbone without tokens."""
        return 0

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that the middle blocks process in training; all of them without token dropout."""
        return self.num_tokens

    @property
    def flops_per_sample(self) -> int | None:
        """Floating-point operations of one forward pass for one latent in training, or None if there is no formula.

        Counts the matrix products only, two operations per multiply-add.
        """
        return None


@dataclass(frozen=True, kw_only=True, config=VALIDATED)
class BackboneOptions:
    """Keys of the `model:` section of an experiment that every backbone has."""

    execution_fields: ClassVar[frozenset[str]] = frozenset()
    """Keys that change how fast the network computes and with how much memory, and nothing else; besides `compile`."""

    backbone: str
    """Name of the network architecture."""
    compile: bool | None = None
    """Compile each block with torch.compile; by default on a GPU, if there is a C compiler."""

    def build_config(self, base: ModelConfig) -> ModelConfig:
        """Return the full configuration of the network for what the latents and the task prescribe.

        Raises:
            ConfigError: the options do not fit `base`.
        """
        raise NotImplementedError
