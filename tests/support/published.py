"""Checkpoints as the training scripts of published models save them."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm.conversion import published_checkpoints
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from lfm.types import Condition

PUBLISHED_DIT = DiTConfig(4, 8, 2, 32, 2, 2, num_classes=8, condition_dropout=0.1, time_scale=1.0)


def published_state(model: DiT, *, variance: bool) -> dict[str, Tensor]:
    """Return the state of a DiT under the names of DiT and SiT, with the position, and optionally a predicted variance."""
    config, state = model.config, {}
    for name, value in model.state_dict().items():
        if variance and name.startswith("final.linear"):
            parts = value.unflatten(0, (config.patch_size**2, config.latent_channels))
            value = torch.cat([parts, torch.randn_like(parts)], 1).flatten(0, 1)
        for published, ours in list(published_checkpoints.NAMES.items())[::-1]:
            name = name.replace(ours, published, 1) if ours else name
        state[name] = value
    return state | {"pos_embed": model.position[None]}


def published_inputs() -> tuple[Tensor, Tensor, Condition]:
    """Return state (5, 4, 8, 8), time (5,) and classes, the last ones null."""
    torch.manual_seed(1)
    return torch.randn(5, 4, 8, 8), torch.rand(5), Condition(torch.tensor([0, 3, 7, 8, 8]))
