"""Tests of guidance by the network with dropped tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lfm import autoencoder as autoencoders
from lfm.errors import ConfigError
from lfm.inference.trained_model import TrainedModel
from lfm.models.dit import DiT
from lfm.types import Condition
from tests.support.models import SMALL_DIT, WEIGHTS_HEADER, dit_inputs, randomized_dit

DROPPING = dataclasses.replace(SMALL_DIT, depth=4, token_dropout=0.5)


def trained(network: DiT) -> TrainedModel:
    header = dataclasses.replace(WEIGHTS_HEADER, model=network.config)
    return TrainedModel(network.eval(), header, autoencoders.load("embedded"))


def test_it_extrapolates_from_the_velocity_of_few_tokens_within_its_interval() -> None:
    network = randomized_dit(DROPPING)
    model = trained(network)
    state, _, classes = dit_inputs()
    time, rows = torch.tensor([0.2, 0.2, 0.9]), torch.arange(3)
    condition = Condition(classes)
    guidance = model.guidance(2.0, (0.0, 0.5), sparse=True)
    field = model.velocity(condition, 3, guidance)
    result = field(state, time, rows)
    full = network(state, time, condition)
    assert torch.equal(result[2], full[2]) and field.nfe.tolist() == [2, 2, 1]
    assert guidance.weak is not None
    weak = guidance.weak(state, time, condition)
    assert not torch.allclose(weak, full)
    torch.testing.assert_close(result[:2], (weak + 2 * (full - weak))[:2])
    for row in range(3):  # no image depends on the others
        alone = guidance.weak(state[row : row + 1], time[row : row + 1], Condition(classes[row : row + 1]))
        torch.testing.assert_close(alone[0], weak[row])
    other = guidance.weak(state, time + 0.01, condition) - network(state, time + 0.01, condition)
    assert not torch.allclose(other, weak - full, atol=1e-3), "other tokens at another time"


def test_a_model_without_token_dropout_and_two_ways_at_once_are_refused() -> None:
    plain, dropping = trained(randomized_dit(SMALL_DIT)), trained(randomized_dit(DROPPING))
    with pytest.raises(ConfigError, match=r": was trained without model\.token_dropout; choose another guidance"):
        plain.guidance(2.0, sparse=True)
    with pytest.raises(ConfigError, match="`internal_guidance`, `sparse_guidance`: are different ways"):
        dropping.guidance(2.0, internal=True, sparse=True)
    with pytest.raises(ConfigError, match="`autoguidance`, `sparse_guidance`"):
        dropping.guidance(2.0, autoguidance=plain, sparse=True)
