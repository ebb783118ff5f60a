"""Dead leaves are a pure function of their number, all different, and use the whole range of levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.synthetic.dead_leaves import draw_leaves


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 2**32), size=st.integers(8, 40))
def test_an_image_depends_on_its_number_alone(seed: int, index: int, size: int) -> None:
    image = draw_leaves(seed, index, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    np.random.default_rng(0).random()
    np.random.seed(1)
    assert np.array_equal(draw_leaves(seed, index, size), image)


def test_images_differ_by_index_and_by_seed() -> None:
    images = {draw_leaves(seed, index, 16).tobytes() for seed in range(5) for index in range(10)}
    assert len(images) == 50


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([draw_leaves(0, index, 32) for index in range(60)]).astype(np.float64)


def test_all_levels_and_colours_occur(images: np.ndarray) -> None:
    assert len(np.unique(images)) == 256
    means = images.mean((0, 1, 2))
    assert (means > 70).all() and (means < 185).all()
    assert np.ptp(means) < 40, "no colour is preferred"
    assert np.median(images.std((1, 2, 3))) > 25, "no flat images"


def test_the_spectrum_falls_as_that_of_photographs(images: np.ndarray) -> None:
    """Power falls about as frequency to -2 (Ruderman, 1997); white noise would not fall at all."""
    grey = images.mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))).__pow__(2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None]) * 32
    rings = [power[(frequency >= low) & (frequency < low + 1)].mean() for low in range(1, 13)]
    slope = np.polyfit(np.log(np.arange(1.5, 13)), np.log(rings), 1)[0]
    assert -3.2 < slope < -1.5
