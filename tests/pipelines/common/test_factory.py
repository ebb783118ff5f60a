"""Tests of the objects that the factory builds from a configuration."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from lfm.errors import ConfigError
from lfm.training.loss_terms import LOSS_TERMS
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from tests.support.commands import REPOSITORY
from tests.support.models import SMALL_DIT


@pytest.mark.parametrize(
    ("key", "cuda", "compiler", "expected"),
    [
        (None, False, True, False),
        (None, True, True, True),
        (None, True, False, False),
        (False, True, True, False),
        (True, False, False, True),
    ],
)
def test_blocks_are_compiled_by_default_on_a_gpu_with_a_c_compiler(
    key: bool | None, cuda: bool, compiler: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    overrides = () if key is None else (f"model.compile={str(key).lower()}",)
    config = config_file.load(str(REPOSITORY / "configs" / "demo.yaml"), overrides)
    assert factory.compiles_blocks(config) is expected


@pytest.mark.parametrize(
    ("key", "recorded", "on_cpu", "on_cuda"),
    [
        (None, None, "fp32", "bf16"),
        (None, "fp32", "fp32", "fp32"),
        (None, "bf16", "bf16", "bf16"),
        ("tf32", None, "fp32", "tf32"),
        ("fp32", "bf16", "fp32", "fp32"),
        ("bf16", None, "bf16", "bf16"),
    ],
)
def test_the_precision_of_training_is_the_key_then_that_of_the_checkpoint_then_that_of_the_device(
    key: str | None, recorded: str | None, on_cpu: str, on_cuda: str
) -> None:
    overrides = () if key is None else (f"train.precision={key}",)
    config = config_file.load(str(REPOSITORY / "configs" / "demo.yaml"), overrides)
    for device, expected in (("cpu", on_cpu), ("cuda", on_cuda)):
        resolved = factory.with_precision(config, torch.device(device), recorded)
        assert resolved.train.precision == expected
        assert factory.deepspeed_settings(resolved, World())["bf16"]["enabled"] == (expected == "bf16")


def test_every_loss_term_has_a_weight_in_the_configuration() -> None:
    demo = str(REPOSITORY / "configs" / "demo.yaml")
    weights = {"direction": 0.25, "internal": 0.5, "latent": 0.125, "layer_sync": 0.75}
    settings = [f"flow.{name}_weight={weight}" for name, weight in weights.items()]
    config = config_file.load(demo, ("flow.sigma_min=1e-4", "flow.layer_sync_blocks=[0, 1]", *settings))
    with pytest.raises(ConfigError, match="internal_head"):
        factory.training_loss(config, SMALL_DIT)
    with pytest.raises(ConfigError, match="latent_head"):
        factory.training_loss(config, replace(SMALL_DIT, internal_head=True))
    model = replace(SMALL_DIT, internal_head=True, latent_head=True)
    with pytest.raises(ConfigError, match="layer_sync_blocks"):
        factory.training_loss(config, replace(model, depth=1))
    loss = factory.training_loss(config, model)
    assert loss.sigma_min == 1e-4
    assert {term.name: term.weight for term in loss.terms} == {"velocity": 1.0, **weights}
    assert {term.name for term in loss.terms} == set(LOSS_TERMS)
    assert [term.name for term in factory.training_loss(config_file.load(demo), SMALL_DIT).terms] == ["velocity"]
