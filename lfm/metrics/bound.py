"""The paper's bound on the distance between data and what is generated, term by term (after Dao et al. 2023).

    W(p, p^) <= R + L_g W(q, q^)                             R^2 = E |x - g(z)|^2
    W(q, q^)^2 <= e^(1 + 2L) int_0^1 e(t) dt                 e(t) = E |v(z_t, t) - v^(z_t, t)|^2           ("paper")
    W(q, q^) <= int_0^1 exp(int_0^t L(s) ds) e(t)^1/2 dt                                                   ("by time")

W, the Wasserstein-2 distance; p, images x, and q, their latents z drawn from the encoder's posterior; p^ and q^, what the
model generates; g, the decoder, of Lipschitz constant L_g; v, the true marginal velocity, and v^, the network's, of Lipschitz
constant L(t) at time t, L the largest. Both lines on q^ are Gronwall's inequality along the two flows, from t = 1 to 0
(Albergo & Vanden-Eijnden 2023, proposition 3, with time reversed); the second keeps L and e at each time together, and is
the smaller where they vary. The first line is the triangle inequality, so that the terms add up; the paper adds their squares.

What can be estimated:  R, without bias. e(t), from above: the flow-matching objective is e(t) and the variance of the
velocity given the state, which no network can predict. Lipschitz constants, from below alone: the largest singular value of
the Jacobian at the points that were looked at. So a number here is no proof; it is what the theorem gives for the network
if it is nowhere steeper. Lengths are Euclidean, over all pixels in [-1, 1] or all entries of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_STEP = 1e-3  # of a difference quotient, relative to the length of the point
_RESAMPLES = 200


@dataclass(frozen=True)
class Estimate:
    """A number from a sample, with its standard error and which way it errs beyond that."""

    value: float
    standard_error: float
    kind: Literal["unbiased", "lower", "upper"]


def root_mean(squares: Tensor, kind: Literal["unbiased", "upper"] = "unbiased") -> Estimate:
    """The root of the mean of squares (N,)."""
    mean, error = float(squares.double().mean()), float(squares.double().std()) / math.sqrt(len(squares))
    return Estimate(math.sqrt(mean), error / (2 * math.sqrt(mean)) if mean else 0.0, kind)


def largest(values: Tensor) -> Estimate:
    """The largest of values (N,), a lower estimate of what it might be elsewhere; its error by the bootstrap."""
    found = values.double().cpu().numpy()
    picks = np.random.Generator(np.random.Philox(key=0)).integers(0, len(found), (_RESAMPLES, len(found)))
    return Estimate(float(found.max()), float(found[picks].max(1).std()), "lower")


def steepness(function: Callable[[Tensor], Tensor], points: Tensor, num_iterations: int = 20) -> Tensor:
    """The largest singular value of a function's Jacobian J at points (B, ...), float64 (B,), from below.

    By power iteration on J^T J: J d as a difference quotient, J^T u by one backward pass, so that the function needs no
    second derivatives. It must treat the rows of a batch apart from each other.
    """
    direction = _unit(torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).to(points))
    step = _STEP * _length(points).clamp(min=1)
    along = torch.zeros_like(points)
    for _ in range(num_iterations):
        with torch.no_grad():
            along = function(points + step * direction) - function(points - step * direction)
            along = along / (2 * step.view(-1, *[1] * (along.ndim - 1)))
        at = points.detach().requires_grad_()
        (back,) = torch.autograd.grad(function(at), at, _unit(along))
        direction = _unit(back)
    return along.double().flatten(1).norm(dim=1)


def _length(values: Tensor) -> Tensor:
    """The Euclidean length of each row (B, ...), in the shape (B, 1, ...)."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1))


def _unit(values: Tensor) -> Tensor:
    return values / _length(values).clamp(min=1e-30)


@dataclass(frozen=True)
class Bound:
    """The terms, and what they come to; the times stand for equal parts of [0, 1], in order."""

    reconstruction: Estimate  # R
    decoder: Estimate  # L_g
    velocity: tuple[Estimate, ...]  # L(t)
    error: tuple[Estimate, ...]  # e(t)^1/2

    @property
    def paper(self) -> float:
        """The bound with the largest L; infinite where that overflows."""
        steepest = max(estimate.value for estimate in self.velocity)
        mean = sum(estimate.value**2 for estimate in self.error) / len(self.error)
        return self.reconstruction.value + self.decoder.value * _exp(0.5 + steepest) * math.sqrt(mean)

    @property
    def by_time(self) -> float:
        """The bound with L(t) at each time; L counts up to the end of each part, so that it stays a bound."""
        share, growth, total = 1 / len(self.error), 0.0, 0.0
        for velocity, error in zip(self.velocity, self.error, strict=True):
            growth += velocity.value * share
            total += _exp(growth) * error.value * share
        return self.reconstruction.value + self.decoder.value * total


def _exp(exponent: float) -> float:
    """Infinite where it overflows."""
    return float(torch.tensor(exponent, dtype=torch.float64).exp())


def estimate(
    squared_reconstruction: Tensor,
    decoder_steepness: Tensor,
    squared_errors: Sequence[Tensor],
    velocity_steepness: Sequence[Tensor],
) -> Bound:
    """The bound from what was found on each sample (N,); the last two for each part of [0, 1], in order."""
    return Bound(
        root_mean(squared_reconstruction),
        largest(decoder_steepness),
        tuple(largest(values) for values in velocity_steepness),
        tuple(root_mean(values, "upper") for values in squared_errors),
    )
