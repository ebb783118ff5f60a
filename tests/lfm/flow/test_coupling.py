"""Tests of minibatch optimal transport."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.flow.coupling import couple


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
