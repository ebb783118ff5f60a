"""Solvers of the flow's differential equation, from noise at time 1 to data at time 0.

    dx/dt = v(x, t),    x(1) = noise,    x(0) = latents

Fixed-step solvers take the steps of a grid of times: num_steps equal intervals of u from 1 to 0, which

    t = s u / (1 + (s - 1) u)

shifts towards noise (s > 1) or data (s < 1) (Esser et al. 2024, Eq. 23). Adaptive solvers choose their steps by tolerances.
To add a solver, write its function in a module of this folder, and add a line to the table in `solver_table.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.solvers.batching import StepCallback, no_callback
from lfm.solvers.solver_table import SOLVERS
from lfm.solvers.stochastic import Normals
from lfm.types import Velocity

DEFAULT_STEPS, DEFAULT_TOLERANCE = 25, 1e-5
TYPICAL_ADAPTIVE_EVALUATIONS = 100  # at the default tolerance


@dataclass(frozen=True)
class Solving:
    """A solver and its options; None stands for the default, which is 25 steps, or 1e-5 for each tolerance.

    Raises:
        ConfigError: the solver is unknown, or does not take an option; names the option.
    """

    solver: str = "heun"
    num_steps: int | None = None
    """Number of steps of a fixed-step solver."""
    time_shift: float | None = None
    """Shift of the grid of times; above 1, more steps are near noise."""
    times: tuple[float, ...] | None = None
    """Grid of times from 1 to 0, in place of `num_steps` and `time_shift`."""
    atol: float | None = None
    """Absolute tolerance of an adaptive solver."""
    rtol: float | None = None
    """Relative tolerance of an adaptive solver."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            near = get_close_matches(self.solver, SOLVERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(SOLVERS)}"
            raise ConfigError(f"`solver` {self.solver}: unknown; {hint}")
        self._check_options_of_solver()
        for name in ("time_shift", "atol", "rtol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"`{name}` {value}: must be above 0")
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"`num_steps` {self.num_steps}: must be at least 1")
        if self.times is not None:
            if self.num_steps is not None or self.time_shift is not None:
                raise ConfigError("`times`: is the whole grid; leave out `num_steps` and `time_shift`")
            if list(self.times) != sorted(set(self.times), reverse=True) or (self.times[0], self.times[-1]) != (1, 0):
                text = ",".join(map(str, self.times))
                raise ConfigError(f"`times` {text}: must decrease from 1 to 0, as in 1,0.7,0.3,0")

    def _check_options_of_solver(self) -> None:
        """Refuse options of fixed-step solvers for an adaptive one, and the reverse."""
        if SOLVERS[self.solver].is_adaptive:
            refused, repair = (
                ["num_steps", "time_shift", "times"],
                "chooses its own steps; set `atol` and `rtol` instead",
            )
        else:
            refused, repair = ["atol", "rtol"], "takes fixed steps; set `num_steps` instead"
        for name in refused:
            if getattr(self, name) is not None:
                raise ConfigError(f"`{name}` {getattr(self, name)}: {self.solver} {repair}")

    @property
    def grid(self) -> Tensor:
        """The times of a fixed-step solver, float64 (num_steps + 1,)."""
        if self.times is not None:
            return torch.tensor(self.times, dtype=torch.float64)
        return time_grid(self.num_steps or DEFAULT_STEPS, self.time_shift or 1.0)

    @property
    def expected_evaluations(self) -> int:
        """Evaluations of the velocity per image: exact for fixed steps, a typical number for an adaptive solver."""
        solver = SOLVERS[self.solver]
        return TYPICAL_ADAPTIVE_EVALUATIONS if solver.is_adaptive else solver.evaluations * (len(self.grid) - 1)

    def __call__(
        self, velocity: Velocity, noise: Tensor, *, normals: Normals | None = None, on_step: StepCallback = no_callback
    ) -> Tensor:
        """Integrate `velocity` from noise to latents.

        Args:
            velocity: the velocity field.
            noise: float32 or float64 (B, ...).
            normals: random draws of each step, which a stochastic solver needs.
            on_step: called after each step of a solver that reports its steps.

        Returns:
            Latents in the shape and dtype of `noise`.

        Raises:
            LfmError: the state is not finite, or an adaptive solver does not reach its tolerances.
        """
        solver = SOLVERS[self.solver]
        options: dict[str, Any] = {}
        if solver.reports_steps:
            options["on_step"] = on_step
        if solver.is_adaptive:
            options["atol"], options["rtol"] = self.atol or DEFAULT_TOLERANCE, self.rtol or DEFAULT_TOLERANCE
        else:
            options["times"] = self.grid
        if solver.is_stochastic:
            assert normals is not None, f"{self.solver} needs normals"
            options["normals"] = normals
        return solver.run(velocity, noise, **options)

    def __str__(self) -> str:
        if SOLVERS[self.solver].is_adaptive:
            return f"{self.solver}, atol {self.atol or DEFAULT_TOLERANCE:g}, rtol {self.rtol or DEFAULT_TOLERANCE:g}"
        shift = f", shifted by {self.time_shift:g}" if self.time_shift else ", at chosen times" if self.times else ""
        return f"{self.solver} in {len(self.grid) - 1} steps{shift}"


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return the grid of `num_steps` intervals from 1 to 0, equal before the shift: float64 (num_steps + 1,)."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return times / (times + (1 - times) / shift)  # the formula above, in a form that is exact at both ends


def solve(name: str, velocity: Velocity, noise: Tensor, **options: Any) -> Tensor:
    """Integrate `velocity` from noise to latents (B, ...) by the solver `name` and options of `Solving`."""
    return Solving(name, **options)(velocity, noise)
