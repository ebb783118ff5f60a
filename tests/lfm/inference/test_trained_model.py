"""Tests of the trained model as an object: precision, guidance, and what it refuses."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lfm
from lfm.errors import ConfigError
from lfm.inference.trained_model import TrainedModel
from lfm.precision import float32_arithmetic, set_precision
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


@pytest.fixture
def cuda_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks on the CPU choose the arithmetic of a CUDA device."""

    def on_cuda(precision: str, device: torch.device) -> AbstractContextManager[None]:
        return float32_arithmetic(precision, torch.device("cuda"))

    monkeypatch.setattr("lfm.precision.float32_arithmetic", on_cuda)


def flags() -> tuple[str, bool]:
    """The arithmetic of float32 matrix products and of convolutions."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


class Witness(torch.nn.Linear):
    """A network that records the arithmetic of its forward pass, and fails on request."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.seen: list[tuple[str, bool]] = []

    def forward(self, fails: bool) -> None:  # type: ignore[override]
        self.seen.append(flags())
        assert not fails


@pytest.mark.usefixtures("cuda_arithmetic")
@pytest.mark.parametrize(("precision", "expected"), [("tf32", ("high", True)), ("fp32", ("highest", False))])
def test_the_arithmetic_of_a_precision_is_that_of_the_forward_pass_alone(
    precision: str, expected: tuple[str, bool]
) -> None:
    network, before = set_precision(Witness(), precision), flags()
    network(False)
    assert flags() == before
    with pytest.raises(AssertionError):
        network(True)
    assert flags() == before
    assert network.seen == [expected, expected]


def test_tf32_is_fp32_without_a_gpu(tasks: Tasks) -> None:
    network, before = set_precision(Witness(), "tf32"), flags()
    network(False)
    assert network.seen == [before]
    exact, model = (
        lfm.load(str(tasks.runs / "class"), autoencoder=str(tasks.autoencoder), device="cpu", precision=precision)
        for precision in ("fp32", "tf32")
    )
    assert model.precision == model.autoencoder.precision == "fp32"
    images = [loaded.sample([0, 1], num_steps=2).images for loaded in (exact, model)]
    assert np.array_equal(*images)


def test_the_autoencoder_decodes_in_float32_where_the_network_computes_in_bfloat16(tasks: Tasks) -> None:
    model = lfm.load(str(tasks.runs / "class"), autoencoder=str(tasks.autoencoder), device="cpu", precision="bf16")
    assert model.autoencoder.model.dtype == torch.float32


@pytest.mark.parametrize("solving", [{"num_steps": 2}, {"solver": "bosh3", "atol": 0.1, "rtol": 0.1}])
def test_on_a_gpu_every_batch_has_the_batch_size(
    tasks: Tasks, monkeypatch: pytest.MonkeyPatch, solving: dict[str, Any]
) -> None:
    """Of the network under both conditions of guidance, and of the decoder, though a solver needs fewer rows."""
    model = lfm.load(str(tasks.runs / "class"), autoencoder=str(tasks.autoencoder), device="cpu")
    sizes: list[int] = []
    model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    decode = model.autoencoder.decode
    monkeypatch.setattr(model.autoencoder, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    options: dict[str, Any] = {"guidance_scale": 2, "guidance_interval": (0.3, 0.9), **solving}
    plain = model.sample(range(7), batch_size=4, **options)
    assert {3, 4} <= set(sizes)
    sizes.clear()
    monkeypatch.setattr(TrainedModel, "fills_batches", True)
    filled = model.sample(range(7), batch_size=4, **options)
    assert set(sizes) == {4}
    assert filled.nfe.tolist() == plain.nfe.tolist() and filled.images.shape == plain.images.shape
    assert abs(filled.images.astype(int) - plain.images).max() <= 1
    alone = model.sample([6], class_index=6, batch_size=4, **options)
    torch.testing.assert_close(alone.latents, filled.latents[6:], atol=0, rtol=0)


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
        for name in ("class", "class", "both")
    )
    guidance = strong.guidance(2.0, (0.1, 0.9), weak)
    assert guidance.weak is weak.network and (guidance.scale, guidance.interval) == (2.0, (0.1, 0.9))
    with pytest.raises(ConfigError, match=r"^`autoguidance` .*both: its condition_channels is 5, that of .*class 0$"):
        strong.guidance(2.0, autoguidance=other)


def test_a_weaker_model_of_other_classes_is_taken_at_its_null_condition(tasks: Tasks) -> None:
    strong, same, none = (
        lfm.load(str(tasks.runs / name), autoencoder=str(tasks.autoencoder), device="cpu")
        for name in ("class", "class", "none")
    )
    names = tuple(entry.model_copy(update={"name": f"other {entry.index}"}) for entry in same.header.classes)
    other = TrainedModel(same.network, dataclasses.replace(same.header, classes=names), same.autoencoder)
    own_null = strong.sample([0], class_index=1, guidance_scale=2.0, num_steps=2)
    by_other = strong.sample([0], class_index=1, guidance_scale=2.0, num_steps=2, autoguidance=other)
    assert torch.equal(own_null.latents, by_other.latents), "of the same network, the null conditions are the same"
    by_none = strong.sample([0], class_index=1, guidance_scale=2.0, num_steps=2, autoguidance=none)
    assert not torch.equal(own_null.latents, by_none.latents)
    undropped = dataclasses.replace(
        other.header, model=dataclasses.replace(other.header.model, num_classes=3, condition_dropout=0.0)
    )
    without = TrainedModel(same.network, undropped, same.autoencoder, "without")
    with pytest.raises(ConfigError, match=r"^`autoguidance` without: its classes are others"):
        strong.guidance(2.0, autoguidance=without)
