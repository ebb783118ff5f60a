"""Tests of the probability path and the loss, and their recorded values from the paper's code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.flow.path import direction_error, path_sample, squared_error
from tests.support.recorded_values import recorded

SMALL = settings(max_examples=30, deadline=None)


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
    first, second = (path_sample(data, noise, torch.full((5,), t)) for t in (start, start + length))
    torch.testing.assert_close((second.state - first.state) / length, first.velocity, atol=1e-4, rtol=1e-4)
    assert torch.equal(first.velocity, second.velocity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_path_and_loss_are_float32_for_inputs_of_every_dtype(dtype: torch.dtype) -> None:
    data, noise = (tensor.to(dtype) for tensor in pair())
    sample = path_sample(data, noise, torch.rand(5).to(dtype))
    loss = squared_error(data, noise)
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
    whole = squared_error(predicted, target)
    torch.testing.assert_close(whole[2:3], squared_error(predicted[2:3], target[2:3]))
    torch.testing.assert_close(whole.mean(), torch.nn.functional.mse_loss(predicted, target))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    data, noise = pair()
    with pytest.raises(AssertionError, match="time"):
        path_sample(data, noise, torch.rand(4))
    with pytest.raises(AssertionError, match="noise"):
        path_sample(data, noise[:1], torch.rand(5))


def test_the_direction_error_is_one_minus_the_cosine_of_each_place() -> None:
    predicted, target = pair()
    angle = torch.nn.functional.cosine_similarity(predicted, target, dim=1)
    torch.testing.assert_close(direction_error(predicted, target), (1 - angle).flatten(1).mean(1))
    torch.testing.assert_close(direction_error(2 * target, target), torch.zeros(5))


def test_the_gradient_of_the_direction_is_bounded_at_a_velocity_of_zero() -> None:
    """All velocities are zero at the start of training, since the last layer is initialized to zero."""
    predicted = torch.zeros(5, 4, 3, 3, requires_grad=True)
    _, target = pair()
    norms = []
    for error in (squared_error, direction_error):
        (gradient,) = torch.autograd.grad(error(predicted, target).sum(), predicted)
        norms.append(gradient.norm())
    assert 0 < norms[1] < 20 * norms[0]


def test_state_target_and_loss_are_those_of_the_paper() -> None:
    theirs = recorded("loss")
    sample = path_sample(theirs["z0"], theirs["z1"], theirs["t"])
    assert torch.equal(sample.state, theirs["z_t"])
    assert torch.equal(sample.velocity, theirs["u"])
    loss = squared_error(theirs["v"], sample.velocity).mean()
    torch.testing.assert_close(loss, theirs["loss"], atol=1e-6, rtol=0)
