"""Tests of the rules by which weights of one configuration become those of another, for every backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.errors import CheckpointError
from lfm.models import registry
from lfm.models.adaptation import Adaptation, resize_of_patches, resize_patch_embedding
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.types import Condition
from tests.support.models import SMALL_DIT, SMALL_OPTIONS, randomized_dit

each_backbone = pytest.mark.parametrize("name", registry.BACKBONES)
CLASSES = {"num_classes": 5, "condition_dropout": 0.1}
INPAINTING = {"condition_channels": 5}
SEMANTIC = {"num_labels": 3, "downsample_factor": 2}


def config_of(name: str, size: int = 8, /, **conditions: Any) -> ModelConfig:
    return registry.BACKBONES[name].options(**SMALL_OPTIONS[name]).build_config(ModelConfig(4, size, **conditions))


def network_of(config: ModelConfig, seed: int = 0) -> VelocityNetwork:
    """A network whose every weight has an influence."""
    torch.manual_seed(seed)
    network = registry.build_network(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def adapted(source: VelocityNetwork, config: ModelConfig, **rows: Any) -> tuple[VelocityNetwork, Adaptation]:
    network = network_of(config, seed=1)
    adaptation = registry.adapt_weights(network, source.state_dict(), source.config, **rows)
    network.load_state_dict(adaptation.result)
    return network, adaptation


def inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Three states and times, with conditions; the last two rows have the classes 1 and null."""
    torch.manual_seed(2)
    classes = None if config.num_classes is None else torch.tensor([0, 1, config.num_classes])
    channels = config.condition_channels
    spatial = torch.randn(3, channels, *config.latent_shape[1:]) if channels else None
    size, labels = config.segmentation_size, config.num_labels or 0
    maps = torch.randint(labels, (3, size, size)) if labels else None
    return torch.randn(3, *config.latent_shape), torch.rand(3), Condition(classes, spatial, maps)


def velocity(network: VelocityNetwork, state: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
    with torch.no_grad():
        output = network(state, time, condition)
    assert isinstance(output, torch.Tensor)
    return output


@each_backbone
def test_the_same_configuration_takes_every_weight_as_it_is(name: str) -> None:
    source = network_of(config_of(name, **CLASSES, **INPAINTING, **SEMANTIC))
    identity = tuple((index,) for index in range(5))
    network, adaptation = adapted(source, source.config, class_rows=identity, label_rows=identity[:3])
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items())
    assert {part.origin for part in adaptation.parts} == {"taken as it is"}
    assert sum(part.num_parameters for part in adaptation.parts) == source.num_parameters


@each_backbone
@pytest.mark.parametrize("new", [INPAINTING, SEMANTIC, CLASSES], ids=["inpainting", "semantic", "class"])
def test_the_first_output_with_a_new_condition_is_that_of_the_source_bit_for_bit(
    name: str, new: dict[str, Any]
) -> None:
    source = network_of(config_of(name))
    network, adaptation = adapted(source, config_of(name, **new))
    state, time, condition = inputs(network.config)
    assert torch.equal(velocity(network, state, time, condition), velocity(source, state, time, Condition()))
    assert {part.origin for part in adaptation.parts} >= {
        "taken as it is",
        "new" if new is not INPAINTING else "adapted",
    }
    back, _ = adapted(network, source.config)
    assert torch.equal(velocity(back, state, time, Condition()), velocity(source, state, time, Condition()))


@each_backbone
def test_a_model_of_classes_becomes_unconditional_at_its_null_class(name: str) -> None:
    source = network_of(config_of(name, **CLASSES))
    network, _ = adapted(source, config_of(name))
    state, time, _ = inputs(network.config)
    null = Condition(torch.full((3,), 5))
    torch.testing.assert_close(velocity(network, state, time, Condition()), velocity(source, state, time, null))


@each_backbone
def test_classes_begin_at_the_rows_that_are_named_for_them(name: str) -> None:
    """Taken, averaged, new; the null class is kept."""
    source = network_of(config_of(name, **CLASSES))
    network, adaptation = adapted(
        source, config_of(name, num_classes=3, condition_dropout=0.2), class_rows=((4,), (), (1, 2))
    )
    state, time, _ = inputs(network.config)

    def at(model: VelocityNetwork, index: int) -> torch.Tensor:
        return velocity(model, state, time, Condition(torch.full((3,), index)))

    torch.testing.assert_close(at(network, 0), at(source, 4))
    torch.testing.assert_close(at(network, 3), at(source, 5))
    rules = " ".join(part.rule for part in adaptation.parts)
    assert "3 classes: 1 taken, 1 averaged from several, 1 new, at the mean row" in rules
    every_class, _ = adapted(source, network.config, class_rows=((0, 1, 2, 3, 4),) * 3)
    torch.testing.assert_close(at(network, 1), at(every_class, 1))
    at_null, _ = adapted(source, network.config, class_rows=((), (), ()), new_classes="null")
    torch.testing.assert_close(at(at_null, 2), at(source, 5))


@each_backbone
def test_labels_begin_at_the_rows_that_are_named_for_them(name: str) -> None:
    source = network_of(config_of(name, condition_dropout=0.1, **SEMANTIC))
    network, _ = adapted(
        source, config_of(name, condition_dropout=0.1, **SEMANTIC | {"num_labels": 2}), label_rows=((2,), (0,))
    )
    state, time, condition = inputs(network.config)
    assert condition.segmentation is not None
    theirs = torch.tensor([2, 0, 3])[condition.segmentation]
    ours = velocity(network, state, time, condition)
    torch.testing.assert_close(ours, velocity(source, state, time, Condition(segmentation=theirs)))


def test_a_network_of_convolutions_computes_the_same_inside_larger_latents() -> None:
    """Here one of a single level without attention, norms of groups apart: all weights are taken for another size."""
    source = network_of(config_of("unet", **CLASSES))
    network, adaptation = adapted(source, config_of("unet", 16, **CLASSES), class_rows=tuple((i,) for i in range(5)))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items())
    assert [part.name for part in adaptation.parts if part.origin == "adapted"] == ["size"]


@settings(deadline=None)
@given(size=st.integers(1, 4), factor=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_token_of_an_enlarged_patch_is_that_of_the_patch(size: int, factor: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, size, size, generator=generator)
    patch = torch.randn(2, size**2, generator=generator)
    larger = resize_patch_embedding(weight, size * factor).flatten(2)
    enlarged = patch.double() @ resize_of_patches(size, size * factor).T
    expected = torch.einsum("wcp,cp->w", weight.flatten(2).double(), patch.double())
    torch.testing.assert_close(torch.einsum("wcp,cp->w", larger.double(), enlarged), expected, atol=1e-4, rtol=1e-4)


def test_a_dit_of_larger_patches_gives_the_enlarged_velocity_of_an_even_latent() -> None:
    """An image that is even within each patch of 2 is that of twice the size in patches of 4; so is its first velocity."""
    source = randomized_dit(replace(SMALL_DIT, num_classes=None, condition_dropout=0.0)).eval()
    larger = replace(source.config, latent_size=16, patch_size=4)
    network, adaptation = adapted(source, larger)
    adapted_parts = {part.name for part in adaptation.parts if part.origin == "adapted"}
    assert adapted_parts == {"patch_embedding.weight", "final.linear.weight", "final.linear.bias"}, (
        "the grid is the same"
    )
    flat = torch.randn(2, 4, 4, 4)

    def enlarged(factor: int) -> torch.Tensor:
        return flat.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    time = torch.rand(2)
    before = velocity(source, enlarged(2), time, Condition())
    after = velocity(network, enlarged(4), time, Condition())
    means = [each.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)) for each in (before, after)]
    torch.testing.assert_close(means[1], means[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "own", "words"),
    [
        (SMALL_DIT, replace(SMALL_DIT, depth=3), "its depth is 2, and 3 here"),
        (SMALL_DIT, replace(SMALL_DIT, qk_norm=True), "its qk_norm is False, and True here"),
        (SMALL_DIT, replace(SMALL_DIT, latent_channels=8), "its latent_channels is 4, and 8 here"),
        (SMALL_DIT, config_of("unet", num_classes=10), "its backbone is dit, and unet here"),
        (
            replace(SMALL_DIT, condition_channels=5),
            replace(SMALL_DIT, condition_channels=9),
            "its condition_channels is 5, and 9 here",
        ),
        (
            replace(config_of("unet"), attention_resolutions=(4,)),
            replace(config_of("unet", 16), attention_resolutions=(16,)),
            r"its attention_resolutions is latent_size / \[2\], and latent_size / \[1\] here",
        ),
    ],
)
def test_a_difference_without_a_rule_is_named_on_both_sides(source: ModelConfig, own: ModelConfig, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{words}$"):
        adapted(registry.build_network(source), own, class_rows=((),) * 10)


@pytest.mark.parametrize("key", ["internal_head", "latent_head"])
def test_heads_of_early_blocks_are_new_or_left_out(key: str) -> None:
    source = randomized_dit(replace(SMALL_DIT, num_classes=None, condition_dropout=0.0)).eval()
    with_head, added = adapted(source, replace(source.config, **{key: True}))
    assert {part.origin for part in added.parts} == {"taken as it is", "new"}
    _, removed = adapted(with_head, source.config)
    assert {part.origin for part in removed.parts} == {"taken as it is", "left out"}
