"""Tests of the checks before training resumes, for every backbone."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

from lfm.errors import CheckpointError
from lfm.models.registry import BACKBONES, config_to_json
from pipelines.common.experiment.config_schema import ExperimentConfig
from pipelines.training.resume_checks import FREE_KEYS, _changes, check_same_network
from tests.support.models import SMALL_DIT, WEIGHTS_HEADER


@pytest.mark.parametrize("name", BACKBONES)
def test_execution_and_training_fields_exist(name: str) -> None:
    backbone = BACKBONES[name]
    of_config, of_options = ({field.name for field in fields(cls)} for cls in (backbone.config, backbone.options))
    assert backbone.config.execution_fields <= of_config and backbone.config.training_fields <= of_config
    assert backbone.options.execution_fields <= of_options


def test_free_keys_exist_for_every_backbone() -> None:
    sections = {name: field.annotation for name, field in ExperimentConfig.model_fields.items()}
    for key in FREE_KEYS:
        section, _, name = key.partition(".")
        if not name:
            assert section in sections
        elif section == "model":
            assert all(name in {field.name for field in fields(backbone.options)} for backbone in BACKBONES.values())
        else:
            assert name in sections[section].model_fields  # type: ignore[union-attr]


def experiment(**model: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "run": "run",
            "data": {"shards": "latents"},
            "model": model,
            "train": {"num_steps": 10},
            "deepspeed": {},
        }
    )


@pytest.mark.parametrize(
    ("model", "execution", "architecture"),
    [
        ({"size": "Ti"}, {"attention": "sdpa", "activation_checkpointing": 1}, {"qk_norm": True}),
        ({"backbone": "unet"}, {"attention": "sdpa", "channels_last": True}, {"num_blocks": 3}),
    ],
)
def test_how_a_network_is_computed_may_change_and_what_it_computes_may_not(
    model: dict[str, Any], execution: dict[str, Any], architecture: dict[str, Any]
) -> None:
    before = experiment(**model)
    assert _changes(experiment(**model, **execution, compile=True), before) == []
    (change,) = _changes(experiment(**model, **architecture), before)
    assert change.startswith(f"model.{next(iter(architecture))} (")


def test_weights_of_another_function_are_refused() -> None:
    header = replace(WEIGHTS_HEADER, model=SMALL_DIT)
    for change, field in (({"num_heads": 4}, "num_heads"), ({"condition_dropout": 0.0}, "condition_dropout")):
        model: Any = SimpleNamespace(config=replace(SMALL_DIT, **change))
        with pytest.raises(CheckpointError, match=f"^source: its {field} is"):
            check_same_network("source", header, model)
    same: Any = SimpleNamespace(config=replace(SMALL_DIT, attention="sdpa", token_dropout=0.5, condition_dropout=0.2))
    check_same_network("source", header, same)
    with pytest.raises(CheckpointError, match="its prediction is noise"):
        check_same_network("source", replace(header, prediction="noise"), same)
    assert config_to_json(same.config)["attention"] == "sdpa"


def test_weights_of_another_backbone_are_refused() -> None:
    other: Any = SimpleNamespace(
        config=BACKBONES["unet"].config(4, 8, model_channels=64, attention_resolutions=(8,), num_classes=10)
    )
    with pytest.raises(CheckpointError, match="its backbone is dit, and unet here"):
        check_same_network("source", replace(WEIGHTS_HEADER, model=SMALL_DIT), other)
