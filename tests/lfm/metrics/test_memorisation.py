"""Tests of the nearest training samples, and of the share of images that are copies of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm.metrics.memorisation import Memorisation, NearestSamples, nearest_samples


def normal(count: int, seed: int, dimensions: int = 6) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 2))
def test_merged_blocks_equal_brute_force(sizes: list[int], k: int, num_views: int) -> None:
    points, views = normal(7, 0), [normal(sum(sizes), 1 + view) for view in range(num_views)]
    result, first = NearestSamples.none(len(points), k), 0
    for size in sizes:
        block = [view[first : first + size] for view in views]
        result = result.merge(nearest_samples(points, block, first, k, scale=0.5))
        first += size
    stacked, point = torch.stack(views).numpy(), points.numpy()
    expected = 0.5 * np.sqrt(((point[:, None, None] - stacked[None]) ** 2).sum(-1)).min(1)  # (N, M)
    count = min(k, sum(sizes))
    assert np.array_equal(result.rows[:, :count], expected.argsort(1)[:, :count])
    assert result.distances[:, :count].numpy() == pytest.approx(np.sort(expected, 1)[:, :count])
    assert (result.rows[:, count:] == -1).all() and result.distances[:, count:].isinf().all()


def test_the_points_of_large_sets_are_compared_in_blocks() -> None:
    points, samples = normal(2500, 0, 2), normal(50, 1, 2)
    whole = nearest_samples(points, [samples])
    parts = NearestSamples.join([nearest_samples(part, [samples]) for part in points.split(700)])
    assert torch.equal(whole.rows, parts.rows)


def measured(generated: Tensor, held_back: Tensor, training: Tensor) -> Memorisation:
    return Memorisation.of(nearest_samples(generated, [training]), nearest_samples(held_back, [training]))


def test_copies_are_found_and_new_images_are_not() -> None:
    """One percent of images from the distribution of the held-back ones lies below their quantile."""
    training, held_back, new = normal(500, 0), normal(4000, 1), normal(4000, 2)
    copies = training[torch.arange(4000) % 500] + 0.01 * normal(4000, 3)
    all_new, half, all_copies = (
        measured(images, held_back, training) for images in (new, torch.cat([new[:2000], copies[:2000]]), copies)
    )
    assert all_new.memorised == pytest.approx(0.01, abs=0.008), "more than four standard errors"
    assert half.memorised == pytest.approx(0.505, abs=0.01)
    assert all_copies.memorised == 1
    assert all_copies.ratio < 0.1 < 0.5 < all_new.ratio
    assert all_copies.small_ratio > 0.99 and all_new.small_ratio < 0.05
    assert all_new.nearest == pytest.approx(all_new.held_back_nearest, rel=0.05)
    assert all_new.ratio == pytest.approx(all_new.held_back_ratio, rel=0.02)


def test_a_copy_of_a_duplicate_is_memorised_and_its_ratio_is_one() -> None:
    training = normal(50, 0).repeat(2, 1)
    copies = measured(training[:50] + 0.01 * normal(50, 2), normal(300, 1), training)
    assert copies.memorised == 1 and copies.ratio == pytest.approx(1, abs=1e-6)
    assert 0 <= measured(training, normal(300, 1), training).ratio <= 1, "the distances are 0"
