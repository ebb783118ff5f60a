"""Tests of the export to diffusers: what it cannot express is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lfm.conversion.to_diffusers import _INEXPRESSIBLE, to_diffusers
from lfm.errors import ConfigError
from lfm.models.config import ModelConfig
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frequency_shift": 0}, "other time frequencies; train with model.frequency_shift: 1"),
        ({"condition_channels": 5}, "condition_channels 5: diffusers' DiTTransformer2DModel has no such part"),
        ({"num_labels": 3}, "num_labels 3: diffusers"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0: diffusers"),
        ({"num_classes": 1001}, "num_classes 1001"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"num_classes": 8, "condition_dropout": 0.1, "frequency_shift": 1} | change
    config = DiTConfig(4, 8, 2, 32, 2, 2, **options)
    with pytest.raises(ConfigError, match=message):
        to_diffusers(DiT(config).state_dict(), config)


def test_every_field_is_expressed_or_refused() -> None:
    """A new field of the DiT must be refused by the export, or added here once it is exported."""
    exported = {"latent_channels", "latent_size", "patch_size", "hidden_size", "depth", "num_heads"}
    exported |= {"num_classes", "condition_dropout", "time_scale", "frequency_shift"}
    without_effect = {"attention", "activation_checkpointing", "token_dropout", "downsample_factor"}
    without_effect |= {"internal_head", "latent_head"}
    names = {field.name for field in dataclasses.fields(DiTConfig)}
    assert names == exported | without_effect | set(_INEXPRESSIBLE)


@pytest.mark.parametrize("head", ["internal", "latent"])
def test_a_head_of_the_early_blocks_is_left_out(head: str) -> None:
    """It is for training and for guidance by itself; the velocity of the last block does not depend on it."""
    options: dict[str, Any] = {"num_classes": 8, "condition_dropout": 0.1, "frequency_shift": 1}
    with_head, without = (DiTConfig(4, 8, 2, 32, 3, 2, **options, **{f"{head}_head": flag}) for flag in (True, False))
    weights = DiT(with_head).state_dict()
    plain = {name: weight for name, weight in weights.items() if not name.startswith(head)}
    assert len(plain) < len(weights)
    (first, arguments), (second, plain_arguments) = to_diffusers(weights, with_head), to_diffusers(plain, without)
    assert arguments == plain_arguments and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="is another backbone"):
        to_diffusers({}, ModelConfig(4, 8))
