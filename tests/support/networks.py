"""A feature network that is quick, for tests: the image in 2 x 2 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipelines.evaluation.make_reference import ReferenceConfig
from pipelines.evaluation.make_reference import run as make_reference
from tests.support.commands import ALONE, SmallSet


class Small(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), (2, 2)).flatten(1) / 255


def exported(module: nn.Module, path: Path, inputs: int = 1) -> Path:
    """A module of images uint8 (B, 3, 16, 16) as torch.export saves it."""
    example = tuple(torch.zeros(2, 3, 16, 16, dtype=torch.uint8) for _ in range(inputs))
    sizes = tuple({0: torch.export.Dim("batch", max=1000)} for _ in range(inputs))
    torch.export.save(torch.export.export(module, example, dynamic_shapes=sizes), path)
    return path


def reference_of(small_set: SmallSet, network: Path, folder: Path) -> Path:
    """A reference of the 40 scenes of the small set."""
    make_reference(
        ReferenceConfig(str(small_set.raw), str(folder / "reference.safetensors"), network=str(network)), ALONE
    )
    return folder / "reference.safetensors"
