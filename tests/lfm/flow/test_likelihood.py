"""Tests of likelihoods: against known densities, and the estimate against the exact divergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lfm.errors import ConfigError
from lfm.flow.likelihood import log_likelihood
from lfm.models.dit_config import DiTConfig
from lfm.solvers import Solving
from lfm.types import Condition
from tests.support.models import randomized_dit

MEAN, STD = 0.4, torch.linspace(0.3, 1.8, 8, dtype=torch.float64).view(2, 2, 2)


class OfNormalData(nn.Module):
    """The velocity of the linear path from independent normal values of different standard deviations."""

    def forward(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return slope * (state - (1 - t) * MEAN) - MEAN


def signs(latents: Tensor) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).sign()


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("solving", [Solving("dopri5"), Solving("rk4", num_steps=60)])
def test_the_density_of_normal_values_is_exact(estimator: str, solving: Solving) -> None:
    latents = MEAN + STD * torch.randn(5, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    density = torch.distributions.Normal(MEAN, STD).log_prob(latents).flatten(1).sum(1)
    result = log_likelihood(
        *(OfNormalData(), latents, Condition()),
        solving=solving,
        signs=signs(latents) if estimator == "hutchinson" else None,  # exact too: the derivative is diagonal
    )
    torch.testing.assert_close(result.bits_per_dim, -density / (8 * math.log(2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.noise, (latents - MEAN) / STD, atol=1e-3, rtol=0)
    assert (result.nfe == 240).all() if solving.solver == "rk4" else (result.nfe > 10).all()


def test_hutchinsons_estimate_has_the_exact_mean_and_no_row_depends_on_another() -> None:
    model = randomized_dit(DiTConfig(2, 4, 2, 16, 1, 2, num_classes=3)).double()
    latents = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition, solving = Condition(torch.tensor([0, 2])), Solving("rk4", num_steps=6)
    exact = log_likelihood(model, latents, condition, solving=solving).bits_per_dim
    alone = log_likelihood(model, latents[1:], Condition(torch.tensor([2])), solving=solving).bits_per_dim
    torch.testing.assert_close(alone, exact[1:])
    many, count = latents.repeat(200, 1, 1, 1), 200
    repeated = Condition(torch.tensor([0, 2]).repeat(count))
    estimates = log_likelihood(model, many, repeated, solving=solving, signs=signs(many)).bits_per_dim.view(count, 2)
    error = estimates.std(0) / math.sqrt(count)
    assert (estimates.std(0) > 0).all() and ((estimates.mean(0) - exact).abs() < 4 * error).all()


def test_a_stochastic_solver_is_refused() -> None:
    with pytest.raises(ConfigError, match="`solver` sde: the likelihood needs"):
        log_likelihood(OfNormalData(), torch.zeros(1, 2, 2, 2), Condition(), solving=Solving("sde"))
