"""Tests of the time samplers: their range, their distribution and their shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.flow.time_samplers import TIME_SAMPLERS, logit_normal_time, shifted_time, uniform_time

SMALL = settings(max_examples=30, deadline=None)
SAMPLERS = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
    "logit_normal towards noise": lambda uniform: logit_normal_time(uniform, mean=1.0, std=2.0),
    "shifted towards noise": lambda uniform: shifted_time(uniform, 3.0),
    "shifted towards data": lambda uniform: shifted_time(uniform, 0.25),
}


@pytest.mark.parametrize("name", SAMPLERS)
@SMALL
@given(uniform=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=2, max_size=50))
def test_times_rise_with_the_uniform_and_stay_between_0_and_1(name: str, uniform: list[float]) -> None:
    time = SAMPLERS[name](torch.tensor(sorted([*uniform, 0.0, 1 - 2.0**-24])))
    assert time.dtype == torch.float32
    assert time.isfinite().all() and time.min() >= 0 and time.max() <= 1
    assert (time.diff() >= -1e-7).all()


def test_logit_normal_times_have_normal_logits() -> None:
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    logits = torch.logit(logit_normal_time(uniform, mean=0.5, std=0.8).double())
    assert logits.mean() == pytest.approx(0.5, abs=2e-3)
    assert logits.std() == pytest.approx(0.8, abs=2e-3)


def test_logit_normal_times_have_finite_logits_at_both_ends() -> None:
    ends = logit_normal_time(torch.tensor([0.0, 1 - 2.0**-24]))
    assert torch.logit(ends).isfinite().all()


def test_a_shift_above_1_prefers_noise_and_1_is_none() -> None:
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shifted_time(uniform, 1.0), uniform)
    assert (shifted_time(uniform, 2.0) >= uniform).all()
    torch.testing.assert_close(shifted_time(shifted_time(uniform, 3.0), 1 / 3), uniform)


def test_every_sampler_can_be_asked_for_by_name() -> None:
    uniform = torch.rand(5)
    assert torch.equal(TIME_SAMPLERS["uniform"](uniform), uniform)
    assert torch.equal(TIME_SAMPLERS["logit_normal"](uniform), logit_normal_time(uniform))
