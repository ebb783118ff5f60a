"""The protocol of a backbone: a velocity network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lfm.errors import ConfigError
from lfm.models.adaptation import Adaptation
from lfm.models.config import ModelConfig
from lfm.types import Condition


class VelocityNetwork(nn.Module):
    """Base class of all backbones: state, time and condition -> velocity.

    A backbone takes its configuration, a `ModelConfig`, as its only argument, and defines `forward`. It may define
    `compile_blocks`, and `adapt`, the rules by which it starts from weights of another configuration.
    """

    config: ModelConfig
    input_layer: ClassVar[str]
    """Name of the first layer, whose input is the state and the conditions concatenated to it."""

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        condition: Condition,
        kept_tokens: Tensor | None = None,
        return_tokens: tuple[int, ...] = (),
        internal: bool = False,
        latent: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the velocity.

        Args:
            state: (B, C, h, w).
            time: float32 (B,) in [0, 1]; 0 is data, 1 is noise.
            condition: of B samples.
            kept_tokens: int64 (B, config.num_kept_tokens), numbers of the tokens that the middle blocks process in training;
                None, as in sampling, means all. Only a backbone with token dropout takes it.
            return_tokens: numbers of blocks whose output tokens a loss term needs, counted from 0.
            internal: also return the weaker velocity of the early blocks; only where `config.has_internal_velocity`.
            latent: also return the early blocks' prediction of the clean latent; only where `config.has_latent_head`.

        Returns:
            The velocity, float32 (B, C, h, w); with `internal`, `latent` or both, it and these in this order, (n, B, C, h, w).
            With `return_tokens`, a pair of this and a tuple of tokens (B, tokens, hidden), one for each of these blocks in the
            same order; the velocity is bit for bit the same. Tokens that bypass the middle blocks are returned for these
            blocks as they entered them.

        Raises:
            ConfigError: the condition is not one that the model was trained with.
        """
        raise NotImplementedError

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block with torch.compile at its first call; nothing for a backbone without equal blocks.

        Args:
            options: of `torch.compile`, such as `backend`.
        """

    def hidden_matrices(self) -> dict[str, int]:
        """Return the names of the weight matrices between hidden features, which the Muon optimizer may update.

        With each name comes the number of matrices that are stacked in the rows of the weight. A backbone without any
        cannot be trained with Muon.
        """
        return {}

    @staticmethod
    def adapt(adaptation: Adaptation) -> None:
        """Set those weights that differ between the network and the source of its first weights, each by a rule.

        Raises:
            CheckpointError: there is no rule for a difference.
        """

    def scale_for_width(self, reference_width: int) -> dict[str, float]:
        """Scale the new weights so that a learning rate that was found at the reference width serves this width (muP).

        Returns:
            The factor of the learning rate of parameters by name; of others it is 1. Empty for a backbone without a width.
        """
        return {}

    @property
    def num_parameters(self) -> int:
        """Number of trainable and fixed weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def check_inputs(self, state: Tensor, condition: Condition) -> None:
        """Raise ConfigError if the model does not take `condition`, or needs a condition that is missing."""
        config = self.config
        assert state.shape[1:] == config.latent_shape, f"state {tuple(state.shape[1:])}, not {config.latent_shape}"
        if condition.class_index is None and config.num_classes is not None:
            raise ConfigError(f"the model was trained with {config.num_classes} classes: set `class_index`")
        if condition.class_index is not None and config.num_classes is None:
            raise ConfigError("the model was trained without classes: leave out `class_index`")
        channels = 0 if condition.spatial is None else condition.spatial.shape[1]
        if channels != config.condition_channels:
            raise ConfigError(
                f"the model takes {config.condition_channels} channels of spatial condition (`condition_channels`), "
                f"not {channels}"
            )
        size = 0 if condition.segmentation is None else condition.segmentation.shape[-1]
        if size != config.segmentation_size:
            raise ConfigError(
                f"the model takes segmentation maps of {config.segmentation_size} pixels (0: takes none), not {size}"
            )
