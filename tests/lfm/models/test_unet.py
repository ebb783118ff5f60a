"""The ADM U-Net: equal to both published forms, its start, gradients, options, sizes and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lfm.conversion.published_unets import unet_from_state_dict
from lfm.errors import ConfigError
from lfm.models.unet import UNet
from lfm.models.unet_config import UNetConfig
from lfm.types import Condition
from tests.support.published_unet_forms import Recorder, Shape, edm_forward, guided_forward

SMALL = UNetConfig(
    4, 8, model_channels=16, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=16
)


def inputs(shape: Shape, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    state = torch.randn(batch, shape.in_channels, shape.size, shape.size, generator=random, dtype=torch.float64)
    return state, torch.tensor([0.0, 0.37, 1.0][:batch], dtype=torch.float32)


def split(state: torch.Tensor, config: UNetConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    latent, spatial = state.split([config.latent_channels, config.condition_channels], 1)
    return latent, spatial if config.condition_channels else None


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(multipliers=(1, 2, 2), attention=(4, 2)),
        Shape(in_channels=9, num_blocks=1),
        Shape(num_classes=5),
        Shape(multipliers=(1,), attention=(8,)),
    ],
)
def test_edm_form_is_imported_exactly(shape: Shape) -> None:
    recorder = Recorder()
    state, time = inputs(shape)
    classes = torch.tensor([0, 4, -1]) if shape.num_classes else None
    expected = edm_forward(recorder, shape, time, state, classes)
    # The published names do not tell the channels of a head, so the number of heads is given where it is not of 64.
    heads = shape.model_channels * shape.multipliers[-1] // shape.head_channels
    assert all(m == shape.multipliers[-1] for m in shape.multipliers[1:])
    weights, config = unet_from_state_dict(recorder.weights, num_heads=heads)
    network = UNet(config).double().eval()
    network.load_state_dict({name: value.double() for name, value in weights.items()})
    latent, spatial = split(state, config)
    index = None if classes is None else classes.where(classes >= 0, shape.num_classes)
    velocity = network(latent, time, Condition(class_index=index, spatial=spatial))
    torch.testing.assert_close(velocity.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=4),
        Shape(heads=2, multipliers=(1, 2, 2), attention=(8, 2)),
        Shape(heads=4, in_channels=9, num_blocks=1),
        Shape(heads=4, in_channels=8, attention=()),
        Shape(heads=4, num_classes=5),
    ],
)
def test_guided_diffusion_form_is_imported_exactly(shape: Shape, residual: bool) -> None:
    shape = replace(shape, residual_resampling=residual)
    recorder = Recorder()
    state, time = inputs(shape)
    classes = torch.tensor([0, 4, 2]) if shape.num_classes else None
    expected = guided_forward(recorder, shape, time, state, classes)
    weights, config = unet_from_state_dict(recorder.weights, latent_size=shape.size, num_heads=shape.heads)
    assert config.num_blocks == shape.num_blocks and config.attention_resolutions == shape.attention
    network = UNet(config).double().eval()
    network.load_state_dict({name: value.double() for name, value in weights.items()})
    latent, spatial = split(state, config)
    velocity = network(latent, time, Condition(class_index=classes, spatial=spatial))
    torch.testing.assert_close(velocity.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_first_velocity_is_zero_and_all_weights_have_gradients() -> None:
    torch.manual_seed(0)
    network = UNet(replace(SMALL, num_classes=3, condition_dropout=0.1, condition_channels=5))
    condition = Condition(class_index=torch.tensor([0, 3]), spatial=torch.randn(2, 5, 8, 8))
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    assert not network(state, time, condition).any()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network(state, time, condition).square().mean().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multipliers": (1, 2, 2), "attention_resolutions": (8, 2), "num_blocks": 2},
        {"resampling": "convolution", "scale_shift_norm": False},
        {"num_classes": 3, "class_embedding": "projection", "condition_channels": 5},
    ],
)
def test_flops_are_counted_as_torch_counts_them(changes: dict) -> None:
    config = replace(SMALL, **changes)
    network = UNet(config)
    spatial = torch.randn(1, config.condition_channels, 8, 8) if config.condition_channels else None
    condition = Condition(torch.tensor([0]) if config.num_classes else None, spatial)
    # The counter does not know the CPU's own attention kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), condition)
    assert counter.get_total_flops() == config.flops_per_sample


def test_activation_checkpointing_and_channels_last_change_nothing() -> None:
    torch.manual_seed(0)
    network = UNet(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    results = []
    for changes in ({}, {"activation_checkpointing": 2}, {"channels_last": True}):
        network.config = replace(SMALL, **changes)
        network.zero_grad()
        velocity = network(state, time, Condition())
        velocity.square().mean().backward()
        results.append((velocity.detach(), network.input.weight.grad.clone()))
    for velocity, gradient in results[1:]:
        torch.testing.assert_close(velocity, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_tokens_are_returned_without_changing_the_velocity() -> None:
    torch.manual_seed(0)
    network = UNet(SMALL)
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    velocity, tokens = network(state, time, Condition(), return_tokens=(0, 3))
    assert torch.equal(velocity, network(state, time, Condition()))
    assert [tuple(one.shape) for one in tokens] == [(2, 64, 16), (2, 16, 32)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_size": 9}, "latent_size"),
        ({"attention_resolutions": (16,)}, "attention_resolutions"),
        ({"head_channels": 24}, "head_channels"),
        ({"num_heads": 3, "head_channels": None}, "num_heads"),
        ({"num_heads": 2}, "head_channels"),
        ({"model_channels": 10}, "model_channels"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"dropout": 1.0}, "dropout"),
        ({"resampling": "bilinear"}, "resampling"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        # Karras et al. 2022, table 7 and Dhariwal & Nichol 2021, table 12: ImageNet at 64 pixels
        (
            UNetConfig(
                3,
                64,
                model_channels=192,
                channel_multipliers=(1, 2, 3, 4),
                num_blocks=3,
                attention_resolutions=(32, 16, 8),
                head_channels=64,
                num_classes=1000,
                class_embedding="projection",
            ),
            295.9,
        ),
        # Dhariwal & Nichol 2021: ImageNet at 256 pixels, here without the channels of the predicted variance
        (
            UNetConfig(
                3,
                256,
                model_channels=256,
                channel_multipliers=(1, 1, 2, 2, 4, 4),
                attention_resolutions=(32, 16, 8),
                head_channels=64,
                num_classes=1000,
            ),
            553.8,
        ),
    ],
)
def test_networks_have_their_published_number_of_parameters(config: UNetConfig, millions: float) -> None:
    with torch.device("meta"):
        network = UNet(config)
    assert round(network.num_parameters / 1e6, 1) == millions
