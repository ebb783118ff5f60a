"""Tests of the bound on a case whose distance has a closed form: Gaussian data and a linear decoder.

The model is the exact velocity field of a Gaussian with other parameters, so it generates that Gaussian exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm.flow.path import SIGMA_MIN, path_sample
from lfm.metrics.bound import Bound, estimate, largest, root_mean, steepness
from lfm.metrics.frechet import Gaussian, frechet_distance

LATENT, PIXELS, PARTS, SAMPLES = 3, 5, 20, 8_000


def field(mean: Tensor, std: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity E[noise (1 - s) - data | state] of data N(mean, diag std^2), at state (B, D) and time (B,)."""

    def velocity(state: Tensor, time: Tensor) -> Tensor:
        signal = 1 - time[:, None]
        spread = SIGMA_MIN + (1 - SIGMA_MIN) * time[:, None]
        residual = (state - signal * mean) / ((signal * std) ** 2 + spread**2)
        return (1 - SIGMA_MIN) * spread * residual - (mean + signal * std**2 * residual)

    return velocity


class Case:
    """Images x = A z + b + r with the decoder A z + b; r is orthogonal to the columns of A."""

    def __init__(self, shift: float, stretch: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.matrix, self.offset = normal(PIXELS, LATENT), normal(PIXELS)
        self.outside = torch.linalg.svd(self.matrix).U[:, LATENT:] * 0.3
        self.mean, self.std = normal(LATENT), 0.5 + normal(LATENT).abs()
        self.wrong_mean, self.wrong_std = self.mean + shift, self.std * stretch
        self.latents = self.mean + self.std * normal(SAMPLES, LATENT)
        self.rest = normal(SAMPLES, PIXELS - LATENT) @ self.outside.T
        self.noise, uniform = normal(SAMPLES, LATENT), torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
        self.time = (torch.arange(SAMPLES) % PARTS + uniform) / PARTS

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.matrix.T + self.offset

    @property
    def distance(self) -> float:
        """The Wasserstein distance between real and generated images, which are both Gaussian."""
        spread = self.matrix * self.std
        generated = self.matrix * (self.wrong_std**2 + SIGMA_MIN**2).sqrt()
        return math.sqrt(
            frechet_distance(
                Gaussian(self.decode(self.mean), spread @ spread.T + self.outside @ self.outside.T, None),
                Gaussian(self.decode(self.wrong_mean), generated @ generated.T, None),
            )
        )

    def bound(self, target: str) -> Bound:
        """Return the bound of errors against the velocity of the flow-matching objective, or against the true velocity."""
        example = path_sample(self.latents, self.noise, self.time)
        state, time = example.state.double(), example.time.double()
        model = field(self.wrong_mean, self.wrong_std)
        true = example.velocity if target == "objective" else field(self.mean, self.std)(state, time)
        errors = (model(state, time) - true).square().sum(1)
        parts = [torch.arange(number, SAMPLES, PARTS) for number in range(PARTS)]
        few = [part[:8] for part in parts]
        return estimate(
            self.rest.square().sum(1),
            steepness(self.decode, self.latents[:4]),
            [errors[part] for part in parts],
            [steepness(lambda x, p=part: model(x, time[p]), state[part]) for part in few],  # type: ignore[misc]
        )


@settings(max_examples=5, deadline=None)
@given(st.floats(-1, 1), st.floats(0.6, 1.6))
def test_the_bound_exceeds_the_distance(shift: float, stretch: float) -> None:
    case = Case(shift, stretch)
    true, objective = case.bound("true"), case.bound("objective")
    assert case.distance <= true.by_time * (1 + 1e-2), "errors against the true velocity suffice"
    assert case.distance <= true.paper
    for one, other in zip(true.error, objective.error, strict=True):
        assert one.value <= other.value + 4 * other.standard_error, "the objective is above the error"
    assert true.by_time <= true.paper


def test_the_terms_have_their_closed_forms() -> None:
    case = Case(0.3, 1.2)
    bound = case.bound("true")
    expected = math.sqrt(2 * 0.3**2)
    assert bound.reconstruction.value == pytest.approx(expected, abs=4 * bound.reconstruction.standard_error)
    assert bound.reconstruction.standard_error < 0.02
    assert bound.decoder.value == pytest.approx(float(torch.linalg.svdvals(case.matrix)[0]), rel=1e-4)
    slope = ((case.wrong_std**2 - 1) / (case.wrong_std**2 + 1)).abs()  # at t = 1/2 the slope is (1 - s^2) / (1 + s^2)
    assert bound.velocity[PARTS // 2].value == pytest.approx(2 * float(slope.max()), rel=0.2)


def test_the_bound_of_a_perfect_model_is_the_reconstruction_error() -> None:
    bound = Case(0.0, 1.0).bound("true")
    assert bound.by_time == pytest.approx(bound.reconstruction.value, rel=1e-4)


def test_steepness_is_the_largest_singular_value_at_each_point() -> None:
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = torch.stack([torch.zeros(5), torch.full((5,), 9.0)]).double()
    values = steepness(lambda x: torch.tanh(x) @ matrix.T, points)
    assert values[0] == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-3)
    assert values[1] < 1e-5, "tanh is saturated"


def test_standard_errors_shrink_with_the_root_of_the_count() -> None:
    squares = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    few, many = root_mean(squares[:100]), root_mean(squares)
    assert many.standard_error == pytest.approx(few.standard_error / 10, rel=0.3)
    assert many.value == pytest.approx(math.sqrt(0.5), abs=4 * many.standard_error)
    assert largest(squares).value == float(squares.max())
    assert largest(torch.ones(5)).standard_error == 0
