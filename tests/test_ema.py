"""The average follows its formula in float32, and lending its place to the masters leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.ema import Ema, decay_after

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
    for kept, expected in zip(average(ema, weights), reference, strict=True):
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-6)


@given(step=st.integers(1, 10**9), decay=st.floats(0, 1))
def test_the_decay_rises_to_its_value_and_stays(step: int, decay: float) -> None:
    assert 0 <= decay_after(step, decay) <= decay_after(step + 1, decay) <= decay
    assert decay_after(10**12, decay) == pytest.approx(decay, abs=1e-9)


def test_a_decay_of_0_9999_moves_in_float32() -> None:
    """In bfloat16 it would not: the reason why it is kept in float32."""
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


def test_restart_takes_the_masters_as_they_are() -> None:
    weights = masters()
    ema = Ema(weights)
    for weight in weights:
        weight.mul_(3)
    ema.restart()
    assert all(torch.equal(kept, weight) for kept, weight in zip(average(ema, weights), weights, strict=True))
