"""Tests of the averages: their formula in float32, and setting the masters to an average for a moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.training.ema import Ema, combination, decay_after, exponent, power_decay_after

SHAPES = [(7,), (3, 5), ()]


def masters(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def average(ema: Ema, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    with ema.in_place():
        return [weight.clone() for weight in weights]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), decay=st.sampled_from([0.5, 0.9, 0.999, 0.9999, 1.0, 0.0]))
def test_two_hundred_steps_equal_the_formula_in_float64(seed: int, decay: float) -> None:
    weights, generator = masters(seed), torch.Generator().manual_seed(seed + 1)
    ema = Ema(weights)
    reference = [weight.double() for weight in weights]
    for step in range(1, 201):
        for weight in weights:
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        now = decay_after(step, decay)
        ema.update(now)
        reference = [now * old + (1 - now) * new.double() for old, new in zip(reference, weights, strict=True)]
    for value, expected in zip(average(ema, weights), reference, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)


@given(step=st.integers(1, 10**9), decay=st.floats(0, 1))
def test_the_decay_rises_to_its_value_and_stays(step: int, decay: float) -> None:
    assert 0 <= decay_after(step, decay) <= decay_after(step + 1, decay) <= decay
    assert decay_after(10**12, decay) == pytest.approx(decay, abs=1e-9)


def test_a_decay_of_0_9999_moves_in_float32() -> None:
    """In bfloat16 it would not, so averages are float32."""
    weight = torch.zeros(1)
    ema = Ema([weight])
    weight.fill_(1e-3)
    for _ in range(100):
        ema.update(0.9999)
    assert average(ema, [weight])[0].item() == pytest.approx(1e-3 * (1 - 0.9999**100), rel=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_in_place_restores_bit_for_bit(fails: bool) -> None:
    weights = masters()
    weights[0][0], weights[0][1], weights[0][2] = float("nan"), -0.0, 1e-45
    ema = Ema([torch.zeros_like(weight) for weight in weights])
    ema._masters = weights  # an average of zeros, so that the block's content is known
    before = [weight.clone().view(torch.int32) for weight in weights]
    addresses = [weight.data_ptr() for weight in weights]
    try:
        with ema.in_place():
            assert all(not weight.any() for weight in weights)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert all(torch.equal(weight.view(torch.int32), old) for weight, old in zip(weights, before, strict=True))
    assert [weight.data_ptr() for weight in weights] == addresses, "the optimizer's own tensors"


def test_in_place_leaves_the_average_and_the_gradients_alone() -> None:
    weights = [torch.nn.Parameter(weight) for weight in masters()]
    ema = Ema([weight.data for weight in weights])
    first = average(ema, [weight.data for weight in weights])
    with torch.no_grad():
        for weight in weights:
            weight.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(first, average(ema, [w.data for w in weights]), strict=True))
    assert torch.is_grad_enabled() and all(weight.requires_grad for weight in weights)


def test_restart_sets_the_average_to_the_masters() -> None:
    weights = masters()
    ema = Ema(weights)
    for weight in weights:
        weight.mul_(3)
    ema.restart()
    assert all(torch.equal(value, weight) for value, weight in zip(average(ema, weights), weights, strict=True))


@given(width=st.floats(0.01, 0.28))
def test_the_exponent_is_that_of_the_width(width: float) -> None:
    """The published formula, and two published pairs (Karras et al. 2023, section 3.1)."""
    g = exponent(width)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(width, rel=1e-6)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)


@settings(max_examples=10, deadline=None)
@given(width=st.floats(0.03, 0.25), num_steps=st.integers(50, 400))
def test_the_power_decay_has_the_profile_of_its_width(width: float, num_steps: int) -> None:
    """Mean and spread of the average's weight over time, which must be those of the power function."""
    weights = np.zeros(num_steps)
    for step in range(1, num_steps + 1):
        decay = power_decay_after(step, width)
        weights[: step - 1] *= decay
        weights[step - 1] = 1 - decay
    times, g = (np.arange(num_steps) + 0.5) / num_steps, exponent(width)
    mean = weights @ times
    assert weights.sum() == pytest.approx(1) and mean == pytest.approx((g + 1) / (g + 2), abs=2 / num_steps)
    assert (weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(width, abs=2 / num_steps)


@settings(max_examples=15, deadline=None)
@given(width=st.floats(0.04, 0.2), seed=st.integers(0, 100), end=st.sampled_from([1.0, 0.75]))
def test_a_fitted_average_is_that_of_an_average_updated_at_every_step(width: float, seed: int, end: float) -> None:
    """For weights on a random walk, the difference has the size of the reported error."""
    num_steps, stored = 800, (0.05, 0.1)
    walk = np.cumsum(np.random.default_rng(seed).standard_normal((num_steps, 30)), 0)
    averages = {each: np.zeros(30) for each in (*stored, width)}
    snapshots: list[tuple[float, float, np.ndarray]] = []
    target = np.zeros(30)
    for step, weights in enumerate(walk, 1):
        for each, average in averages.items():
            decay = power_decay_after(step, each)
            averages[each] = decay * average + (1 - decay) * weights
        if step % 50 == 0 and step <= end * num_steps:
            snapshots += [(step, each, averages[each]) for each in stored]
        if step == end * num_steps:
            target = averages[width]
    times, widths, stored_averages = zip(*snapshots, strict=True)
    factors, error = combination(times, widths, end * num_steps, width)
    fitted = factors @ np.array(stored_averages)
    nearest = min(float(np.linalg.norm(average - target)) for average in stored_averages)
    assert error < 0.05
    assert np.linalg.norm(fitted - target) < 0.02 * np.linalg.norm(target) + 0.25 * nearest


@pytest.mark.parametrize("index", range(6))
def test_a_stored_average_is_fitted_by_itself(index: int) -> None:
    times, widths = [10.0, 20.0, 30.0] * 2, [0.05] * 3 + [0.1] * 3
    factors, error = combination(times, widths, times[index], widths[index])
    np.testing.assert_allclose(factors, np.eye(6)[index], atol=1e-6)
    assert error < 1e-6
