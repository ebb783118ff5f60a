"""The values recorded from the paper's own classes (shared/reference/README.md), and their names in ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lfm.conversion.published_checkpoints import our_name
from lfm.models.dit import DiT, DiTConfig

FOLDER = Path(os.environ.get("LFM_SHARED", Path(__file__).parents[3] / "shared")) / "reference"

requires_reference = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference values in {FOLDER} (LFM_SHARED)")

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
    """One of the recorded files, without its suffix."""
    return load_file(FOLDER / f"{name}.safetensors")


def recorded_model() -> DiT:
    """Our DiT with the recorded weights."""
    theirs = torch.load(FOLDER / "dit_class_model.pth", weights_only=True)
    model = DiT(CONFIG)
    model.load_state_dict({our_name(name): value for name, value in theirs.items() if "pos_embed" not in name})
    return model.eval()
