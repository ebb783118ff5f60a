"""The table of solvers. To add one, write its function in a module of this folder, and add a line to `SOLVERS`; a
Runge-Kutta method is an entry of `TABLEAUS` in `runge_kutta.py` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lfm.solvers.multistep import adams_bashforth
from lfm.solvers.runge_kutta import TABLEAUS, Tableau, adaptive_step, fixed_step
from lfm.solvers.stochastic import euler_maruyama
from lfm.solvers.torchdiffeq_solvers import batch_adaptive_step


@dataclass(frozen=True)
class Solver:
    """A solver and its properties."""

    order: int
    """The error falls with the number of fixed steps to this power; for a stochastic solver, that of the moments."""
    run: Callable[..., Tensor]
    """(velocity, noise, *, times) -> latents for fixed steps; atol and rtol in place of times for adaptive ones."""
    evaluations: int = 0
    """Evaluations of the velocity per fixed step."""
    is_adaptive: bool = False
    is_stochastic: bool = False
    """Whether `run` takes `normals`."""
    reports_steps: bool = True
    """Whether `run` takes `on_step`."""


def _runge_kutta(tableau: Tableau) -> Solver:
    run = partial(adaptive_step if tableau.is_adaptive else fixed_step, tableau)
    return Solver(tableau.order, run, len(tableau.b), is_adaptive=tableau.is_adaptive)


def _torchdiffeq(name: str) -> Solver:
    run = partial(batch_adaptive_step, name)
    return Solver(TABLEAUS[name].order, run, is_adaptive=True, reports_steps=False)


SOLVERS = {name: _runge_kutta(tableau) for name, tableau in TABLEAUS.items()}
SOLVERS |= {
    "ab2": Solver(2, adams_bashforth, evaluations=1),
    "sde": Solver(1, euler_maruyama, evaluations=1, is_stochastic=True),
    "torchdiffeq-adaptive_heun": _torchdiffeq("adaptive_heun"),
    "torchdiffeq-bosh3": _torchdiffeq("bosh3"),
    "torchdiffeq-dopri5": _torchdiffeq("dopri5"),
    "torchdiffeq-dopri8": _torchdiffeq("dopri8"),
}
