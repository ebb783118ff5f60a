"""Tests of guidance: its formula on all channels, its cost, and the guided output recorded from the paper's code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lfm.flow.guidance import GuidedVelocity, NetworkVelocity
from lfm.flow.null_condition import null_condition
from lfm.solvers import solve
from lfm.types import Condition
from tests.support.recorded_values import CONFIG, recorded, recorded_model

NUM_CLASSES = 3


class Pull(nn.Module):
    """A network whose velocity is the class index times the number of the channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.rows_seen: list[int] = []

    def forward(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert condition.class_index is not None
        self.rows_seen.append(len(state))
        channel = torch.arange(1, state.shape[1] + 1).view(1, -1, 1, 1)
        return self.gain * condition.class_index.view(-1, 1, 1, 1) * channel * torch.ones_like(state)


def guided(scale: float, classes: list[int], model: nn.Module | None = None) -> GuidedVelocity:
    model = model or Pull()
    condition = Condition(torch.tensor(classes))
    null = null_condition(condition, 0.1, num_classes=NUM_CLASSES)
    return GuidedVelocity(
        NetworkVelocity(model, condition, len(classes)), NetworkVelocity(model, null, len(classes)), scale
    )


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0, 10))
def test_guidance_is_its_formula_on_every_channel(scale: float) -> None:
    velocity = guided(scale, [0, 2])(torch.zeros(2, 5, 2, 2), torch.zeros(2), torch.arange(2))
    channel = torch.arange(1.0, 6.0)
    for row, class_index in enumerate([0, 2]):
        expected = channel * (NUM_CLASSES + scale * (class_index - NUM_CLASSES))
        torch.testing.assert_close(velocity[row], expected.view(-1, 1, 1).expand(5, 2, 2), atol=1e-4, rtol=1e-5)


def test_scale_1_does_not_evaluate_the_null_condition() -> None:
    field = guided(1.0, [0, 1])
    plain = NetworkVelocity(Pull(), Condition(torch.tensor([0, 1])), 2)
    noise = torch.randn(2, 4, 2, 2)
    assert torch.equal(solve("heun", field, noise, num_steps=5), solve("heun", plain, noise, num_steps=5))
    assert field.weak.nfe.tolist() == [0, 0]
    assert field.nfe.tolist() == plain.nfe.tolist() == [10, 10]


@pytest.mark.parametrize(("solver", "per_step"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_guidance_counts_twice(solver: str, per_step: int) -> None:
    field = guided(1.5, [0, 1])
    solve(solver, field, torch.randn(2, 4, 2, 2), num_steps=7)
    assert field.nfe.dtype == torch.int64
    assert field.nfe.tolist() == [2 * 7 * per_step] * 2


def test_outside_of_the_interval_there_is_no_guidance_and_no_cost() -> None:
    field = guided(3.0, [0, 1, 2])
    field.interval = (0.2, 0.8)
    state, time = torch.zeros(3, 1, 1, 1), torch.tensor([0.1, 0.5, 0.9])
    plain = field.velocity(state, time, torch.arange(3)).flatten()
    out = field(state, time, torch.arange(3)).flatten()
    assert out[[0, 2]].tolist() == plain[[0, 2]].tolist()
    assert out[1] == NUM_CLASSES + 3.0 * (plain[1] - NUM_CLASSES)
    assert field.nfe.tolist() == [2, 3, 2]


def test_every_evaluated_row_is_counted_and_no_other() -> None:
    model = Pull()
    velocity = NetworkVelocity(model, Condition(torch.tensor([0, 1, 2])), 3)
    state = torch.zeros(2, 4, 2, 2)
    out = velocity(state, torch.zeros(2), torch.tensor([2, 0]))
    assert out[:, 0, 0, 0].tolist() == [2, 0]  # each row has its own condition
    assert velocity.nfe.tolist() == [1, 0, 1]
    assert int(velocity.nfe.sum()) == sum(model.rows_seen)


def test_the_network_is_evaluated_without_gradients() -> None:
    assert not guided(2.0, [1])(torch.zeros(1, 4, 2, 2), torch.zeros(1), torch.arange(1)).requires_grad


@pytest.mark.parametrize(("scale", "name"), [(1.5, "cfg.out_1p5_t_batch"), (4.0, "cfg.out_4p0_t_scalar")])
def test_guided_output_is_that_of_the_paper(scale: float, name: str) -> None:
    reference, model = recorded("dit_class_io"), recorded_model()
    assert CONFIG.num_classes is not None
    condition = Condition(reference["cfg.y"][:5])
    null = null_condition(condition, CONFIG.condition_dropout, num_classes=CONFIG.num_classes)
    assert null.class_index is not None and torch.equal(null.class_index, reference["cfg.y"][5:])
    field = GuidedVelocity(NetworkVelocity(model, condition, 5), NetworkVelocity(model, null, 5), scale)
    time = reference["t_scalar"].expand(5) if name.endswith("scalar") else reference["t"]
    out = field(reference["cfg.x"], time, torch.arange(5))
    torch.testing.assert_close(out, reference[name], atol=1e-5, rtol=0)
