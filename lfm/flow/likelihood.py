"""The log-likelihood of latents under the flow, by the instantaneous change of variables (Chen et al. 2018, Eq. 8).

    log p(data) = log N(noise; 0, 1) + integral over t from 0 to 1 of div v(x_t, t) dt,    dx/dt = v, x_0 = data, x_1 = noise
    bits per dimension = -log p / (D log 2)

D, the number of values of a latent. The divergence is exact, by one backward pass for each dimension, or Hutchinson's
estimate e^T (dv/dx) e (Grathwohl et al. 2019), by one with a vector e of random signs, the same along a latent's whole way,
whose mean over e is the divergence. It is the density of latents as the model sees them, drawn and scaled.

The solvers run from time 1 to 0. To them time is 1 - t, the velocity -v, and the integral one more value of the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfm.errors import ConfigError
from lfm.solvers import SOLVERS, Solving
from lfm.types import Condition

ESTIMATORS = ("hutchinson", "exact")


@dataclass(frozen=True)
class Likelihood:
    """What is known of each latent."""

    bits_per_dim: Tensor  # float64 (B,)
    noise: Tensor  # (B, C, h, w): where it came from
    nfe: Tensor  # int64 (B,): network evaluations, each with a backward pass or, if exact, with D


def log_likelihood(
    network: nn.Module,
    latents: Tensor,
    condition: Condition,
    *,
    solving: Solving | None = None,
    signs: Tensor | None = None,
) -> Likelihood:
    """The likelihood of scaled latents (B, C, h, w), float32 or float64, each under its row of the condition.

    `signs` (B, C, h, w), each -1 or 1, for Hutchinson's estimate; without them the divergence is exact. Raises ConfigError
    for a solver of a stochastic equation.
    """
    solving = solving or Solving("dopri5")
    if SOLVERS[solving.solver].stochastic:
        raise ConfigError(f"--solver {solving.solver}: the likelihood needs a solver of the differential equation")
    shape, dimensions = latents.shape[1:], latents[0].numel()
    nfe = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)

    def backwards(state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        nfe[rows] += 1
        with torch.enable_grad():
            point = state[:, :-1].detach().view(-1, *shape).requires_grad_()
            velocity = network(point, 1 - time, condition.rows(rows)).to(point.dtype)
            if signs is None:
                divergence = _exact_divergence(velocity, point)
            else:
                along = signs[rows].to(point)
                (gradient,) = torch.autograd.grad((velocity * along).sum(), point)
                divergence = (gradient * along).flatten(1).sum(1)
        return -torch.cat([velocity.detach().flatten(1), divergence[:, None]], 1)

    start = torch.cat([latents.flatten(1), latents.new_zeros(len(latents), 1)], 1)
    end = solving(backwards, start)
    noise, integral = end[:, :-1], end[:, -1].double()
    log_normal = -(noise.double().square().sum(1) + dimensions * math.log(2 * math.pi)) / 2
    return Likelihood(-(log_normal + integral) / (dimensions * math.log(2)), noise.view(-1, *shape), nfe.cpu())


def _exact_divergence(velocity: Tensor, point: Tensor) -> Tensor:
    flat, total = velocity.flatten(1), torch.zeros(len(velocity), dtype=velocity.dtype, device=velocity.device)
    for index in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, index].sum(), point, retain_graph=True)
        total += gradient.flatten(1)[:, index]
    return total
