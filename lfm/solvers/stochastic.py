"""Euler-Maruyama for the stochastic equation with the marginals of the flow (Ma et al. 2024, Eq. 4; Song et al. 2021).

    x' = x + h (v + n) + sqrt(2 t |h|) z,    n = x + (1 - t) v,    from time 1 to 0, h < 0, z standard normal

n is the noise that the network predicts in x. The score is -n / sigma_t, where sigma_t is the standard deviation of the
noise in x. A diffusion of g^2 = 2 sigma_t makes the drift finite at both ends, and sigma_t is t here, up to sigma_min.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lfm.solvers.batching import StepCallback, by_row, column, no_callback, require_finite
from lfm.types import Velocity

Normals = Callable[[int], Tensor]
"""Returns the standard normal draws (B, ...) of a step, counted from 0."""


def euler_maruyama(
    velocity: Velocity, noise: Tensor, *, times: Tensor, normals: Normals, on_step: StepCallback = no_callback
) -> Tensor:
    """Integrate from noise to latents (B, ...) over the intervals of `times` (N + 1,), which decrease from 1 to 0."""
    rows, state = torch.arange(len(noise), device=noise.device), noise
    for number, (time, next_time) in enumerate(pairwise(by_row(times, noise))):
        slope, step = velocity(state, time.to(state.dtype), rows), next_time - time
        predicted_noise = state + column(1 - time, state) * slope
        spread = column((-2 * time * step).sqrt(), state)
        state = state + column(step, state) * (slope + predicted_noise) + spread * normals(number).to(state)
        require_finite(state, time, rows)
        on_step(next_time, state, rows)
    return state
