"""The training loss: a weighted sum of named terms, all computed from one forward pass of the network.

    loss         = mean over the samples of the sum over the terms of weight * term

    velocity     mean over C, h, w of (predicted - velocity)^2
    direction    mean over h, w of (1 - cosine over C of predicted and velocity)      FasterDiT, Yao et al. 2024
    internal     mean over C, h, w of (internal - velocity)^2, of the velocity of the early blocks      arXiv 2512.24176
    latent       mean over C, h, w of the smooth L1 error of the clean latent, predicted by the early blocks      SRA 2, Wang
                 et al. 2026, arXiv 2601.17830
    layer_sync   1 - mean over the tokens of the cosine of an early block's token with a later block's, which has no
                 gradient      LayerSync, Haghighi et al. 2025

To add a term, write a function of `LossInputs` and a line in `LOSS_TERMS`, and give it a weight in `training_loss` of
`pipelines.common.factory`, from a key of the `flow:` section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from lfm.flow.path import SIGMA_MIN, direction_error, path_sample, squared_error
from lfm.types import LatentBatch


@dataclass(frozen=True)
class LossInputs:
    """The values of one forward pass that a term may use, for B samples; float32 except for the tokens."""

    data: Tensor  # (B, C, h, w), clean latents
    noise: Tensor  # (B, C, h, w)
    time: Tensor  # (B,) in [0, 1]
    velocity: Tensor  # (B, C, h, w), the target
    predicted: Tensor  # (B, C, h, w), the network's velocity
    internal: Tensor | None = None  # (B, C, h, w), the velocity of its early blocks, if a term asks for it
    latent: Tensor | None = None  # (B, C, h, w), the clean latent that its early blocks predict, if a term asks for it
    tokens: tuple[
        Tensor, ...
    ] = ()  # each (B, tokens, hidden): outputs of the blocks that the term asks for, in its order


def velocity_term(inputs: LossInputs) -> Tensor:
    """Return the mean squared error of the velocity of each sample, float32 (B,)."""
    return squared_error(inputs.predicted, inputs.velocity)


def direction_term(inputs: LossInputs) -> Tensor:
    """Return 1 - the mean cosine between predicted and target velocity of each sample, float32 (B,) in [0, 2]."""
    return direction_error(inputs.predicted, inputs.velocity)


def internal_term(inputs: LossInputs) -> Tensor:
    """Return the mean squared error of the velocity of the early blocks of each sample, float32 (B,)."""
    assert inputs.internal is not None, "the term needs it"
    return squared_error(inputs.internal, inputs.velocity)


def latent_term(inputs: LossInputs) -> Tensor:
    """Return the mean smooth L1 error of the clean latent that the early blocks predict of each sample, float32 (B,)."""
    assert inputs.latent is not None, "the term needs it"
    return smooth_l1_loss(inputs.latent, inputs.data, reduction="none").flatten(1).mean(1)


def layer_sync_term(inputs: LossInputs) -> Tensor:
    """Return 1 - the mean cosine between an early block's tokens and a later block's of each sample, float32 (B,) in [0, 2].

    Only the early block is moved towards the later one.
    """
    early, late = (tokens.float() for tokens in inputs.tokens)  # two of (B, tokens, hidden)
    return 1 - cosine_similarity(early, late.detach(), -1).mean(-1)


LOSS_TERMS: Mapping[str, Callable[[LossInputs], Tensor]] = MappingProxyType(
    {
        "velocity": velocity_term,
        "direction": direction_term,
        "internal": internal_term,
        "latent": latent_term,
        "layer_sync": layer_sync_term,
    }
)


@dataclass(frozen=True)
class LossTerm:
    """A term of a training loss, with its weight."""

    name: str
    """Key of `LOSS_TERMS`."""
    weight: float = 1.0
    """Factor of the term; a term of weight 0 is not computed."""
    token_blocks: tuple[int, ...] = ()
    """Numbers of the blocks whose output tokens the term needs, counted from 0."""
    needs_internal: bool = False
    """Whether the term needs the velocity of the early blocks."""
    needs_latent: bool = False
    """Whether the term needs the clean latent that the early blocks predict."""


class TrainingLoss:
    """The weighted sum of loss terms over one forward pass.

    Args:
        terms: terms with different names.
        sigma_min: standard deviation of the noise at time 0 of the probability path.
    """

    def __init__(self, terms: Sequence[LossTerm], sigma_min: float = SIGMA_MIN) -> None:
        self.terms = tuple(term for term in terms if term.weight)
        self.sigma_min = sigma_min
        self.token_blocks = tuple(sorted({block for term in self.terms for block in term.token_blocks}))
        self.needs_internal = any(term.needs_internal for term in self.terms)
        self.needs_latent = any(term.needs_latent for term in self.terms)

    def __call__(
        self, network: Callable[..., Any], batch: LatentBatch, time: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch at times (B,).

        Args:
            network: called as a `lfm.models.network.VelocityNetwork`; returns tokens only if a term asks for them.
            batch: clean latents with their noise and conditions.
            time: float32 (B,) in [0, 1].

        Returns:
            The loss, a float32 scalar with gradients; and the mean of each term over the batch by its name, without its
            weight and without gradients.
        """
        example = path_sample(batch.latents, batch.noise, time, self.sigma_min)
        arguments: tuple[Any, ...] = (example.state, example.time, batch.condition, batch.kept_tokens)
        if self.needs_internal or self.needs_latent:
            arguments = (*arguments, self.token_blocks, self.needs_internal, self.needs_latent)
        elif self.token_blocks:
            arguments = (*arguments, self.token_blocks)
        predicted, tokens = network(*arguments) if self.token_blocks else (network(*arguments), ())
        internal = latent = None
        if self.needs_internal or self.needs_latent:
            predicted, *heads = predicted.unbind(0)
            internal = heads[0] if self.needs_internal else None
            latent = heads[-1] if self.needs_latent else None
        tokens_of = dict(zip(self.token_blocks, tokens, strict=True))
        inputs = LossInputs(batch.latents, batch.noise, example.time, example.velocity, predicted, internal, latent)
        losses, means = torch.zeros_like(example.time), {}
        for term in self.terms:
            errors = LOSS_TERMS[term.name](
                replace(inputs, tokens=tuple(tokens_of[block] for block in term.token_blocks))
            )
            losses = losses + term.weight * errors  # (B,)
            means[term.name] = errors.detach().mean()
        return losses.mean(), means
