"""All that is random about a sample depends on its number and the seed alone, and has the right law."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.draws import Draws, draw, picture_noise

SMALL = settings(max_examples=25, deadline=None)
SHAPE = (2, 3, 3)
SEEDS = st.integers(0, 2**63 - 1)
NUMBERS = st.lists(st.integers(0, 2**62), min_size=1, max_size=8)


def rows(draws: Draws) -> list[bytes]:
    """Each sample's draws as bytes."""
    return [b"".join(np.ascontiguousarray(field[i]).tobytes() for field in vars(draws).values())
            for i in range(len(draws.flip))]  # fmt: skip


@SMALL
@given(seed=SEEDS, numbers=NUMBERS, data=st.data())
def test_a_samples_draws_do_not_depend_on_its_batch(seed: int, numbers: list[int], data: st.DataObject) -> None:
    together = rows(draw(seed, numbers, SHAPE))
    assert together == [rows(draw(seed, [number], SHAPE))[0] for number in numbers]
    order = data.draw(st.permutations(range(len(numbers))))
    shuffled = rows(draw(seed, np.array(numbers)[order], SHAPE))
    assert shuffled == [together[i] for i in order]


@SMALL
@given(seed=SEEDS, numbers=st.lists(st.integers(0, 2**62), min_size=2, max_size=8, unique=True))
def test_every_sample_and_every_seed_has_draws_of_its_own(seed: int, numbers: list[int]) -> None:
    drawn = rows(draw(seed, numbers, SHAPE)) + rows(draw(seed ^ 1, numbers, SHAPE))
    assert len(set(drawn)) == 2 * len(numbers)


@SMALL
@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6, unique=True))
def test_every_seed_has_a_picture_of_its_own(seeds: list[int]) -> None:
    noise = picture_noise(seeds, SHAPE)
    assert len({picture.tobytes() for picture in noise}) == len(seeds)
    for seed, picture in zip(seeds, noise, strict=True):
        assert np.array_equal(picture_noise([seed], SHAPE)[0], picture)


@pytest.mark.parametrize("seed", [2**53, 2**60, 2**63])
def test_neighbouring_large_seeds_have_different_pictures(seed: int) -> None:
    one, other = picture_noise([seed, seed + 1], SHAPE)
    assert not np.array_equal(one, other)


def test_shapes_and_types() -> None:
    draws = draw(3, [5, 6], SHAPE)
    assert draws.flip.dtype == bool and draws.flip.shape == (2,)
    assert {value.dtype for value in (draws.drop, draws.uniform, draws.noise, draws.posterior_noise)} == {
        np.dtype(np.float32)
    }
    assert draws.noise.shape == draws.posterior_noise.shape == (2, *SHAPE)
    assert picture_noise(range(3), SHAPE).dtype == np.float32
    assert draw(0, [], SHAPE).noise.shape == (0, *SHAPE)


def test_the_laws() -> None:
    count = 4000
    draws = draw(1, range(count), (2, 4))
    error = 5 / np.sqrt(count)  # of a mean of unit deviation, five sigmas
    assert abs(draws.flip.mean() - 0.5) < 0.5 * error
    for uniform in (draws.drop, draws.uniform):
        assert uniform.min() >= 0 and uniform.max() < 1
        assert np.abs(np.sort(uniform) - np.linspace(0, 1, count)).max() < 0.03, "Kolmogorov and Smirnov"
    for normal in (draws.noise, draws.posterior_noise, picture_noise(range(count), (2, 4))):
        flat = normal.reshape(count, -1)
        assert abs(flat.mean()) < error / np.sqrt(8)
        assert abs(flat.var() - 1) < 2 * error / np.sqrt(8)
        assert abs((flat**3).mean()) < 0.15 and abs((flat**4).mean() - 3) < 0.3
        assert np.abs(np.corrcoef(flat.T) - np.eye(8)).max() < error
    columns = [draws.flip, draws.drop, draws.uniform, draws.noise[:, 0, 0], draws.posterior_noise[:, 0, 0]]
    correlations = np.corrcoef(np.array(columns, np.float64))
    # a flip is made of a number of its own: all five are independent
    assert np.abs(correlations - np.eye(5)).max() < error
    neighbours = np.corrcoef(draws.noise[:-1].ravel(), draws.noise[1:].ravel())[0, 1]
    assert abs(neighbours) < error / np.sqrt(8)


@SMALL
@given(seed=SEEDS, number=st.integers(0, 2**62))
def test_the_noise_of_pictures_is_not_that_of_training(seed: int, number: int) -> None:
    draws, picture = draw(seed, [number], SHAPE), picture_noise([number], SHAPE)
    values = set(draws.noise.ravel().tolist()) | set(draws.posterior_noise.ravel().tolist())
    assert values.isdisjoint(picture.ravel().tolist())
    assert set(draws.noise.ravel().tolist()).isdisjoint(draws.posterior_noise.ravel().tolist())


def test_the_draws_are_the_same_in_every_process() -> None:
    script = """
from lfm.data.draws import draw, picture_noise
print(draw(7, [11], (3,)).noise.tobytes().hex(), picture_noise([5], (3,)).tobytes().hex())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = (draw(7, [11], (3,)).noise, picture_noise([5], (3,)))
    assert result.stdout.split() == [array.tobytes().hex() for array in expected]
