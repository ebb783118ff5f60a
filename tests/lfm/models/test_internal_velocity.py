"""Tests of the heads of the early blocks, a velocity and a clean latent, of their losses, and of internal guidance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lfm.flow.guidance import Guidance
from lfm.flow.path import path_sample, squared_error
from lfm.inference.trained_model import guided_velocity
from lfm.models.dit import DiT
from lfm.training.loss_terms import LossTerm, TrainingLoss
from lfm.types import Condition, LatentBatch
from tests.support.models import SMALL_DIT, dit_inputs, randomized_dit

INTERNAL = dataclasses.replace(SMALL_DIT, depth=4, internal_head=True)
BOTH = dataclasses.replace(INTERNAL, latent_head=True)


@pytest.fixture
def model() -> DiT:
    return randomized_dit(INTERNAL)


def test_the_head_changes_no_velocity_and_depends_on_the_early_blocks_alone(model: DiT) -> None:
    state, time, classes = dit_inputs()
    condition = Condition(classes)
    both, (tokens,) = model(state, time, condition, None, (3,), True)
    assert both.shape == (2, *state.shape) and both.dtype == torch.float32
    assert torch.equal(both[0], model(state, time, condition)) and not torch.equal(both[0], both[1])
    assert torch.equal(tokens, model(state, time, condition, None, (3,))[1][0])
    reached = torch.autograd.grad(both[1].square().sum(), list(model.parameters()), allow_unused=True)
    pairs = zip(model.named_parameters(), reached, strict=True)
    late = {name for (name, _), grad in pairs if grad is None or not grad.any()}
    assert INTERNAL.internal_block == 0
    assert {name.split(".")[1] for name in late if name.startswith("blocks")} == {"1", "2", "3"}
    assert {name for name in late if not name.startswith("blocks")} == {
        name for name, _ in model.named_parameters() if name.startswith("final")
    }


def test_a_model_without_the_head_has_the_weights_of_before() -> None:
    without = dataclasses.replace(INTERNAL, internal_head=False)
    torch.manual_seed(0)
    first = DiT(without).state_dict()
    torch.manual_seed(0)
    second = DiT(INTERNAL).state_dict()
    assert all(name.startswith("internal_final") for name in second.keys() - first.keys())
    shared = [torch.equal(tensor, second[name]) for name, tensor in first.items()]
    assert sum(shared) > len(shared) / 2, "zeros, at least; the others are drawn in the same order"


@pytest.mark.parametrize("flags", [(False, True), (True, True)])
def test_the_latent_head_changes_no_velocity_and_needs_the_early_blocks_alone(flags: tuple[bool, bool]) -> None:
    state, time, classes = dit_inputs()
    model = randomized_dit(BOTH)
    heads = model(state, time, Condition(classes), None, (), *flags)
    assert heads.shape == (1 + sum(flags), *state.shape)
    assert torch.equal(heads[0], model(state, time, Condition(classes)))
    if flags[0]:
        assert torch.equal(heads[1], model(state, time, Condition(classes), None, (), True)[1])
    reached = torch.autograd.grad(heads[-1].square().sum(), list(model.parameters()), allow_unused=True)
    pairs = zip(model.named_parameters(), reached, strict=True)
    names = {name for (name, _), grad in pairs if grad is not None and grad.any()}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"0"}
    assert not any("final" in name for name in names) and any(name.startswith("latent_head") for name in names)
    torch.manual_seed(0)
    with_head = DiT(BOTH).state_dict()
    torch.manual_seed(0)
    without = DiT(INTERNAL).state_dict()
    shared = [name for name, tensor in without.items() if torch.equal(tensor, with_head[name])]
    assert len(shared) > len(without) / 2, "zeros, at least; the others are drawn in the same order"


def test_the_latent_term_is_the_smooth_l1_error_of_the_data() -> None:
    state, time, classes = dit_inputs()
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(3))
    batch = LatentBatch(torch.arange(len(state)), 3 * state, noise, time, Condition(classes))
    model = randomized_dit(BOTH)
    loss, means = TrainingLoss([LossTerm("velocity"), LossTerm("latent", 0.5, needs_latent=True)])(model, batch, time)
    example = path_sample(batch.latents, noise, time)
    velocity, latent = model(example.state, example.time, batch.condition, None, (), False, True)
    error = (latent - batch.latents).abs()
    expected = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    torch.testing.assert_close(means["latent"], expected)
    torch.testing.assert_close(loss, (velocity - example.velocity).square().mean() + 0.5 * expected)


def test_the_operations_are_counted(model: DiT) -> None:
    state, time, classes = dit_inputs()
    counts = []
    for internal in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(state, time, Condition(classes), None, (), internal)
        counts.append(counter.get_total_flops())
    without = dataclasses.replace(INTERNAL, internal_head=False)
    assert counts[1] - counts[0] == len(state) * (INTERNAL.flops_per_sample - without.flops_per_sample) > 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        randomized_dit(BOTH)(state, time, Condition(classes), None, (), True, True)
    added = counter.get_total_flops() - counts[1]
    assert added == len(state) * (BOTH.flops_per_sample - INTERNAL.flops_per_sample) > 0


def test_the_loss_is_the_error_of_both_velocities_and_its_gradients_are_right(model: DiT) -> None:
    state, time, classes = dit_inputs()
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(3))
    batch = LatentBatch(torch.arange(len(state)), state, noise, time, Condition(classes))
    terms = [
        LossTerm("velocity"),
        LossTerm("internal", 0.5, needs_internal=True),
        LossTerm("layer_sync", 0.2, token_blocks=(0, 2)),
    ]
    loss, means = TrainingLoss(terms)(model, batch, time)
    example = path_sample(batch.latents, batch.noise, time)
    both, (early, late) = model(example.state, example.time, batch.condition, None, (0, 2), True)
    cosine = torch.nn.functional.cosine_similarity(early, late, -1).mean(-1)
    expected = squared_error(both[0], example.velocity) + 0.5 * squared_error(both[1], example.velocity)
    torch.testing.assert_close(loss, (expected + 0.2 * (1 - cosine)).mean())
    assert set(means) == {"velocity", "internal", "layer_sync"}
    aligned, _ = TrainingLoss([LossTerm("layer_sync", 1.0, token_blocks=(0, 2))])(model, batch, time)
    reached = torch.autograd.grad(aligned, list(model.parameters()), allow_unused=True)
    moved = {name for (name, _), grad in zip(model.named_parameters(), reached, strict=True) if grad is not None}
    assert {name.split(".")[1] for name in moved if name.startswith("blocks")} == {"0"}, "the later block stays"

    # Central differences in float64, along a random direction.
    model = model.double()
    inputs = dataclasses.replace(batch, latents=state.double(), noise=noise.double())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    sync_free = TrainingLoss(terms[:2])  # a stopped gradient is no derivative
    slope = sum(
        (grad * along).sum()
        for grad, along in zip(
            torch.autograd.grad(sync_free(model, inputs, time)[0], parameters), direction, strict=True
        )
    )
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += sign * 1e-3 * along
            losses.append(sync_free(model, inputs, time)[0])
            for parameter, along in zip(parameters, direction, strict=True):
                parameter -= sign * 1e-3 * along
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-3, slope, rtol=2e-2, atol=1e-3, check_dtype=False)


def test_internal_guidance_extrapolates_within_its_interval_and_counts_each_evaluation_once(model: DiT) -> None:
    state, _, classes = dit_inputs()
    condition, count = Condition(classes), len(state)
    time, rows = torch.linspace(0.1, 0.9, count), torch.arange(count)
    guidance = Guidance(2.5, (0.0, 0.5), internal=True)
    field = guided_velocity(model, INTERNAL, condition, count, guidance)
    final, early = model(state, time, condition, None, (), True)
    expected = torch.where((time <= 0.5)[:, None, None, None], early + 2.5 * (final - early), final)
    torch.testing.assert_close(field(state, time, rows), expected)
    assert field.nfe.tolist() == [1] * count
    plain = guided_velocity(model, INTERNAL, condition, count, Guidance(1.0, internal=True))
    assert torch.equal(plain(state, time, rows), model(state, time, condition))
