"""Tests of the scaling of learning rate and initial weights by width (muP)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lfm.models.dit import DiT
from lfm.training.parameter_groups import parameter_groups
from lfm.types import Condition
from tests.support.models import SMALL_DIT

REFERENCE, WIDTHS = 64, (64, 128, 256)


def build(width: int) -> DiT:
    torch.manual_seed(0)
    return DiT(dataclasses.replace(SMALL_DIT, hidden_size=width, num_heads=width // 16))


def trained_features(width: int, num_steps: int, *, scaled: bool) -> tuple[float, float]:
    """Return the root mean squares of velocity and last tokens after some steps of Adam."""
    model = build(width)
    factors = model.scale_for_width(REFERENCE) if scaled else None
    groups = parameter_groups(model, 0.0, None, factors)
    optimizer = torch.optim.AdamW([group | {"lr": 2e-3 * group.get("rate_factor", 1.0)} for group in groups], eps=1e-12)
    random = torch.Generator().manual_seed(1)
    state, target = torch.randn(2, 8, 4, 8, 8, generator=random)
    time, classes = torch.rand(8, generator=random), Condition(torch.arange(8))
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(state, time, classes) - target).square().mean().backward()
        optimizer.step()

    def size(values: Tensor) -> float:
        return float(values.detach().square().mean().sqrt())

    velocity, (tokens,) = model(state, time, classes, None, (1,))
    return size(velocity), size(tokens)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_coordinates_change_alike_at_all_widths(num_steps: int) -> None:
    """The coordinate check of Yang & Hu: with the scaling no size depends on the width, without it the velocity's does."""
    first, *wider = (trained_features(width, num_steps, scaled=True) for width in WIDTHS)
    for sizes in wider:
        assert sizes == pytest.approx(first, rel=0.15)
    if num_steps == 1:
        plain = [trained_features(width, num_steps, scaled=False)[0] for width in WIDTHS]
        assert plain[1] > 1.8 * plain[0] and plain[2] > 1.8 * plain[1]


def test_at_the_reference_width_nothing_changes() -> None:
    plain, scaled = build(REFERENCE), build(REFERENCE)
    factors = scaled.scale_for_width(REFERENCE)
    assert set(factors.values()) == {1.0}
    for name, value in plain.state_dict().items():
        assert torch.equal(scaled.state_dict()[name], value), name


def test_every_parameter_is_in_one_group_with_its_factor() -> None:
    model = build(128)
    factors = model.scale_for_width(REFERENCE)
    groups = parameter_groups(model, 0.1, None, factors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    for name, group in found.items():
        has_features = name.endswith("weight") and not name.startswith(
            ("patch_embedding", "class_embedding", "time_embedding.mlp.0")
        )
        assert group["rate_factor"] == (0.5 if has_features else 1.0), name
