"""The log-likelihood of latents under the flow, by the instantaneous change of variables (Chen et al. 2018, Eq. 8).

    log p(data) = log N(noise; 0, 1) + integral over t from 0 to 1 of div v(x_t, t) dt,    dx/dt = v, x_0 = data, x_1 = noise
    bits per dimension = -log p / (D log 2)

D is the number of values of a latent. The divergence is exact, by one backward pass for each dimension, or Hutchinson's
estimate e^T (dv/dx) e (Grathwohl et al. 2019), by one backward pass with a vector e of random signs, which stays the same
along a trajectory. Its mean over e is the divergence. The density is that of latents as the model is trained on them:
drawn from the posterior and scaled.

The solvers run from time 1 to 0, so they receive the time 1 - t and the velocity -v, and the integral is one more value
of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.flow.guidance import Network
from lfm.solvers import SOLVERS, Solving
from lfm.types import Condition

ESTIMATORS = ("hutchinson", "exact")


@dataclass(frozen=True)
class Likelihood:
    """Likelihoods of a batch of latents."""

    bits_per_dim: Tensor  # float64 (B,)
    noise: Tensor  # (B, C, h, w): the end of each trajectory, at time 1
    nfe: Tensor  # int64 (B,): network evaluations, each with one backward pass, or D of them if exact


def log_likelihood(
    network: Network,
    latents: Tensor,
    condition: Condition,
    *,
    solving: Solving | None = None,
    signs: Tensor | None = None,
) -> Likelihood:
    """Compute the likelihood of latents, each under its row of the condition.

    Args:
        network: the velocity network.
        latents: scaled, float32 or float64 (B, C, h, w).
        condition: of B images.
        solving: solver and its options; dopri5 by default.
        signs: (B, C, h, w) of -1 and 1 for Hutchinson's estimate; without them the divergence is exact.

    Raises:
        ConfigError: the solver is of a stochastic equation.
        LfmError: the solver fails.
    """
    solving = solving or Solving("dopri5")
    if SOLVERS[solving.solver].is_stochastic:
        raise ConfigError(f"`solver` {solving.solver}: the likelihood needs a solver of the differential equation")
    shape, dimensions = latents.shape[1:], latents[0].numel()
    nfe = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)

    def reversed_velocity(state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        nfe[rows] += 1
        with torch.enable_grad():
            point = state[:, :-1].detach().view(-1, *shape).requires_grad_()  # (A, C, h, w)
            velocity = network(point, 1 - time, condition.rows(rows)).to(point.dtype)  # (A, C, h, w)
            if signs is None:
                divergence = _exact_divergence(velocity, point)  # (A,)
            else:
                divergence = _estimated_divergence(velocity, point, signs[rows].to(point))  # (A,)
        return -torch.cat([velocity.detach().flatten(1), divergence[:, None]], 1)  # (A, D + 1)

    start = torch.cat([latents.flatten(1), latents.new_zeros(len(latents), 1)], 1)  # (B, D + 1)
    end = solving(reversed_velocity, start)  # (B, D + 1)
    noise, integral = end[:, :-1], end[:, -1].double()
    log_normal = -(noise.double().square().sum(1) + dimensions * math.log(2 * math.pi)) / 2  # (B,)
    return Likelihood(-(log_normal + integral) / (dimensions * math.log(2)), noise.view(-1, *shape), nfe.cpu())


def _estimated_divergence(velocity: Tensor, point: Tensor, signs: Tensor) -> Tensor:
    """Return Hutchinson's estimate of the divergence of each row (B,)."""
    (gradient,) = torch.autograd.grad((velocity * signs).sum(), point)
    return (gradient * signs).flatten(1).sum(1)


def _exact_divergence(velocity: Tensor, point: Tensor) -> Tensor:
    """Return the divergence of each row (B,)."""
    flat, total = velocity.flatten(1), torch.zeros(len(velocity), dtype=velocity.dtype, device=velocity.device)
    for index in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, index].sum(), point, retain_graph=True)
        total += gradient.flatten(1)[:, index]
    return total
