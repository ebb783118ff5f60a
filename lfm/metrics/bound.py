"""The bound on the distance between real and generated images of Dao et al. 2023, term by term.

    W(p, p^) <= R + L_g W(q, q^)                             R^2 = E |x - g(z)|^2
    W(q, q^)^2 <= e^(1 + 2L) int_0^1 e(t) dt                 e(t) = E |v(z_t, t) - v^(z_t, t)|^2           ("paper")
    W(q, q^) <= int_0^1 exp(int_0^t L(s) ds) e(t)^1/2 dt                                                   ("by time")

W is the Wasserstein-2 distance. p are images x, and q their latents z, drawn from the encoder's posterior; p^ and q^ are
what the model generates. g is the decoder, with Lipschitz constant L_g. v is the true marginal velocity and v^ the
network's, with Lipschitz constant L(t) at time t and largest L. Both lines on q^ apply Gronwall's inequality along the two
flows, from t = 1 to 0 (Albergo & Vanden-Eijnden 2023, proposition 3, with time reversed). The second keeps L and e at each
time together and is smaller where they vary. The first line is the triangle inequality, so that the terms add up; the paper
adds their squares.

Estimates: R is estimated without bias. e(t) is estimated from above, because the flow-matching objective is e(t) plus the
variance of the velocity given the state, which no network can predict. Lipschitz constants are estimated from below, as the
largest singular value of the Jacobian at sampled points. The result is therefore no proof, but what the theorem gives if the
network is nowhere steeper than at those points. Lengths are Euclidean, over all pixels in [-1, 1] or all entries of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_STEP = 1e-3  # step of the difference quotient, relative to the length of the point
_NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Estimate:
    """An estimate from samples with its standard error; `kind` says whether it estimates from below or above."""

    value: float
    standard_error: float
    kind: Literal["unbiased", "lower", "upper"]


def root_mean(squares: Tensor, kind: Literal["unbiased", "upper"] = "unbiased") -> Estimate:
    """Return the root of the mean of `squares` (N,)."""
    mean, error = float(squares.double().mean()), float(squares.double().std()) / math.sqrt(len(squares))
    return Estimate(math.sqrt(mean), error / (2 * math.sqrt(mean)) if mean else 0.0, kind)


def largest(values: Tensor) -> Estimate:
    """Return the maximum of `values` (N,), an estimate of a supremum from below; standard error by the bootstrap."""
    array = values.double().cpu().numpy()
    picks = np.random.Generator(np.random.Philox(key=0)).integers(0, len(array), (_NUM_RESAMPLES, len(array)))
    return Estimate(float(array.max()), float(array[picks].max(1).std()), "lower")


def steepness(function: Callable[[Tensor], Tensor], points: Tensor, num_iterations: int = 20) -> Tensor:
    """Return the largest singular value of the Jacobian J of `function` at `points` (B, ...), float64 (B,), from below.

    Power iteration on J^T J: J d is a difference quotient and J^T u one backward pass, so that no second derivatives are
    needed. `function` must treat the rows of a batch independently.
    """
    direction = _unit(torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).to(points))
    step = _STEP * _length(points).clamp(min=1)
    product = torch.zeros_like(points)
    for _ in range(num_iterations):
        with torch.no_grad():
            product = function(points + step * direction) - function(points - step * direction)
            product = product / (2 * step.view(-1, *[1] * (product.ndim - 1)))
        variable = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(variable), variable, _unit(product))
        direction = _unit(gradient)
    return product.double().flatten(1).norm(dim=1)


def _length(values: Tensor) -> Tensor:
    """Return the Euclidean length of each row of `values` (B, ...), with shape (B, 1, ...)."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1))


def _unit(values: Tensor) -> Tensor:
    return values / _length(values).clamp(min=1e-30)


@dataclass(frozen=True)
class Bound:
    """The terms of the bound. Entries of `velocity` and `error` belong to equal parts of [0, 1], in order of time."""

    reconstruction: Estimate  # R
    decoder: Estimate  # L_g
    velocity: tuple[Estimate, ...]  # L(t)
    error: tuple[Estimate, ...]  # e(t)^1/2

    @property
    def paper(self) -> float:
        """The bound with the largest L; infinite if it overflows."""
        steepest = max(estimate.value for estimate in self.velocity)
        mean = sum(estimate.value**2 for estimate in self.error) / len(self.error)
        return self.reconstruction.value + self.decoder.value * _exp(0.5 + steepest) * math.sqrt(mean)

    @property
    def by_time(self) -> float:
        """The bound with L(t) at each time. L is integrated up to the end of each part, so that it remains a bound."""
        share, growth, total = 1 / len(self.error), 0.0, 0.0
        for velocity, error in zip(self.velocity, self.error, strict=True):
            growth += velocity.value * share
            total += _exp(growth) * error.value * share
        return self.reconstruction.value + self.decoder.value * total


def _exp(exponent: float) -> float:
    """Return e^exponent, infinite if it overflows."""
    return float(torch.tensor(exponent, dtype=torch.float64).exp())


def estimate(
    squared_reconstruction: Tensor,
    decoder_steepness: Tensor,
    squared_errors: Sequence[Tensor],
    velocity_steepness: Sequence[Tensor],
) -> Bound:
    """Return the bound from values of each sample (N,); the last two have an entry for each part of [0, 1], in order."""
    return Bound(
        root_mean(squared_reconstruction),
        largest(decoder_steepness),
        tuple(largest(values) for values in velocity_steepness),
        tuple(root_mean(values, "upper") for values in squared_errors),
    )
