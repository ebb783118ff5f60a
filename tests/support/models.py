"""Small networks whose output depends on every part of the input, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from lfm.data.manifest import AutoencoderRecord, ClassRecord
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import WeightsHeader

SMALL_DIT = DiTConfig(
    latent_channels=4,
    latent_size=8,
    patch_size=2,
    hidden_size=32,
    depth=2,
    num_heads=2,
    num_classes=10,
    condition_dropout=0.1,
)

# Keys of the `model:` section of a small network of each backbone.
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2},
    "unet": {
        "backbone": "unet",
        "model_channels": 16,
        "channel_multipliers": [1, 2],
        "num_blocks": 1,
        "attention_resolutions": [],
        "head_channels": 16,
    },
}

WEIGHTS_HEADER = WeightsHeader(
    model=DiTConfig(latent_channels=4, latent_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2),
    autoencoder=AutoencoderRecord(
        name="embedded", content_hash="abc", downsample_factor=8, latent_channels=4, scale_factor=0.18215, shift=0.1
    ),
    image_size=64,
    classes=(ClassRecord(index=0, name="Käse", count=3), ClassRecord(index=1, name="b\nc", count=4)),
    samples_seen=64_000,
    manifest_digest="d" * 64,
    code_version="0.1.0 (abc)",
    config={"train": {"learning_rate": 1e-4, "betas": [0.9, 0.95]}, "run": None},
)


def randomized_dit(config: DiTConfig, spread: float = 0.1, seed: int = 0) -> DiT:
    """Return a DiT with noise of standard deviation `spread` added to every parameter.

    A new DiT has zero-initialized modulations and output, which would hide errors in all that lies before them.
    """
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def dit_inputs(channels: int = 4, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return state (3, channels, size, size), time (3,) and class indices (3,), the last one the null class."""
    torch.manual_seed(1)
    return torch.randn(3, channels, size, size), torch.rand(3), torch.tensor([0, 9, 10])
