"""Tests of the training loss: its formula, its gradients, and the tokens that terms ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from lfm.flow.path import direction_error, path_sample, squared_error
from lfm.training import loss_terms
from lfm.training.loss_terms import LOSS_TERMS, LossInputs, LossTerm, TrainingLoss
from lfm.types import Condition, LatentBatch
from tests.support.models import SMALL_DIT, randomized_dit
from tests.support.recorded_values import recorded

BATCH = 5


@pytest.fixture
def batch() -> LatentBatch:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, BATCH, *SMALL_DIT.latent_shape, generator=generator)
    classes = torch.arange(BATCH)
    return LatentBatch(classes, data, noise, torch.rand(BATCH, generator=generator), Condition(class_index=classes))


def gradients(loss: Tensor, model: torch.nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def test_a_sole_velocity_term_is_the_squared_error_bit_for_bit(batch: LatentBatch) -> None:
    model = randomized_dit(SMALL_DIT)
    loss, terms = TrainingLoss([LossTerm("velocity"), LossTerm("direction", 0.0)])(model, batch, batch.uniform)
    example = path_sample(batch.latents, batch.noise, batch.uniform)
    expected = squared_error(model(example.state, example.time, batch.condition), example.velocity).mean()
    assert torch.equal(loss, expected) and terms == {"velocity": expected}
    for gradient, other in zip(gradients(loss, model), gradients(expected, model), strict=True):
        assert torch.equal(gradient, other)


def test_terms_are_summed_with_their_weights_bit_for_bit(batch: LatentBatch) -> None:
    model = randomized_dit(SMALL_DIT)
    loss, terms = TrainingLoss([LossTerm("velocity"), LossTerm("direction", 0.3)], 1e-3)(model, batch, batch.uniform)
    example = path_sample(batch.latents, batch.noise, batch.uniform, 1e-3)
    predicted = model(example.state, example.time, batch.condition)
    errors = squared_error(predicted, example.velocity), direction_error(predicted, example.velocity)
    expected = (errors[0] + 0.3 * errors[1]).mean()
    assert torch.equal(loss, expected)
    assert terms == {"velocity": errors[0].mean(), "direction": errors[1].mean()}
    assert not any(term.requires_grad for term in terms.values())
    for gradient, other in zip(gradients(loss, model), gradients(expected, model), strict=True):
        assert torch.equal(gradient, other)


def test_the_loss_is_that_of_the_paper() -> None:
    values = recorded("loss")
    batch = LatentBatch(torch.arange(len(values["t"])), values["z0"], values["z1"], values["t"], Condition())
    loss, _ = TrainingLoss([LossTerm("velocity")])(lambda *_: values["v"], batch, values["t"])
    torch.testing.assert_close(loss, values["loss"], atol=1e-6, rtol=0)


def test_each_term_gets_the_tokens_that_it_asks_for(batch: LatentBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network computes each block's tokens once, and returns none if no term asks for any."""
    calls: dict[str, LossInputs] = {}

    def record(name: str) -> Callable[[LossInputs], Tensor]:
        def term(inputs: LossInputs) -> Tensor:
            calls[name] = inputs
            return sum((tokens.square().mean((1, 2)) for tokens in inputs.tokens), torch.zeros(BATCH))

        return term

    table: Mapping[str, Callable[[LossInputs], Tensor]] = {
        **LOSS_TERMS,
        **{name: record(name) for name in ("early", "both", "none")},
    }
    monkeypatch.setattr(loss_terms, "LOSS_TERMS", table)
    model = randomized_dit(SMALL_DIT)
    terms = [
        LossTerm("velocity"),
        LossTerm("early", 0.5, token_blocks=(0,)),
        LossTerm("both", 0.5, token_blocks=(1, 0)),
        LossTerm("none", 1.0),
    ]
    loss, means = TrainingLoss(terms)(model, batch, batch.uniform)
    assert list(means) == ["velocity", "early", "both", "none"]
    example = path_sample(batch.latents, batch.noise, batch.uniform)
    predicted, tokens = model(example.state, example.time, batch.condition, None, (0, 1))
    assert [len(calls[name].tokens) for name in ("early", "both", "none")] == [1, 2, 0]
    for tokens_of_term, expected in (
        (calls["early"].tokens, (tokens[0],)),
        (calls["both"].tokens, (tokens[1], tokens[0])),
    ):
        assert all(torch.equal(one, other) for one, other in zip(tokens_of_term, expected, strict=True))
    inputs = calls["none"]
    assert torch.equal(inputs.predicted, predicted) and torch.equal(inputs.velocity, example.velocity)
    assert inputs.data is batch.latents and inputs.noise is batch.noise and torch.equal(inputs.time, batch.uniform)
    without, _ = TrainingLoss([LossTerm("velocity")])(model, batch, batch.uniform)
    assert torch.equal(means["velocity"], without), "tokens do not change the velocity"
    assert any(gradient.abs().sum() > 0 for gradient in gradients(loss - without, model))


def test_no_tokens_are_asked_for_without_need(batch: LatentBatch) -> None:
    def network(*arguments: object) -> Tensor:
        assert len(arguments) == 4
        return batch.noise

    TrainingLoss([LossTerm("velocity"), LossTerm("direction", 0.0, token_blocks=(1,))])(network, batch, batch.uniform)
