"""Differences and times to a target, against hand-made values and against scipy's definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.comparison.paired_statistics import difference, reached_at


def test_a_paired_difference_is_that_of_the_textbook() -> None:
    result = difference([10.0, 20.0, 30.0], [9.0, 18.5, 28.0], paired=True, higher_is_better=False)
    assert result.values == (-1.0, -1.5, -2.0) and result.mean == -1.5 and result.spread == 0.5
    assert result.relative == pytest.approx(-0.075) and result.num_better == 3
    # t = -1.5 sqrt(3) / 0.5 = -5.196 with 2 degrees of freedom; p = 1 - |t| / sqrt(t^2 + 2)
    t = 1.5 * math.sqrt(3) / 0.5
    assert result.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_pairing_finds_what_the_spread_between_seeds_hides() -> None:
    first, other = [10.0, 20.0, 30.0], [9.9, 19.85, 29.8]
    paired = difference(first, other, paired=True, higher_is_better=False)
    apart = difference(first, other, paired=False, higher_is_better=False)
    assert paired.p < 0.05 < 0.9 < apart.p
    assert paired.mean == pytest.approx(apart.mean) and apart.values == ()


def test_one_seed_and_equal_values_have_no_or_a_trivial_test() -> None:
    one = difference([1.0], [0.5], paired=True, higher_is_better=True)
    assert math.isnan(one.p) and math.isnan(one.spread) and one.num_better == 0
    assert difference([1.0, 2.0], [1.0, 2.0], paired=True, higher_is_better=False).p == 1.0
    assert difference([1.0, 2.0], [0.5, 1.5], paired=True, higher_is_better=False).p == 0.0


def test_no_difference_is_significant_in_one_of_twenty_placebos() -> None:
    """The share of p below 0.05 among pairs without a difference, which the test promises."""
    random = np.random.default_rng(0)
    pairs = random.normal(size=(2000, 2, 3))
    share = np.mean([difference(a, b, paired=True, higher_is_better=False).p < 0.05 for a, b in pairs])
    assert 0.035 < share < 0.065


@pytest.mark.parametrize(
    ("points", "target", "higher", "expected"),
    [
        ([(10, 4.0), (20, 2.0), (30, 1.0)], 3.0, False, 15.0),
        ([(10, 4.0), (20, 2.0), (30, 1.0)], 1.0, False, 30.0),
        ([(10, 4.0), (20, 2.0), (30, 1.0)], 0.5, False, None),
        ([(10, 4.0), (20, 2.0)], 5.0, False, 10.0),
        ([(10, 0.2), (20, 0.6)], 0.5, True, 17.5),
        ([(10, 4.0), (20, 2.0), (30, 5.0)], 3.0, False, 15.0),
        ([], 1.0, False, None),
    ],
)
def test_a_target_is_reached_between_two_points(
    points: list[tuple[float, float]], target: float, higher: bool, expected: float | None
) -> None:
    assert reached_at(points, target, higher_is_better=higher) == (
        None if expected is None else pytest.approx(expected)
    )


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.floats(-100, 100))
def test_the_value_at_which_a_target_is_reached_is_the_target_or_better(values: list[float], target: float) -> None:
    points = [(float(number), value) for number, value in enumerate(values)]
    x = reached_at(points, target, higher_is_better=False)
    if x is None:
        assert min(values) > target
    else:
        assert 0 <= x <= len(values) - 1
        assert all(value > target for number, value in enumerate(values) if number < math.floor(x))
