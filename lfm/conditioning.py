"""What the model is told about a picture, and what it is told when it is told nothing.

    class_index in {0, ..., num_classes - 1}    a class
    class_index = num_classes                   the null class, "any picture": what dropped labels are replaced by in
                                                training, and what guidance leads away from (Ho & Salimans 2022)

Conditions that lie over the latent, such as a mask, travel in `Condition.spatial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lfm.errors import ConfigError
from lfm.types import Condition


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Pictures uint8 (B, 3, H, W) with the holes of `mask` (B, H, W), 1 = missing, in mid-grey: all that is known of them."""
    return images.masked_fill(mask[:, None] == 1, 128)


def mask_at_latent_size(mask: Tensor, downsample_factor: int) -> Tensor:
    """uint8 (B, h, w) of a mask uint8 (B, H, W): 1 where any pixel of a cell is missing, so that thin strokes survive."""
    return nn.functional.max_pool2d(mask[:, None].float(), downsample_factor)[:, 0].to(torch.uint8)


def check_class_index(class_index: Tensor, num_classes: int) -> None:
    """Raise ConfigError, naming the first index that is no class; the null class is none."""
    unknown = class_index[(class_index < 0) | (class_index >= num_classes)]
    if unknown.numel():
        raise ConfigError(f"class index {int(unknown[0])}: the model knows classes 0 to {num_classes - 1}")


def class_condition(class_index: Sequence[int] | Tensor, num_classes: int | None) -> Condition:
    """The condition of pictures of these classes (B,), for a model of `num_classes`.

    Raises ConfigError for an index that is no class, and for a model that takes no class (num_classes None).
    """
    if num_classes is None:
        raise ConfigError("a class index was given, but the model was trained without classes: leave it out")
    index = torch.as_tensor(class_index, dtype=torch.int64)
    check_class_index(index, num_classes)
    return Condition(class_index=index)


def drop_class(class_index: Tensor, dropped: Tensor, num_classes: int) -> Tensor:
    """`class_index` int64 (B,) with the null class in the rows where `dropped`, bool (B,), is true."""
    return torch.where(dropped, num_classes, class_index)


def null_condition(condition: Condition, num_classes: int | None, class_dropout: float) -> Condition:
    """`condition` with every class replaced by the null class: the second branch of guidance.

    `num_classes` and `class_dropout` are those the model was trained with. Raises ConfigError when it was trained
    without label dropout: its null class then means nothing.
    """
    if num_classes is None or condition.class_index is None:
        raise ConfigError("guidance needs a class-conditional model and a class: use guidance scale 1")
    if class_dropout == 0:
        raise ConfigError(
            "guidance needs a model trained with label dropout, this one had class_dropout 0: use guidance scale 1"
        )
    return replace(condition, class_index=torch.full_like(condition.class_index, num_classes))
