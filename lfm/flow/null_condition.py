"""Conditions, and the null condition of classifier-free guidance.

    field           condition of an image                               null condition
    class_index     a class, 0 to num_classes - 1                       num_classes
    spatial         inpainting: scaled latent mean of the masked        zeros (C) and ones (1): everything is missing
                    image (C) and mask (1), 1 = missing
    segmentation    a class id per pixel, 0 to num_labels - 1           num_labels at every pixel

In training the condition of some samples is replaced by the null condition, all of its fields at once, and guidance
extrapolates from the null condition (Ho & Salimans 2022). The embeddings of `num_classes` and `num_labels` are learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.types import Condition


def check_class_index(class_index: Tensor, num_classes: int) -> None:
    """Raise ConfigError, naming the first index that is not a class; the null class is not one."""
    unknown = class_index[(class_index < 0) | (class_index >= num_classes)]
    if unknown.numel():
        raise ConfigError(f"`class_index` {int(unknown[0])}: the model knows classes 0 to {num_classes - 1}")


def class_condition(class_index: Sequence[int] | Tensor, num_classes: int | None) -> Condition:
    """Return the condition of images of these classes (B,), for a model of `num_classes`.

    Raises:
        ConfigError: an index is not a class, or the model takes none (`num_classes` None).
    """
    if num_classes is None:
        raise ConfigError("`class_index`: the model was trained without classes; leave it out")
    index = torch.as_tensor(class_index, dtype=torch.int64)
    check_class_index(index, num_classes)
    return Condition(class_index=index)


def drop_condition(
    condition: Condition, dropped: Tensor, *, num_classes: int | None = None, num_labels: int | None = None
) -> Condition:
    """Return `condition` with the rows where `dropped`, bool (B,), is true replaced by the null condition."""

    def drop(value: Tensor | None, null: Tensor | int | None) -> Tensor | None:
        if value is None:
            return None
        assert null is not None, "num_classes or num_labels is missing"
        return torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null, value)

    spatial_null = None
    if condition.spatial is not None:
        spatial_null = torch.zeros_like(condition.spatial[:1])  # (1, K, h, w)
        spatial_null[:, -1] = 1
    return Condition(
        class_index=drop(condition.class_index, num_classes),
        spatial=drop(condition.spatial, spatial_null),
        segmentation=drop(condition.segmentation, num_labels),
    )


def null_condition(
    condition: Condition, condition_dropout: float, *, num_classes: int | None = None, num_labels: int | None = None
) -> Condition:
    """Return the null condition in the shape of `condition`, for the second branch of guidance.

    Args:
        condition: of B images.
        condition_dropout: with which the model was trained.
        num_classes: of the model.
        num_labels: of the model.

    Raises:
        ConfigError: the model is unconditional, or was trained without condition dropout, so that its null condition
            has no meaning.
    """
    fields = [
        value for value in (condition.class_index, condition.spatial, condition.segmentation) if value is not None
    ]
    if not fields:
        raise ConfigError("`guidance_scale`: guidance needs a conditional model; set it to 1")
    if condition_dropout == 0:
        raise ConfigError(
            "`guidance_scale`: guidance needs a model trained with condition dropout, and this one had "
            "condition_dropout 0; set it to 1"
        )
    everything = torch.ones(len(fields[0]), dtype=torch.bool, device=fields[0].device)
    return drop_condition(condition, everything, num_classes=num_classes, num_labels=num_labels)
