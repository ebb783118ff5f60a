"""Tests of the trained model as an object: precision, guidance, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm
from lfm.errors import ConfigError
from lfm.inference.precision import set_precision
from lfm.inference.trained_model import TrainedModel
from lfm.types import Condition
from lfm.weights_file import load_weights, save_weights
from tests.support.commands import Tasks


@pytest.fixture
def model(weights: Path) -> TrainedModel:
    return lfm.load(str(weights), device="cpu")


def trained_in(weights: Path, precision: str) -> Path:
    """Rewrite the weights as if the model had been trained in this precision."""
    tensors, header = load_weights(str(weights))
    header = dataclasses.replace(header, config={"train": {"precision": precision}})
    save_weights(str(weights / "weights.safetensors"), tensors, header)
    return weights


def test_a_model_is_loaded_in_the_precision_of_its_training(weights: Path) -> None:
    assert lfm.load(str(weights), device="cpu").precision == "fp32"
    model = lfm.load(str(trained_in(weights, "bf16")), device="cpu")
    assert model.precision == "bf16"
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    model = lfm.load(str(weights), device="cpu", precision="fp32")
    assert model.precision == "fp32"
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_state_and_velocity_are_float32_in_every_precision(tasks: Tasks, precision: str) -> None:
    exact = lfm.load(str(tasks.runs / "class"), autoencoder=str(tasks.autoencoder), device="cpu")
    model = lfm.load(str(tasks.runs / "class"), autoencoder=str(tasks.autoencoder), device="cpu", precision=precision)
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        velocity, expected = (m.network(state, time, Condition(torch.tensor([0, 8]))) for m in (model, exact))
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected, atol=0.05 if precision == "bf16" else 0, rtol=0)
    samples = model.sample([0, 1], class_index=0, num_steps=2)
    assert samples.latents.dtype == torch.float32 and samples.images.dtype == np.uint8


def test_tf32_is_allowed_during_the_forward_pass_alone() -> None:
    seen = []

    class Network(torch.nn.Module):
        def forward(self, fails: bool) -> None:
            seen.append(torch.get_float32_matmul_precision())
            assert not fails

    network = set_precision(Network(), "tf32")
    before = torch.get_float32_matmul_precision()
    network(False)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(AssertionError):
        network(True)
    assert torch.get_float32_matmul_precision() == before
    assert seen == ["high", "high"]


def test_an_unknown_precision_is_refused(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"^`precision` fp8: unknown; one of fp32, tf32, bf16$"):
        lfm.load(str(weights), device="cpu", precision="fp8")


def test_no_seeds_are_refused(model: TrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"^`seeds`: is empty"):
        model.sample([])


def test_messages_name_arguments(model: TrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"^`atol` 0.001: euler takes fixed steps; set `num_steps` instead$"):
        model.sample([0], solver="euler", atol=1e-3)
    with pytest.raises(ConfigError, match=r"leave out `images` and `masks`$"):
        model.sample([0], images=np.zeros((16, 16, 3), np.uint8), masks=np.zeros((16, 16), np.uint8))
    with pytest.raises(ConfigError, match=r"^`class_index` 8: "):
        model.sample([0], class_index=8)


def test_autoguidance_needs_a_model_of_the_same_conditions(tasks: Tasks) -> None:
    strong, weak, other = (
        lfm.load(str(tasks.runs / name), autoencoder=str(tasks.autoencoder), device="cpu")
        for name in ("class", "class", "none")
    )
    guidance = strong.guidance(2.0, (0.1, 0.9), weak)
    assert guidance.weak is weak.network and (guidance.scale, guidance.interval) == (2.0, (0.1, 0.9))
    with pytest.raises(ConfigError, match=r"^`autoguidance` .*none: its num_classes is None, that of .*class 8$"):
        strong.guidance(2.0, autoguidance=other)
