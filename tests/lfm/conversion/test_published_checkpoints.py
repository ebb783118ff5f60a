"""Tests of the conversion of published checkpoints: the converted network computes the same."""

from __future__ import annotations

import torch

from lfm.conversion import published_checkpoints
from lfm.models.dit import DiT
from lfm.types import Condition
from tests.support.models import randomized_dit
from tests.support.published import PUBLISHED_DIT, published_inputs, published_state
from tests.support.recorded_values import FOLDER, recorded


@torch.no_grad()
def test_without_classes_the_null_class_becomes_part_of_the_time_embedding() -> None:
    state, theirs = torch.load(FOLDER / "dit_class_model.pth", weights_only=True), recorded("dit_class_io")
    weights, config = published_checkpoints.from_state_dict(state, "lfm", num_heads=4, num_classes=0)
    assert config.num_classes is None and config.condition_dropout == 0
    model = DiT(config).eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(model(theirs["x"], theirs["t"], Condition()), theirs["out_y_none"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_reversal_of_the_time_of_sit_is_exact() -> None:
    theirs, (state, time, condition) = randomized_dit(PUBLISHED_DIT).eval(), published_inputs()
    weights, config = published_checkpoints.from_state_dict(published_state(theirs, variance=True), "sit", num_heads=2)
    assert config == PUBLISHED_DIT
    ours = DiT(config).eval()
    ours.load_state_dict(weights)
    torch.testing.assert_close(ours(state, time, condition), -theirs(state, 1 - time, condition), atol=1e-5, rtol=1e-5)
