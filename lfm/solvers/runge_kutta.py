"""Explicit Runge-Kutta methods, with fixed steps, or with steps that are controlled for each row by itself.

A step h from (x, t), h < 0, is

    k_i = v(x + h sum_j a_ij k_j, t + c_i h),    x' = x + h sum_i b_i k_i,    e = h sum_i (b_i - b*_i) k_i

a, b, c are the tableau, b* the weights of an embedded method of lower order, and e is the estimate of the step's error. A
fixed-step solver takes exactly the steps of a grid of times. An adaptive solver accepts a step if

    r = rms(e / (atol + rtol max(|x|, |x'|))) <= 1,    and continues with    h <- h clip(0.9 r^(-1/order), 0.2, 10)

(Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4). Each row of the batch has its own time
and step size, and leaves the batch at time 0, so its result and cost do not depend on the other rows. To add a method, add
its tableau to `TABLEAUS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.adaptive_heun import AdaptiveHeunSolver
from torchdiffeq._impl.bosh3 import Bosh3Solver
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.dopri8 import Dopri8Solver

from lfm.errors import LfmError
from lfm.solvers.batching import StepCallback, by_row, column, no_callback, require_finite
from lfm.types import Velocity

SAFETY, SHRINK_AT_MOST, GROW_AT_MOST = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method in the notation of the formulas above; the first stage is the slope at (x, t)."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]  # row i has i entries
    b: tuple[float, ...]
    error: tuple[float, ...] = ()  # b - b*; empty for a fixed-step method

    @property
    def is_adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return bool(self.error)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the slope at the end of the step, which is the first stage of the next step."""
        return self.c[-1] == 1 and self.b == (*self.a[-1], 0.0)


def _published(solver: Any) -> Tableau:
    """Return the tableau of a solver of torchdiffeq, which omits c and a of the first stage."""
    tableau = solver.tableau
    return Tableau(
        solver.order,
        c=(0.0, *tableau.alpha.tolist()),
        a=((), *(tuple(row.tolist()) for row in tableau.beta)),
        b=tuple(tableau.c_sol.tolist()),
        error=tuple(tableau.c_error.tolist()),
    )


# rk4 is Kutta's 3/8 rule, as in torchdiffeq and in the paper's results; its error is smaller than that of the classic one.
TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(1, c=(0.0,), a=((),), b=(1.0,)),
    "midpoint": Tableau(2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0)),
    "heun": Tableau(2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2)),
    "rk4": Tableau(
        4,
        c=(0.0, 1 / 3, 2 / 3, 1.0),
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    "adaptive_heun": _published(AdaptiveHeunSolver),
    "bosh3": _published(Bosh3Solver),
    "dopri5": _published(Dopri5Solver),
    "dopri8": _published(Dopri8Solver),
}


def fixed_step(
    tableau: Tableau, velocity: Velocity, noise: Tensor, *, times: Tensor, on_step: StepCallback = no_callback
) -> Tensor:
    """Integrate from noise to latents (B, ...), one step per interval of `times` (N + 1,), which decrease from 1 to 0."""
    rows, grid, state = torch.arange(len(noise), device=noise.device), by_row(times, noise), noise
    for time, next_time in pairwise(grid):
        slopes = _slopes(tableau, velocity, state, time, next_time - time, rows)
        state = state + column(next_time - time, state) * _combine(tableau.b, slopes)
        require_finite(state, time, rows)
        on_step(next_time, state, rows)
    return state


def adaptive_step(
    tableau: Tableau,
    velocity: Velocity,
    noise: Tensor,
    *,
    atol: float,
    rtol: float,
    max_evaluations: int = 10_000,
    on_step: StepCallback = no_callback,
) -> Tensor:
    """Integrate from noise to latents (B, ...) by steps that keep the error of each row within the tolerances.

    Raises:
        LfmError: a row needs more than `max_evaluations` of the velocity, or its state is not finite.
    """
    assert noise.dtype in (torch.float32, torch.float64), f"noise {noise.dtype}"
    latents = torch.empty_like(noise)
    rows = torch.arange(len(noise), device=noise.device)  # those that are not yet at time 0
    time = torch.ones(len(noise), dtype=torch.float64, device=noise.device)
    state, slope = noise, velocity(noise, time.to(noise.dtype), rows)
    require_finite(slope, time, rows)
    size = _first_step_size(tableau, velocity, state, slope, rows, atol, rtol)
    evaluations = 2
    while len(rows):
        if evaluations > max_evaluations:
            raise LfmError(
                f"the solver is at time {float(time.max()):.4g} after {evaluations} evaluations: "
                f"raise `atol` {atol:g} and `rtol` {rtol:g}, or choose a fixed-step `solver`"
            )
        size = torch.minimum(size, time)
        slopes = _slopes(tableau, velocity, state, time, -size, rows, slope)
        evaluations += len(tableau.b) - tableau.first_same_as_last
        proposal = state - column(size, state) * _combine(tableau.b, slopes)
        error = column(size, state) * _combine(tableau.error, slopes)
        require_finite(proposal + error, time, rows)

        ratio = _rms(error / (atol + rtol * torch.maximum(state.abs(), proposal.abs())))
        accepted = ratio <= 1
        state = torch.where(column(accepted, state), proposal, state)
        time = torch.where(accepted, time - size, time)
        size = size * (SAFETY * ratio ** (-1 / tableau.order)).clamp(SHRINK_AT_MOST, GROW_AT_MOST)
        slope = torch.where(column(accepted, slope), slopes[-1], slope)
        on_step(time, state, rows)

        finished = time <= 0
        latents[rows[finished]] = state[finished]
        active = ~finished
        rows, time, size, state = rows[active], time[active], size[active], state[active]
        accepted, slope = accepted[active], slope[active]
        if not tableau.first_same_as_last and accepted.any():
            slope[accepted] = velocity(state[accepted], time[accepted].to(state.dtype), rows[accepted])
            evaluations += 1
    return latents


def _slopes(
    tableau: Tableau,
    velocity: Velocity,
    state: Tensor,
    time: Tensor,
    step: Tensor,
    rows: Tensor,
    first: Tensor | None = None,
) -> list[Tensor]:
    """Compute the stages k_i (B, ...) of one step of each row.

    Args:
        state: (B, ...).
        time: float64 (B,).
        step: h, float64 (B,).
        first: k_1 (B, ...), if it is known.
    """
    slopes = [velocity(state, time.to(state.dtype), rows) if first is None else first]
    for c, a in zip(tableau.c[1:], tableau.a[1:], strict=True):
        point = state + column(step, state) * _combine(a, slopes)
        slopes.append(velocity(point, (time + c * step).to(state.dtype), rows))
    return slopes


def _first_step_size(
    tableau: Tableau, velocity: Velocity, state: Tensor, slope: Tensor, rows: Tensor, atol: float, rtol: float
) -> Tensor:
    """Return the size of each row's first step, float64 (B,) (Hairer, section II.4, "Starting Step Size").

    A first guess moves the state by a hundredth of itself. One evaluation there gives the second derivative, and with it
    the size at which the error of an Euler step is a hundredth of the tolerance.
    """
    scale = atol + rtol * state.abs()
    length, speed = _rms(state / scale), _rms(slope / scale)
    guess = torch.where((length < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * length / speed).clamp(max=1)
    next_slope = velocity(state - column(guess, state) * slope, (1 - guess).to(state.dtype), rows)
    steepest = torch.maximum(speed, _rms((next_slope - slope) / scale) / guess)
    size = torch.where(steepest <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / steepest) ** (1 / tableau.order))
    return torch.minimum(100 * guess, size)


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Return the sum of weight * slope, leaving out weights of 0."""
    first, *others = (weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
    return sum(others, start=first)


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square of each row (B, ...), float64 (B,); float32 sums would depend on the batch size."""
    return values.double().flatten(1).square().mean(1).sqrt()
