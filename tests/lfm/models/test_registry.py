"""Tests of the registry of backbones: every one of them meets the protocol of `VelocityNetwork`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.types import Condition
from tests.support.models import SMALL_DIT, SMALL_OPTIONS, dit_inputs, randomized_dit

BASE = ModelConfig(4, 8, num_classes=10, condition_dropout=0.1, condition_channels=5, num_labels=3, downsample_factor=2)
each_backbone = pytest.mark.parametrize("name", registry.BACKBONES)


def small_config(name: str) -> ModelConfig:
    return registry.BACKBONES[name].options(**SMALL_OPTIONS[name]).build_config(BASE)


@each_backbone
def test_a_configuration_survives_its_json(name: str) -> None:
    config = small_config(name)
    content = json.loads(json.dumps(registry.config_to_json(config)))
    assert content["backbone"] == name
    assert registry.config_from_json(content) == config


@each_backbone
def test_options_keep_what_latents_and_task_prescribe(name: str) -> None:
    config = small_config(name)
    for field in dataclasses.fields(BASE):
        assert getattr(config, field.name) == getattr(BASE, field.name)
    assert config.latent_shape == (4, 8, 8) and config.segmentation_size == 16 and config.has_null_condition


@each_backbone
def test_a_network_computes_a_velocity_and_refuses_other_conditions(name: str) -> None:
    network = registry.build_network(small_config(name))
    assert isinstance(network, VelocityNetwork) and network.config == small_config(name)
    condition = Condition(torch.tensor([0, 10]), torch.rand(2, 5, 8, 8), torch.randint(4, (2, 16, 16)))
    velocity = network(torch.randn(2, 4, 8, 8), torch.rand(2), condition)
    assert velocity.shape == (2, 4, 8, 8) and velocity.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"set `class_index`"):
        network(torch.randn(2, 4, 8, 8), torch.rand(2), dataclasses.replace(condition, class_index=None))
    assert network.num_parameters == sum(value.numel() for value in network.state_dict().values())


def test_a_configuration_without_a_backbone_is_of_the_dit() -> None:
    content = registry.config_to_json(SMALL_DIT)
    del content["backbone"]
    assert registry.config_from_json(content) == SMALL_DIT


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^backbone vgg: unknown; one of dit"):
        registry.config_from_json(registry.config_to_json(SMALL_DIT) | {"backbone": "vgg"})


def test_the_registry_imports_no_torch() -> None:
    script = "import sys, lfm.models.registry\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# --- intermediate tokens -------------------------------------------------------------------------------------------


def tokens_by_hooks(model: torch.nn.Module, *inputs: object) -> list[Tensor]:
    """Return the output of each block of a forward pass."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, i, output: outputs.append(output)) for block in model.blocks]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_returned_tokens_are_those_of_the_blocks_and_change_no_bit(checkpointing: int) -> None:
    model = randomized_dit(dataclasses.replace(SMALL_DIT, depth=4, activation_checkpointing=checkpointing))
    state, time, classes = dit_inputs()
    plain = model(state, time, Condition(classes))
    velocity, tokens = model(state, time, Condition(classes), return_tokens=(3, 1))
    assert torch.equal(velocity, plain)
    blocks = tokens_by_hooks(model, state, time, Condition(classes))
    assert len(tokens) == 2 and torch.equal(tokens[0], blocks[3]) and torch.equal(tokens[1], blocks[1])
    (gradient,) = torch.autograd.grad(tokens[1].square().sum(), model.blocks[0].mlp[0].weight)
    assert gradient.abs().sum() > 0


def test_tokens_that_bypass_the_middle_blocks_are_returned_as_they_entered_them() -> None:
    model = randomized_dit(dataclasses.replace(SMALL_DIT, depth=4, token_dropout=0.5))
    state, time, classes = dit_inputs()
    kept_tokens = torch.stack([torch.randperm(16)[:8].sort().values for _ in range(3)])
    inputs = (state, time, Condition(classes), kept_tokens)
    velocity, (first, middle) = model(*inputs, return_tokens=(0, 2))
    assert torch.equal(velocity, model(*inputs))
    blocks = tokens_by_hooks(model, *inputs)
    assert first.shape == middle.shape == (3, 16, 32)
    for row, numbers in enumerate(kept_tokens):
        bypassing = [number for number in range(16) if number not in numbers.tolist()]
        assert torch.equal(middle[row, numbers], blocks[2][row])
        assert torch.equal(middle[row, bypassing], first[row, bypassing])
