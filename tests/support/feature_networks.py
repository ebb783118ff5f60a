"""A fast feature network for tests, and references made with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from torch import nn

from lfm.metrics import reference as references
from pipelines.evaluation.make_reference import ReferenceConfig
from pipelines.evaluation.make_reference import run as make_reference
from tests.support.commands import ALONE, SmallSet, lfm


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
    make_reference(ReferenceConfig(str(small_set.raw), str(path), network=str(network), trust_code=True), ALONE)
    return path


def trusting_lfm(*arguments: object) -> Result:
    """Run a command line that trusts the networks of its references, and names them where it does not do so itself."""
    options: list[object] = []
    if arguments[0] in ("evaluate", "reference") and "--bound" not in arguments:
        options.append("--trust-code")
    if arguments[0] == "evaluate":
        following = list(itertools.pairwise(arguments))
        paths = [Path(str(value)) for option, value in following if option == "--reference"]
        networks = {references.load(str(path)).header.network for path in paths if path.is_file()}
        named = {Path(str(value)).name for option, value in following if option == "--network"}
        for name in sorted(networks):
            if name.endswith(".pt2") and Path(name).name not in named:
                options += ["--network", name]
    return lfm(*arguments, *options)


def trust(reference: Path) -> dict[str, Any]:
    """Return the settings of an `EvaluateConfig` that trust the network of a reference."""
    return {"network": (references.load(str(reference)).header.network,), "trust_code": True}
