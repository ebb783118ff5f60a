"""The path's ends, its derivative, the time samplers' range and law, and the recorded loss."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.flow.path import (
    TIME_SAMPLERS,
    couple,
    logit_normal_time,
    path_sample,
    shifted_time,
    uniform_time,
    velocity_loss,
)
from tests.support.recorded_values import recorded

SMALL = settings(max_examples=30, deadline=None)
SAMPLERS = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
    "logit_normal towards noise": lambda uniform: logit_normal_time(uniform, mean=1.0, std=2.0),
    "shifted towards noise": lambda uniform: shifted_time(uniform, 3.0),
    "shifted towards data": lambda uniform: shifted_time(uniform, 0.25),
}


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    data, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    return data, noise


@SMALL
@given(seed=st.integers(0, 2**31), sigma_min=st.floats(0, 0.1))
def test_the_path_begins_at_data_and_ends_at_noise(seed: int, sigma_min: float) -> None:
    data, noise = pair(seed)
    torch.testing.assert_close(path_sample(data, noise, torch.zeros(5), sigma_min).state, data + sigma_min * noise)
    torch.testing.assert_close(path_sample(data, noise, torch.ones(5), sigma_min).state, noise)


@SMALL
@given(start=st.floats(0, 0.5), length=st.floats(0.1, 0.5))
def test_the_velocity_is_the_derivative_of_the_state(start: float, length: float) -> None:
    data, noise = pair()
    here, there = (path_sample(data, noise, torch.full((5,), t)) for t in (start, start + length))
    torch.testing.assert_close((there.state - here.state) / length, here.velocity, atol=1e-4, rtol=1e-4)
    assert torch.equal(here.velocity, there.velocity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_path_and_loss_are_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    data, noise = (tensor.to(dtype) for tensor in pair())
    sample = path_sample(data, noise, torch.rand(5).to(dtype))
    loss = velocity_loss(data, noise)
    assert {sample.state.dtype, sample.time.dtype, sample.velocity.dtype, loss.dtype} == {torch.float32}
    assert loss.shape == (5,)


def test_the_path_is_float32_under_autocast() -> None:
    data, noise = pair()
    time = torch.rand(5, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = path_sample(data, noise, time)
    assert torch.equal(cast.state, path_sample(data, noise, time).state)


def test_a_row_of_the_loss_depends_on_its_row_alone() -> None:
    predicted, target = pair()
    whole = velocity_loss(predicted, target)
    torch.testing.assert_close(whole[2:3], velocity_loss(predicted[2:3], target[2:3]))
    torch.testing.assert_close(whole.mean(), torch.nn.functional.mse_loss(predicted, target))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    data, noise = pair()
    with pytest.raises(AssertionError, match="time"):
        path_sample(data, noise, torch.rand(4))
    with pytest.raises(AssertionError, match="noise"):
        path_sample(data, noise[:1], torch.rand(5))


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


def test_the_direction_adds_one_minus_the_cosine_of_each_place() -> None:
    predicted, target = pair()
    angle = torch.nn.functional.cosine_similarity(predicted, target, dim=1)
    expected = velocity_loss(predicted, target) + 0.5 * (1 - angle).flatten(1).mean(1)
    torch.testing.assert_close(velocity_loss(predicted, target, 0.5), expected)
    assert torch.equal(velocity_loss(predicted, target, 0.0), velocity_loss(predicted, target))
    torch.testing.assert_close(velocity_loss(2 * target, target, 7.0), velocity_loss(2 * target, target))


def test_the_direction_does_not_drown_the_rest_where_the_velocity_is_zero() -> None:
    """As it is everywhere at the start of training, for the network's last layer begins at zero."""
    predicted = torch.zeros(5, 4, 3, 3, requires_grad=True)
    _, target = pair()
    norms = []
    for weight in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(velocity_loss(predicted, target, weight).sum(), predicted)
        norms.append(gradient.norm())
    assert norms[0] < norms[1] < 20 * norms[0]


@SMALL
@given(seed=st.integers(0, 2**31), group=st.sampled_from([2, 3, 4]), first=st.integers(0, 2**40))
def test_coupling_deals_noise_out_within_each_group_where_it_is_nearest(seed: int, group: int, first: int) -> None:
    random = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 12, 1, 2, 2, generator=random)
    order = torch.randperm(12, generator=random)  # a batch may come in any order
    coupled = couple(data[order], noise[order], first + order, group)[order.argsort()]
    for rows in torch.arange(12).split(group):
        mine = data[rows]
        best = min(float((mine - noise[rows][list(p)]).square().sum()) for p in permutations(range(group)))
        assert float((mine - coupled[rows]).square().sum()) == pytest.approx(best, rel=1e-5)
        dealt = (coupled[rows][:, None] == noise[rows][None]).flatten(2).all(2)
        assert dealt.sum(0).tolist() == dealt.sum(1).tolist() == [1] * group
        assert torch.equal(coupled[rows], couple(mine, noise[rows], rows, group)), "each group by itself"
    assert torch.equal(couple(data, noise, order, 1), noise)


def test_state_target_and_loss_are_those_of_the_paper() -> None:
    theirs = recorded("loss")
    sample = path_sample(theirs["z0"], theirs["z1"], theirs["t"])
    assert torch.equal(sample.state, theirs["z_t"])
    assert torch.equal(sample.velocity, theirs["u"])
    loss = velocity_loss(theirs["v"], sample.velocity).mean()
    torch.testing.assert_close(loss, theirs["loss"], atol=1e-6, rtol=0)
