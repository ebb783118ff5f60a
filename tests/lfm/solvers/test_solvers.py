"""Tests of solvers: order, exactness, cost, independence of the batch, refused options, and the paper's solutions."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm.errors import ConfigError, LfmError
from lfm.flow.guidance import GuidedVelocity, NetworkVelocity
from lfm.flow.null_condition import null_condition
from lfm.solvers import SOLVERS, Solving, solve, time_grid
from lfm.solvers.multistep import adams_bashforth
from lfm.solvers.runge_kutta import TABLEAUS, adaptive_step, fixed_step
from lfm.solvers.stochastic import euler_maruyama
from lfm.types import Condition, Velocity
from tests.support.recorded_values import recorded, recorded_model

FIXED = [name for name, solver in SOLVERS.items() if not solver.is_adaptive]
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.is_adaptive]  # with the step controlled by row
COUPLED = [name for name, solver in SOLVERS.items() if solver.is_adaptive and name not in ADAPTIVE]
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.is_stochastic]


class Counted:
    """A velocity field of (state, time) that counts the evaluations of each row, like NetworkVelocity."""

    def __init__(self, field: object, batch_size: int) -> None:
        self.field = field
        self.nfe = torch.zeros(batch_size, dtype=torch.int64)
        self.times: list[float] = []

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        assert len(state) == len(time) == len(rows) > 0
        assert time.dtype == state.dtype
        self.nfe[rows] += 1
        self.times.append(float(time[0]))
        return self.field(state, time.view(-1, *[1] * (state.ndim - 1)))  # type: ignore[operator]


def logistic(state: Tensor, time: Tensor) -> Tensor:
    """dx/dt = (1.5 + t) x (1 - x), whose solution's logit falls by 2 from t = 1 to t = 0."""
    return (1.5 + time) * state * (1 - state)


def logistic_solution(noise: Tensor) -> Tensor:
    return torch.sigmoid(torch.logit(noise) - 2)


def stiff(state: Tensor, time: Tensor) -> Tensor:
    """A field that, backwards in time, attracts each row to a curve of its own, in some rows faster than in others."""
    rate = 5 + 60 * state[:, :1].abs()
    return rate * (state - torch.sin(5 * time) * state.mean(1, keepdim=True).tanh())


NOISE = torch.linspace(0.2, 0.7, 6, dtype=torch.float64).view(3, 2)


@pytest.mark.parametrize("name", [*TABLEAUS, "ab2"])
def test_the_error_falls_with_the_order_of_the_solver(name: str) -> None:
    run = partial(fixed_step, TABLEAUS[name]) if name in TABLEAUS else adams_bashforth
    order = SOLVERS[name].order
    counts = np.array([6, 8, 10, 12] if order == 8 else [70, 100, 140])
    errors = []
    for count in counts:
        times = torch.linspace(1, 0, int(count) + 1, dtype=torch.float64)
        latents = run(Counted(logistic, 3), NOISE, times=times)
        errors.append(float((latents - logistic_solution(NOISE)).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", TABLEAUS)
def test_weights_and_nodes_are_consistent(name: str) -> None:
    tableau = TABLEAUS[name]
    assert sum(tableau.b) == pytest.approx(1, abs=1e-14)
    assert [sum(row) for row in tableau.a] == pytest.approx(tableau.c, abs=1e-14)
    assert not tableau.error or sum(tableau.error) == pytest.approx(0, abs=1e-14)


@settings(max_examples=20, deadline=None)
@given(value=st.floats(-10, 10), num_steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_solver_is_exact_on_a_constant_field(value: float, num_steps: int, seed: int) -> None:
    noise = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for name in DETERMINISTIC:
        steps = num_steps if name in FIXED else None
        latents = solve(name, Counted(lambda x, t: torch.full_like(x, value), 2), noise, num_steps=steps)
        torch.testing.assert_close(latents, noise - value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLEAUS if SOLVERS[name].order > 1])
def test_solvers_above_order_1_are_exact_on_a_field_linear_in_time(name: str) -> None:
    steps = 3 if name in FIXED else None
    latents = solve(name, Counted(lambda x, t: (3 - 4 * t).expand_as(x), 3), NOISE, num_steps=steps)
    torch.testing.assert_close(latents, NOISE - 1, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_of_adaptive_solvers_follows_the_tolerance(name: str) -> None:
    for tolerance in (1e-3, 1e-5, 1e-7):
        latents = solve(name, Counted(logistic, 3), NOISE, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(latents, logistic_solution(NOISE), atol=10 * tolerance, rtol=0)


def still(step: int) -> Tensor:
    """Return normals of zero for a stochastic solver."""
    return torch.zeros_like(NOISE)


@pytest.mark.parametrize(
    ("name", "per_step"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("ab2", 1), ("sde", 1)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_a_fixed_solver_takes_exactly_its_steps(name: str, per_step: int, num_steps: int) -> None:
    velocity = Counted(logistic, 3)
    Solving(name, num_steps=num_steps)(velocity, NOISE, normals=still)
    assert per_step == SOLVERS[name].evaluations
    assert velocity.nfe.tolist() == [num_steps * per_step] * 3
    starts = velocity.times[::per_step]
    assert starts == pytest.approx([1 - step / num_steps for step in range(num_steps)])


def test_a_fixed_step_solver_takes_its_steps_at_the_given_times() -> None:
    velocity = Counted(logistic, 3)
    solve("euler", velocity, NOISE, times=(1, 0.75, 0.125, 0))
    assert velocity.times == [1.0, 0.75, 0.125]


@given(num_steps=st.integers(1, 20), shift=st.floats(0.2, 5))
def test_a_shifted_grid_keeps_its_ends_and_moves_towards_noise(num_steps: int, shift: float) -> None:
    uniform, times = time_grid(num_steps), time_grid(num_steps, shift)
    assert len(times) == num_steps + 1 and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()
    assert ((times >= uniform - 1e-12) if shift >= 1 else (times <= uniform + 1e-12)).all()
    assert Solving("euler", num_steps=num_steps, time_shift=shift).grid.tolist() == times.tolist()


def test_on_uneven_steps_too_ab2_is_of_order_2() -> None:
    counts, errors = np.array([70, 100, 140]), []
    for count in counts:
        latents = solve("ab2", Counted(logistic, 3), NOISE, num_steps=int(count), time_shift=3.0)
        errors.append(float((latents - logistic_solution(NOISE)).abs().max()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(2, abs=0.1)


GAUSSIAN_MEAN, GAUSSIAN_STD = 0.7, 0.5


def gaussian(state: Tensor, time: Tensor) -> Tensor:
    """The velocity of the linear path from a normal distribution of these moments."""
    variance = (1 - time) ** 2 * GAUSSIAN_STD**2 + time**2
    slope = (time - (1 - time) * GAUSSIAN_STD**2) / variance
    return slope * (state - (1 - time) * GAUSSIAN_MEAN) - GAUSSIAN_MEAN


def sde_moments(num_steps: int) -> tuple[float, float]:
    """Return the exact mean and variance at the end of the sde solver, which is affine in its start and in every draw.

    One batch: row 0 starts at 0 without draws, row 1 starts at 1, and row 2 + n has a draw of 1 in step n alone.
    """
    noise = torch.zeros(2 + num_steps, 1, dtype=torch.float64)
    noise[1] = 1

    def normals(step: int) -> Tensor:
        draws = torch.zeros_like(noise)
        draws[2 + step] = 1
        return draws

    times = time_grid(num_steps)
    end = euler_maruyama(Counted(gaussian, len(noise)), noise, times=times, normals=normals)[:, 0]
    return float(end[0]), float((end[1:] - end[0]).square().sum())


def test_the_variance_of_the_sde_converges_with_its_order_and_its_mean_is_exact() -> None:
    counts, errors = np.array([130, 180, 260]), []
    for count in counts:
        mean, variance = sde_moments(int(count))
        assert mean == pytest.approx(GAUSSIAN_MEAN, abs=1e-12)  # of straight paths
        errors.append(abs(variance - GAUSSIAN_STD**2))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(SOLVERS["sde"].order, abs=0.1)


@pytest.mark.parametrize("name", [*FIXED, *ADAPTIVE])
def test_the_callback_gets_every_row_at_every_step(name: str) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(time: Tensor, state: Tensor, rows: Tensor) -> None:
        seen.append((time.clone(), state.clone(), rows.clone()))

    options = {"num_steps": 4} if name in FIXED else {}
    latents = Solving(name, **options)(Counted(logistic, 3), NOISE, normals=still, on_step=record)
    for row in range(3):
        steps = [(float(t[r == row]), x[r == row]) for t, x, r in seen if (r == row).any()]
        assert [time for time, _ in steps] == sorted([time for time, _ in steps], reverse=True)
        assert steps[-1][0] == 0 and torch.equal(steps[-1][1][0], latents[row])
    assert name not in FIXED or len(seen) == 4


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_solver_evaluates_each_stage_once(name: str) -> None:
    velocity = Counted(logistic, 3)
    solve(name, velocity, NOISE)
    stages = len(TABLEAUS[name].b)
    if TABLEAUS[name].first_same_as_last:
        assert ((velocity.nfe - 2) % (stages - 1) == 0).all()
    assert TABLEAUS[name].first_same_as_last == (name != "adaptive_heun")
    assert min(velocity.times) >= 0 and velocity.nfe.max() < 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "tolerance"), [("adaptive_heun", 1e-3), ("bosh3", 1e-4), ("dopri5", 1e-5), ("dopri8", 1e-5)]
)
def test_results_do_not_depend_on_the_batch(name: str, tolerance: float, dtype: torch.dtype) -> None:
    noise = torch.randn(64, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    noise *= torch.linspace(0.05, 1, 64, dtype=dtype)[:, None]
    solved: list[tuple[Tensor, Tensor]] = []
    for batch_size in (1, 8, 64):
        parts = noise.split(batch_size)
        fields = [Counted(stiff, batch_size) for _ in parts]
        latents = [
            solve(name, field, part, atol=tolerance, rtol=tolerance) for field, part in zip(fields, parts, strict=True)
        ]
        solved.append((torch.cat(latents), torch.cat([field.nfe for field in fields])))
    (alone, cost), *others = solved
    assert cost.unique().numel() > 5  # rows differ in cost, or the test would show nothing
    for latents, nfe in others:
        torch.testing.assert_close(latents, alone, atol=1e-6, rtol=0)
        assert torch.equal(nfe, cost)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in COUPLED])
def test_states_of_any_shape_and_an_empty_batch_keep_shape_and_dtype(name: str) -> None:
    steps = 2 if name in FIXED else None
    noise = torch.randn(2, 3, 4, 5)
    assert solve(name, lambda x, t, rows: x, noise, num_steps=steps).shape == noise.shape
    assert solve(name, lambda x, t, rows: x, noise[:0], num_steps=steps).shape == (0, 3, 4, 5)
    assert solve(name, lambda x, t, rows: x, noise, num_steps=steps).dtype == torch.float32


@pytest.mark.parametrize("name", [*FIXED, *ADAPTIVE])
def test_a_velocity_that_is_not_finite_ends_in_one_line(name: str) -> None:
    def broken(state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        return torch.where((rows == 1)[:, None] & (time < 0.5)[:, None], torch.nan, state)

    with pytest.raises(LfmError, match=r"^row 1 is not finite in the step from time [01]") as caught:
        Solving(name, num_steps=10 if name in FIXED else None)(broken, NOISE, normals=still)
    assert "\n" not in str(caught.value)


def test_a_velocity_that_is_never_finite_does_not_loop() -> None:
    with pytest.raises(LfmError, match=r"^row 0 is not finite in the step from time 1: "):
        solve("dopri5", lambda x, t, rows: torch.full_like(x, torch.nan), NOISE)


def test_a_tolerance_out_of_reach_is_an_error_with_the_repair() -> None:
    def rough(state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        return torch.sin(1e5 * time)[:, None].expand_as(state) * 1e3

    with pytest.raises(LfmError, match=r"after \d+ evaluations: raise `atol` 1e-09 and `rtol` 1e-09, or choose"):
        adaptive_step(TABLEAUS["dopri5"], rough, NOISE, atol=1e-9, rtol=1e-9, max_evaluations=500)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dopri-5", {}, r"^`solver` dopri-5: unknown; did you mean dopri5\?$"),
        ("zzz", {}, "^`solver` zzz: unknown; one of euler, "),
        ("dopri5", {"num_steps": 50}, "^`num_steps` 50: dopri5 chooses its own steps; set `atol` and `rtol` instead$"),
        ("heun", {"num_steps": 50, "atol": 1e-5}, "^`atol` 1e-05: heun takes fixed steps; set `num_steps` instead$"),
        ("heun", {"num_steps": 50, "rtol": 1e-5}, "^`rtol` 1e-05: heun takes fixed steps"),
        ("torchdiffeq-dopri5", {"num_steps": 5}, "^`num_steps` 5: torchdiffeq-dopri5 chooses its own steps"),
        ("dopri5", {"time_shift": 3.0}, "^`time_shift` 3.0: dopri5 chooses its own steps"),
        ("heun", {"time_shift": 0.0}, "^`time_shift` 0.0: must be above 0$"),
        ("heun", {"times": (1, 0.5)}, "^`times` 1,0.5: must decrease from 1 to 0, as in 1,0.7,0.3,0$"),
        ("heun", {"times": (1, 0.5, 0.6, 0)}, "^`times` 1,0.5,0.6,0: must decrease"),
        ("heun", {"times": (1, 0), "num_steps": 3}, "^`times`: is the whole grid; leave out `num_steps`"),
        ("heun", {"num_steps": 0}, "^`num_steps` 0: must be at least 1$"),
        ("dopri5", {"atol": 0.0}, "^`atol` 0.0: must be above 0$"),
        ("dopri5", {"rtol": math.nan}, "^`rtol` nan: must be above 0$"),
    ],
)
def test_options_that_a_solver_does_not_take_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve(name, lambda x, t, rows: x, NOISE, **options)


def fields_of_the_paper(task: str, file: dict[str, Tensor]) -> tuple[Velocity, Tensor]:
    """The recorded velocity field and its noise (4, C, h, w)."""
    model, key = recorded_model(), "cfg." if task == "cfg1p5" else ""
    condition = Condition(file[key + "y"])
    plain = NetworkVelocity(model, condition, 4)
    if task == "cls":
        return plain, file["xT"]
    null = null_condition(condition, 0.1, num_classes=10)
    return GuidedVelocity(plain, NetworkVelocity(model, null, 4), 1.5), file["cfg.x"]


@pytest.mark.parametrize("task", ["cls", "cfg1p5"])
@pytest.mark.parametrize(
    ("name", "step"), [("euler", 0.04), ("midpoint", 0.04), ("rk4", 0.04), ("euler", 0.01), ("rk4", 0.125)]
)
def test_fixed_step_solutions_are_those_of_the_paper(task: str, name: str, step: float) -> None:
    file = recorded("solvers")
    velocity, noise = fields_of_the_paper(task, file)
    latents = solve(name, velocity, noise, num_steps=round(1 / step))
    torch.testing.assert_close(latents, file[f"{task}.{name}_h{step}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", ["cls", "cfg1p5"])
@pytest.mark.parametrize(("name", "error"), [("dopri5", 2e-3), ("dopri8", 1e-4), ("bosh3", 1e-4)])
def test_adaptive_solutions_are_close_to_the_exact_one(task: str, name: str, error: float) -> None:
    file = recorded("solvers")
    velocity, noise = fields_of_the_paper(task, file)
    truth = file[f"{task}.truth_float64"]
    torch.testing.assert_close(solve(name, velocity, noise).double(), truth, atol=error, rtol=0)


@pytest.mark.parametrize("task", ["cls", "cfg1p5"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_batch_adaptive_solutions_are_those_of_the_paper(task: str, name: str) -> None:
    file = recorded("solvers")
    velocity, noise = fields_of_the_paper(task, file)
    latents = solve(f"torchdiffeq-{name}", velocity, noise)
    # where an adaptive solver stops depends on the last bits of float32: 1.5e-5 was seen
    torch.testing.assert_close(latents, file[f"{task}.{name}_1e-5"], atol=3e-5, rtol=0)
    recorded_nfe = {
        "cls.dopri5": 38,
        "cls.dopri8": 80,
        "cls.bosh3": 68,
        "cls.adaptive_heun": 195,
        "cfg1p5.dopri5": 88,
        "cfg1p5.dopri8": 186,
        "cfg1p5.bosh3": 172,
        "cfg1p5.adaptive_heun": 474,
    }
    assert velocity.nfe.tolist() == [recorded_nfe[f"{task}.{name}"]] * 4


def test_tighter_tolerances_come_closer_to_the_exact_solution() -> None:
    file = recorded("solvers")
    velocity, noise = fields_of_the_paper("cls", file)
    latents = solve("dopri5", velocity, noise, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(latents.double(), file["cls.truth_float64"], atol=2e-5, rtol=0)
