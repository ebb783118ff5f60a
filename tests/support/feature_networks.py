"""A fast feature network for tests, and references made with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipelines.evaluation.make_reference import ReferenceConfig
from pipelines.evaluation.make_reference import run as make_reference
from tests.support.commands import ALONE, SmallSet


class PooledPixels(nn.Module):
    """The image averaged to 2 x 2 pixels: 12 features in [0, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), (2, 2)).flatten(1) / 255


def export_network(module: nn.Module, path: Path, inputs: int = 1) -> Path:
    """Save a module of `inputs` image batches, uint8 (B, 3, 16, 16), with torch.export, and return the path."""
    example = tuple(torch.zeros(2, 3, 16, 16, dtype=torch.uint8) for _ in range(inputs))
    sizes = tuple({0: torch.export.Dim("batch", max=1000)} for _ in range(inputs))
    torch.export.save(torch.export.export(module, example, dynamic_shapes=sizes), path)
    return path


def make_small_reference(small_set: SmallSet, network: Path, folder: Path) -> Path:
    """Write a reference of the 40 scenes of the small set to `folder` and return its path."""
    path = folder / "reference.safetensors"
    make_reference(ReferenceConfig(str(small_set.raw), str(path), network=str(network)), ALONE)
    return path
