"""Values recorded from the paper's own classes (tests/data/reference/README.md), and their names in this library."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from lfm.conversion.published_checkpoints import our_name
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from tests.support.commands import REPOSITORY

FOLDER = REPOSITORY / "tests" / "data" / "reference"
# Of a recorded gradient with two or more dimensions, every eighth row is stored.
GRADIENT_STRIDE = 8

CONFIG = DiTConfig(
    latent_channels=4,
    latent_size=8,
    patch_size=2,
    hidden_size=64,
    depth=2,
    num_heads=4,
    num_classes=10,
    condition_dropout=0.1,
    time_scale=1.0,
)


def recorded(name: str) -> dict[str, Tensor]:
    """Return the tensors of a recorded file, named without its suffix."""
    return load_file(FOLDER / f"{name}.safetensors")


def recorded_model() -> DiT:
    """Return a DiT with the recorded weights."""
    theirs = torch.load(FOLDER / "dit_class_model.pth", weights_only=True)
    model = DiT(CONFIG)
    model.load_state_dict({our_name(name): value for name, value in theirs.items() if "pos_embed" not in name})
    return model.eval()
