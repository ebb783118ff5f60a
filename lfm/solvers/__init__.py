"""Solvers of the flow's differential equation, from noise at time 1 to data at time 0.

    dx/dt = v(x, t),    x(1) = noise,    x(0) = latents

A solver is known by its name. Those with fixed steps take a grid of times, num_steps equal intervals of u from 1 to 0 that

    t = s u / (1 + (s - 1) u)

shifts towards noise (s > 1) or data (s < 1) (Esser et al. 2024, Eq. 23); the others find their steps by tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.solvers.batching import StepCallback, no_callback
from lfm.solvers.others import Normals, adams_bashforth, coupled, euler_maruyama
from lfm.solvers.runge_kutta import TABLEAUS, adaptive_step, fixed_step
from lfm.types import Velocity

DEFAULT_STEPS, DEFAULT_TOLERANCE = 25, 1e-5


@dataclass(frozen=True)
class Solver:
    """How to solve, and what to expect of it."""

    order: int  # the error of fixed steps falls with their number to this power; of sde in the mean, weakly
    adaptive: bool
    run: Callable[..., Tensor]
    evaluations: int = 0  # of the velocity in each fixed step
    stochastic: bool = False
    watchable: bool = True


SOLVERS: dict[str, Solver] = {
    name: Solver(
        tableau.order,
        tableau.adaptive,
        partial(adaptive_step if tableau.adaptive else fixed_step, tableau),
        len(tableau.b),
    )
    for name, tableau in TABLEAUS.items()
}
SOLVERS |= {
    "ab2": Solver(2, False, adams_bashforth, 1),
    "sde": Solver(1, False, euler_maruyama, 1, stochastic=True),
}
SOLVERS |= {  # as the paper has them: the whole batch takes the same steps
    f"torchdiffeq-{name}": Solver(tableau.order, True, partial(coupled, name), watchable=False)
    for name, tableau in TABLEAUS.items()
    if tableau.adaptive
}


@dataclass(frozen=True)
class Solving:
    """Which solver, and its options; None: the solver's own default, 25 steps, or 1e-5 of each tolerance.

    Raises ConfigError, naming the flag, unless these are options that the solver takes.
    """

    solver: str = "heun"
    num_steps: int | None = None
    time_shift: float | None = None
    times: tuple[float, ...] | None = None  # in place of both: from 1 to 0
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            near = get_close_matches(self.solver, SOLVERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SOLVERS)}"
            raise ConfigError(f"--solver {self.solver}: unknown; {hint}")
        fixed = {"--num-steps": self.num_steps, "--time-shift": self.time_shift, "--times": self.times}
        tolerances = {"--atol": self.atol, "--rtol": self.rtol}
        adaptive = SOLVERS[self.solver].adaptive
        for flag, value in (fixed if adaptive else tolerances).items():
            if value is not None:
                finds = (
                    "finds its own steps; give --atol and --rtol" if adaptive else "takes fixed steps; give --num-steps"
                )
                raise ConfigError(f"{flag} {value}: {self.solver} {finds} instead")
        for flag, value in (*tolerances.items(), ("--time-shift", self.time_shift)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} {value}: must be above 0")
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"--num-steps {self.num_steps}: must be at least 1")
        if self.times is not None:
            if self.num_steps is not None or self.time_shift is not None:
                raise ConfigError("--times: gives the whole grid; leave out --num-steps and --time-shift")
            if list(self.times) != sorted(set(self.times), reverse=True) or (self.times[0], self.times[-1]) != (1, 0):
                raise ConfigError(
                    f"--times {','.join(map(str, self.times))}: must decrease from 1 to 0, as in 1,0.7,0.3,0"
                )

    @property
    def grid(self) -> Tensor:
        """The times of a fixed-step solver, float64 (num_steps + 1,)."""
        if self.times is not None:
            return torch.tensor(self.times, dtype=torch.float64)
        return time_grid(self.num_steps or DEFAULT_STEPS, self.time_shift or 1.0)

    def __call__(
        self, velocity: Velocity, noise: Tensor, *, normals: Normals | None = None, on_step: StepCallback = no_callback
    ) -> Tensor:
        """The latents (B, ...) that `velocity` makes of `noise` (B, ...), float32 or float64.

        A stochastic solver draws from `normals`; `on_step` is told of each step, where there is any to tell of. Raises
        LfmError where the state is not finite or no end is in sight.
        """
        solver = SOLVERS[self.solver]
        options: dict[str, Any] = {"on_step": on_step} if solver.watchable else {}
        if solver.adaptive:
            options |= {"atol": self.atol or DEFAULT_TOLERANCE, "rtol": self.rtol or DEFAULT_TOLERANCE}
        else:
            options["times"] = self.grid
        if solver.stochastic:
            assert normals is not None, f"{self.solver} needs normals"
            options["normals"] = normals
        return solver.run(velocity, noise, **options)

    def __str__(self) -> str:
        if SOLVERS[self.solver].adaptive:
            return f"{self.solver}, atol {self.atol or DEFAULT_TOLERANCE:g}, rtol {self.rtol or DEFAULT_TOLERANCE:g}"
        shift = f", shifted by {self.time_shift:g}" if self.time_shift else ", at given times" if self.times else ""
        return f"{self.solver} in {len(self.grid) - 1} steps{shift}"


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """`num_steps` intervals from 1 to 0, equal before the shift: float64 (num_steps + 1,)."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return times / (times + (1 - times) / shift)  # the formula above, exact at both ends


def solve(name: str, velocity: Velocity, noise: Tensor, **options: Any) -> Tensor:
    """The latents (B, ...) that `velocity` makes of `noise` (B, ...), by the solver `name` and options of `Solving`."""
    return Solving(name, **options)(velocity, noise)
