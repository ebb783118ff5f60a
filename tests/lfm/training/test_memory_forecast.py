"""The forecast of memory: activations are those of real passes, and states are divided as ZeRO divides them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.dit_config import DiTConfig
from lfm.models.unet_config import UNetConfig
from lfm.training.loss_terms import LossTerm, TrainingLoss
from lfm.training.memory_forecast import TensorMemory, TrainedNetwork, activation_bytes, example_batch, rank_memory

LOSS = TrainingLoss([LossTerm("velocity"), LossTerm("direction", 0.5)])
DIT = DiTConfig(4, 8, num_classes=3, condition_dropout=0.1, patch_size=2, hidden_size=64, depth=8, num_heads=2)
UNET = UNetConfig(
    4, 8, num_classes=3, model_channels=16, channel_multipliers=(1, 2), attention_resolutions=(4,), head_channels=16
)
INPUTS = replace(DIT, condition_channels=5, num_labels=4, downsample_factor=4, token_dropout=0.5)


def forecast(config: ModelConfig, num_samples: int, dtype: torch.dtype = torch.float32) -> int:
    return activation_bytes(lambda: registry.build_network(config), config, LOSS, num_samples, dtype)


@pytest.mark.parametrize("config", [DIT, replace(DIT, activation_checkpointing=1), UNET, INPUTS])
def test_activations_are_those_of_real_passes(config: ModelConfig) -> None:
    network = registry.build_network(config)
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    batch = example_batch(config, 3)
    with TensorMemory([*network.parameters(), *network.buffers()]) as memory:
        LOSS(network, batch, batch.uniform)[0].backward()
    assert forecast(config, 3) == pytest.approx(memory.peak, rel=0.02)


@pytest.mark.parametrize("config", [DIT, UNET])
def test_activations_grow_with_the_batch_and_shrink_by_checkpointing_and_bfloat16(config: Any) -> None:
    few, many = forecast(config, 16), forecast(config, 64)
    assert many == pytest.approx(4 * few, rel=0.1)
    assert forecast(replace(config, activation_checkpointing=1), 64) < 0.7 * many
    assert forecast(config, 64, torch.bfloat16) == pytest.approx(many / 2, rel=0.1)


def test_a_network_of_many_gigabytes_needs_no_memory() -> None:
    config = DiTConfig(4, 32, patch_size=2, hidden_size=8192, depth=64, num_heads=64)  # 77 billion parameters
    assert forecast(config, 256) > 1e12


def settings(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


def test_zero_divides_the_states_by_the_ranks() -> None:
    network = TrainedNetwork(1000, 800, num_averages=2, dtype=torch.float32)
    parts = {stage: rank_memory(network, settings(stage), 4, 7, on_gpu=False).device for stage in (1, 2, 3)}
    for part in parts.values():
        assert (part["masters"], part["moments"], part["averages"]) == (800, 1600, 1600)
        assert part["activations"] == 7
        assert part["checkpoint copy"] == 5 * 800 + 3 * 800  # this rank's part of five, and an average of the others
    assert parts[1] == parts[2] and parts[1]["weights"] == 4000
    assert parts[3]["weights"] == 1000 and parts[3]["gathered weights"] == 4000
    alone = rank_memory(network, settings(1), 1, 7, on_gpu=False).device
    assert alone["masters"] == 3200 and alone["gradients"] == 6400 and alone["checkpoint copy"] == 20 * 800


def test_muon_keeps_one_moment_and_bfloat16_halves_the_weights() -> None:
    network = TrainedNetwork(1000, 1000, 1, torch.bfloat16, num_with_momentum=600)
    part = rank_memory(network, settings(1), 2, 0, on_gpu=False).device
    assert part["moments"] == 4 * (400 * 2 + 600) // 2 and part["weights"] == 2000


def test_offloading_moves_states_from_the_gpu_to_its_host() -> None:
    network = TrainedNetwork(1000, 1000, 1, torch.bfloat16)
    kept = rank_memory(network, settings(3, reduce_bucket_size=50), 2, 7, on_gpu=True)
    assert kept.host.keys() == {"checkpoint copy"} and kept.device["gradients"] == 2 * 2 * 50 + 2000
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    moved = rank_memory(network, settings(3, reduce_bucket_size=50, **offload), 2, 7, on_gpu=True)
    assert moved.host == kept.host | {name: kept.device[name] for name in ("weights", "masters", "moments", "averages")}
    assert moved.device == {name: size for name, size in kept.device.items() if name not in moved.host}
