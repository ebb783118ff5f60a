"""Solvers of another kind than Runge-Kutta's with steps by row.

Adams-Bashforth of order 2, on any grid, with one evaluation a step; its first step is Euler's (Hairer, Norsett & Wanner,
section III.5):

    x' = x + h ((1 + r/2) v_n - r/2 v_(n-1)),    r = h / (the step before)

Euler-Maruyama for the stochastic equation whose marginals are those of the flow (Ma et al. 2024, Eq. 4; Song et al. 2021),
from time 1 to 0, h < 0, with z standard normal:

    x' = x + h (v + n) + sqrt(2 t |h|) z,    n = x + (1 - t) v, the noise that the network sees in x

because the score is -n / sigma_t, sigma_t the spread of the noise in x; a diffusion of g^2 = 2 sigma_t, here t but for
sigma_min, makes the drift finite at both ends.

torchdiffeq's control, with which the paper's numbers were made: one step for the whole batch, whose error is the root mean
square over all rows, so that an image depends on its company.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from lfm.solvers.batching import StepCallback, by_row, column, no_callback, require_finite
from lfm.types import Velocity

Normals = Callable[[int], Tensor]  # the normals (B, ...) of a step, counted from 0


def adams_bashforth(velocity: Velocity, noise: Tensor, *, times: Tensor, on_step: StepCallback = no_callback) -> Tensor:
    """Latents (B, ...) over each interval of `times` (N + 1,), which decrease from 1 to 0, by N evaluations."""
    rows, state = torch.arange(len(noise), device=noise.device), noise
    before, step_before = torch.zeros_like(noise), torch.ones(len(noise), device=noise.device)
    for number, (time, following) in enumerate(pairwise(by_row(times, noise))):
        slope, step = velocity(state, time.to(state.dtype), rows), following - time
        ratio = column(step / step_before, state) if number else 0.0
        state = state + column(step, state) * ((1 + ratio / 2) * slope - ratio / 2 * before)
        before, step_before = slope, step
        require_finite(state, time, rows)
        on_step(following, state, rows)
    return state


def euler_maruyama(
    velocity: Velocity, noise: Tensor, *, times: Tensor, normals: Normals, on_step: StepCallback = no_callback
) -> Tensor:
    """Latents (B, ...) over each interval of `times` (N + 1,), which decrease from 1 to 0, by N evaluations."""
    rows, state = torch.arange(len(noise), device=noise.device), noise
    for number, (time, following) in enumerate(pairwise(by_row(times, noise))):
        slope, step = velocity(state, time.to(state.dtype), rows), following - time
        seen = state + column(1 - time, state) * slope
        spread = column((-2 * time * step).sqrt(), state)
        state = state + column(step, state) * (slope + seen) + spread * normals(number).to(state)
        require_finite(state, time, rows)
        on_step(following, state, rows)
    return state


def coupled(method: str, velocity: Velocity, noise: Tensor, *, atol: float, rtol: float) -> Tensor:
    """Latents (B, ...) by torchdiffeq's `method`, one step for all rows."""
    rows = torch.arange(len(noise), device=noise.device)
    ends = torch.tensor([1.0, 0.0], dtype=noise.dtype, device=noise.device)
    return odeint(lambda t, x: velocity(x, t.expand(len(x)), rows), noise, ends, method=method, atol=atol, rtol=rtol)[1]
