"""All that is random about a sample depends on its number and the seed alone, and has the right law."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.random_draws import draw, draw_noise, image_noise
from tests.support.strategies import NUMBERS, SEEDS

SMALL = settings(max_examples=25, deadline=None)
SHAPE = (2, 3, 3)


def rows(seed: int, numbers: list[int]) -> list[bytes]:
    """Each sample's draws as bytes."""
    tensor = torch.tensor(numbers)
    fields = [*vars(draw(seed, tensor)).values(), *draw_noise(seed, tensor, SHAPE)]
    return [b"".join(field[i].numpy().tobytes() for field in fields) for i in range(len(numbers))]


@SMALL
@given(seed=SEEDS, numbers=NUMBERS, data=st.data())
def test_a_samples_draws_do_not_depend_on_its_batch(seed: int, numbers: list[int], data: st.DataObject) -> None:
    together = rows(seed, numbers)
    assert together == [rows(seed, [number])[0] for number in numbers]
    order = data.draw(st.permutations(range(len(numbers))))
    assert rows(seed, [numbers[i] for i in order]) == [together[i] for i in order]


@SMALL
@given(seed=SEEDS, numbers=st.lists(st.integers(0, 2**62), min_size=2, max_size=8, unique=True))
def test_every_sample_and_every_seed_has_draws_of_its_own(seed: int, numbers: list[int]) -> None:
    assert len(set(rows(seed, numbers) + rows(seed ^ 1, numbers))) == 2 * len(numbers)


def test_the_words_are_those_of_splitmix() -> None:
    """Against its definition in whole numbers: the same on every device, whose integers are exact."""
    every = 2**64 - 1

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & every
        word = (word ^ word >> 27) * 0x94D049BB133111EB & every
        return word ^ word >> 31

    for seed, number in ((0, 0), (3, 5), (2**63 - 1, 2**62)):
        start = mix(mix(seed) + number & every)
        words = [mix(start + i * (mix(start ^ every) | 1) & every) for i in (1, 2, 3)]
        draws = draw(seed, torch.tensor([number]))
        assert draws.flip.item() == bool(words[0] >> 63)
        assert [draws.drop.item(), draws.uniform.item()] == [(word >> 40) / 2**24 for word in words[1:]]


@SMALL
@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6, unique=True))
def test_every_seed_has_an_image_of_its_own(seeds: list[int]) -> None:
    noise = image_noise(seeds, SHAPE)
    assert len({image.tobytes() for image in noise}) == len(seeds)
    for seed, image in zip(seeds, noise, strict=True):
        assert np.array_equal(image_noise([seed], SHAPE)[0], image)


@pytest.mark.parametrize("seed", [2**53, 2**60, 2**63])
def test_neighbouring_large_seeds_have_different_images(seed: int) -> None:
    one, other = image_noise([seed, seed + 1], SHAPE)
    assert not np.array_equal(one, other)


def test_shapes_and_types() -> None:
    numbers = torch.tensor([5, 6])
    draws, noises = draw(3, numbers), draw_noise(3, numbers, SHAPE)
    assert draws.flip.dtype == torch.bool and draws.flip.shape == (2,)
    assert {value.dtype for value in (draws.drop, draws.uniform, *noises)} == {torch.float32}
    assert {noise.shape for noise in noises} == {(2, *SHAPE)}
    assert image_noise(range(3), SHAPE).dtype == np.float32
    assert draw_noise(0, numbers[:0], SHAPE)[0].shape == (0, *SHAPE)


def test_the_laws() -> None:
    count = 4000
    draws, noises = draw(1, torch.arange(count)), draw_noise(1, torch.arange(count), (2, 4))
    error = 5 / np.sqrt(count)  # of a mean of unit deviation, five sigmas
    assert abs(draws.flip.double().mean() - 0.5) < 0.5 * error
    for uniform in (draws.drop.numpy(), draws.uniform.numpy()):
        assert uniform.min() >= 0 and uniform.max() < 1
        assert np.abs(np.sort(uniform) - np.linspace(0, 1, count)).max() < 0.03, "Kolmogorov and Smirnov"
    for normal in (*(noise.numpy() for noise in noises), image_noise(range(count), (2, 4))):
        flat = normal.reshape(count, -1)
        assert abs(flat.mean()) < error / np.sqrt(8)
        assert abs(flat.var() - 1) < 2 * error / np.sqrt(8)
        assert abs((flat**3).mean()) < 0.15 and abs((flat**4).mean() - 3) < 0.3
        assert np.abs(np.corrcoef(flat.T) - np.eye(8)).max() < error
    columns = [draws.flip, draws.drop, draws.uniform, *(noise[:, 0, 0] for noise in noises)]
    correlations = np.corrcoef(torch.stack([column.double() for column in columns]))
    # a flip is made of a number of its own: all five are independent
    assert np.abs(correlations - np.eye(5)).max() < error
    neighbours = np.corrcoef(noises[0][:-1].ravel(), noises[0][1:].ravel())[0, 1]
    assert abs(neighbours) < error / np.sqrt(8)


def test_the_noise_is_normal_to_its_tails() -> None:
    """A million and more of them, by their quantiles: chi squared over bins that reach to four deviations."""
    values = torch.cat(draw_noise(7, torch.arange(150), (4, 32, 32))).flatten().numpy()
    edges = np.array([-4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4])
    normal = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    expected = np.diff(np.concatenate([[0.0], normal, [1.0]])) * values.size
    counts = np.bincount(np.searchsorted(edges, values), minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3, "0.1 %, 11 degrees of freedom"
    assert 4.5 < abs(values).max() < 6.1


def test_the_draws_are_the_same_in_every_process() -> None:
    script = """
import torch
from lfm.data.random_draws import draw_noise, image_noise
print(draw_noise(7, torch.tensor([11]), (3,))[0].numpy().tobytes().hex(), image_noise([5], (3,)).tobytes().hex())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = (draw_noise(7, torch.tensor([11]), (3,))[0].numpy(), image_noise([5], (3,)))
    assert result.stdout.split() == [array.tobytes().hex() for array in expected]
