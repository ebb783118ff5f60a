"""Scores of a task: whether generated images show the condition under which they were generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lfm.synthetic.scenes import recognise
from lfm.types import Condition

RECOGNISED = "recognised"  # name of the score in the log: the share of images that show their condition


def recognised_scenes(images: Tensor, condition: Condition) -> Tensor:
    """Return whether scenes show the shape of their class.

    Args:
        images: uint8 (B, 3, H, W), of a model that was trained on `lfm scenes`.
        condition: with class indices (B,).

    Returns:
        bool (B,), on the CPU.
    """
    assert condition.class_index is not None, "the schema refuses the score without classes"
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    classes = condition.class_index.tolist()
    return torch.tensor([recognise(image) == index for image, index in zip(pixels, classes, strict=True)])


TASK_SCORES: Mapping[str, Callable[[Tensor, Condition], Tensor]] = MappingProxyType({"scenes": recognised_scenes})
