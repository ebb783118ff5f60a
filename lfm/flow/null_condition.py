"""What the model is told about an image, and what it is told when it is told nothing.

                    of an image                                        null: "any image"
    class_index     a class, 0 to num_classes - 1                       num_classes
    spatial         inpainting: scaled latent mean of the masked        zeros, and ones: everything is missing
                    image (C), mask (1), 1 = missing
    segmentation    a label of each pixel, 0 to num_labels - 1          num_labels at every pixel

In training all of a sample's condition is replaced by the null at once, for some samples; guidance leads away from the
null (Ho & Salimans 2022). The rows of the null that are learned stand in the model's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm.errors import ConfigError
from lfm.types import Condition


def check_class_index(class_index: Tensor, num_classes: int) -> None:
    """Raise ConfigError, naming the first index that is no class; the null class is none."""
    unknown = class_index[(class_index < 0) | (class_index >= num_classes)]
    if unknown.numel():
        raise ConfigError(f"class index {int(unknown[0])}: the model knows classes 0 to {num_classes - 1}")


def class_condition(class_index: Sequence[int] | Tensor, num_classes: int | None) -> Condition:
    """The condition of images of these classes (B,), for a model of `num_classes`.

    Raises ConfigError for an index that is no class, and for a model that takes no class (num_classes None).
    """
    if num_classes is None:
        raise ConfigError("--class-index: the model was trained without classes; leave it out")
    index = torch.as_tensor(class_index, dtype=torch.int64)
    check_class_index(index, num_classes)
    return Condition(class_index=index)


def drop_condition(
    condition: Condition, dropped: Tensor, *, num_classes: int | None = None, num_labels: int | None = None
) -> Condition:
    """`condition` with all that it says replaced by the null in the rows where `dropped`, bool (B,), is true."""

    def drop(value: Tensor | None, null: Tensor | int | None) -> Tensor | None:
        if value is None:
            return None
        assert null is not None, "the null of what is given must be known"
        return torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null, value)

    spatial, nothing = condition.spatial, None
    if spatial is not None:
        nothing = torch.zeros_like(spatial[:1])
        nothing[:, -1] = 1
    return Condition(
        drop(condition.class_index, num_classes), drop(spatial, nothing), drop(condition.segmentation, num_labels)
    )


def null_condition(
    condition: Condition, condition_dropout: float, *, num_classes: int | None = None, num_labels: int | None = None
) -> Condition:
    """`condition` with every row replaced by the null: the second branch of guidance.

    The numbers are those the model was trained with. Raises ConfigError when it was trained without dropout of the
    condition: its null then means nothing.
    """
    given = [v for v in (condition.class_index, condition.spatial, condition.segmentation) if v is not None]
    if not given:
        raise ConfigError("guidance needs a conditional model: use guidance scale 1")
    if condition_dropout == 0:
        raise ConfigError(
            "guidance needs a model trained with label dropout, this one had condition_dropout 0: use guidance scale 1"
        )
    everything = torch.ones(len(given[0]), dtype=torch.bool, device=given[0].device)
    return drop_condition(condition, everything, num_classes=num_classes, num_labels=num_labels)
