"""Adams-Bashforth of order 2: one evaluation per step, on any grid of times (Hairer, Norsett & Wanner, section III.5).

    x' = x + h ((1 + r/2) v_n - r/2 v_(n-1)),    r = h / (the step before)

The first step is Euler's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lfm.solvers.batching import StepCallback, by_row, column, no_callback, require_finite
from lfm.types import Velocity


def adams_bashforth(velocity: Velocity, noise: Tensor, *, times: Tensor, on_step: StepCallback = no_callback) -> Tensor:
    """Integrate from noise to latents (B, ...) over the intervals of `times` (N + 1,), which decrease from 1 to 0."""
    rows, state = torch.arange(len(noise), device=noise.device), noise
    previous_slope, previous_step = torch.zeros_like(noise), torch.ones(len(noise), device=noise.device)
    for number, (time, next_time) in enumerate(pairwise(by_row(times, noise))):
        slope, step = velocity(state, time.to(state.dtype), rows), next_time - time
        ratio = column(step / previous_step, state) if number else 0.0
        state = state + column(step, state) * ((1 + ratio / 2) * slope - ratio / 2 * previous_slope)
        previous_slope, previous_step = slope, step
        require_finite(state, time, rows)
        on_step(next_time, state, rows)
    return state
