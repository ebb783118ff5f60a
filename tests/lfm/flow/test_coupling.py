"""Tests of the assignment of noise to data."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.random_draws import draw_candidates, draw_noise
from lfm.flow.coupling import couple, nearest


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), group=st.sampled_from([2, 3, 4]), first=st.integers(0, 2**40))
def test_coupling_minimizes_the_squared_distance_within_each_group(seed: int, group: int, first: int) -> None:
    random = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 12, 1, 2, 2, generator=random)
    order = torch.randperm(12, generator=random)  # a batch may come in any order
    coupled = couple(data[order], noise[order], first + order, group)[order.argsort()]
    for rows in torch.arange(12).split(group):
        mine = data[rows]
        best = min(float((mine - noise[rows][list(p)]).square().sum()) for p in permutations(range(group)))
        assert float((mine - coupled[rows]).square().sum()) == pytest.approx(best, rel=1e-5)
        matches = (coupled[rows][:, None] == noise[rows][None]).flatten(2).all(2)
        assert matches.sum(0).tolist() == matches.sum(1).tolist() == [1] * group
        assert torch.equal(coupled[rows], couple(mine, noise[rows], rows, group)), "each group by itself"
    assert torch.equal(couple(data, noise, order, 1), noise)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 5), batch=st.integers(1, 6))
def test_each_sample_takes_the_nearest_noise_whatever_its_batch(seed: int, count: int, batch: int) -> None:
    data = torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    numbers = torch.arange(batch) + seed

    def assigned(rows: torch.Tensor) -> torch.Tensor:
        candidates = draw_candidates(seed, numbers[rows], (2, 3, 3), count)
        return nearest(data[rows], draw_noise(seed, numbers[rows], (2, 3, 3))[1], candidates)

    together = assigned(torch.arange(batch))
    noises = [draw_noise(seed, numbers, (2, 3, 3))[1], *draw_candidates(seed, numbers, (2, 3, 3), count)]
    assert len(noises) == count + 1
    distances = torch.stack([(data - noise).square().flatten(1).sum(1) for noise in noises])
    for row, best in enumerate(distances.argmin(0).tolist()):
        assert torch.equal(together[row], noises[best][row])
        assert torch.equal(together[row], assigned(torch.tensor([row]))[0])


def test_the_candidates_are_independent_normal_noises() -> None:
    numbers = torch.arange(3000)
    noises = [*draw_noise(2, numbers, (1,)), *draw_candidates(2, numbers, (1,), 4)]
    correlations = torch.corrcoef(torch.cat(noises, 1).T)
    assert (correlations - torch.eye(6)).abs().max() < 5 / 3000**0.5
    assert all(abs(noise.mean()) < 5 / 3000**0.5 and abs(noise.var() - 1) < 0.15 for noise in noises)
