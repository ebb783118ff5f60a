"""Tests of the objects that the factory builds from a configuration."""

from __future__ import annotations

import shutil

import pytest
import torch

from lfm.training.loss_terms import LOSS_TERMS
from pipelines.common import config_schema, factory
from tests.support.commands import REPOSITORY


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
    config = config_schema.load(str(REPOSITORY / "configs" / "demo.yaml"), overrides)
    assert factory.compiles_blocks(config) is expected


def test_every_loss_term_has_a_weight_in_the_configuration() -> None:
    demo = str(REPOSITORY / "configs" / "demo.yaml")
    loss = factory.training_loss(config_schema.load(demo, ("flow.sigma_min=1e-4", "flow.direction_weight=0.25")))
    assert loss.sigma_min == 1e-4
    assert {term.name: term.weight for term in loss.terms} == {"velocity": 1.0, "direction": 0.25}
    assert {term.name for term in loss.terms} == set(LOSS_TERMS)
    assert [term.name for term in factory.training_loss(config_schema.load(demo)).terms] == ["velocity"]
