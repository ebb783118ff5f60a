"""Condition inputs of a model, checked and encoded: classes, masked images and segmentation maps.

For inpainting the condition is the posterior mean of the image with grey in place of the missing pixels, scaled as latents
are, and the mask at latent size; for the paper's checkpoints black, and a mask of -1 and 1. Each image is encoded by itself,
so its condition does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lfm.autoencoder import Autoencoder
from lfm.data.masks import at_latent_size, hide
from lfm.data.sources.source import UNLABELLED
from lfm.errors import ConfigError
from lfm.flow.null_condition import class_condition
from lfm.types import Condition
from lfm.weights_file import WeightsHeader

MAX_LABELS_NAMED = 8  # in an error message


@dataclass(frozen=True)
class Conditions:
    """Condition inputs, cycled if there are fewer than images, and the known pixels for inpainting."""

    class_index: Tensor | None = None  # int64 (classes,)
    spatial: Tensor | None = None  # float32 (masks, C + 1, h, w)
    segmentation: np.ndarray | None = None  # uint8 or uint16 (maps, H, W)
    images: np.ndarray | None = None  # uint8 (masks, H, W, 3)
    masks: np.ndarray | None = None  # uint8 (masks, H, W), 1 = missing

    def condition(self, numbers: Sequence[int]) -> Condition:
        """Return the condition of the images of these numbers, which count the seeds from 0."""
        index, ids = torch.as_tensor(numbers), self.segmentation
        return Condition(
            class_index=None if self.class_index is None else self.class_index[index % len(self.class_index)],
            spatial=None if self.spatial is None else self.spatial[index % len(self.spatial)],
            segmentation=None if ids is None else torch.from_numpy(ids[index.numpy() % len(ids)].astype(np.int64)),
        )

    def composite(self, numbers: Sequence[int], images: np.ndarray) -> np.ndarray:
        """Return images uint8 (B, H, W, 3) of these numbers with the known pixels put back."""
        assert self.images is not None and self.masks is not None, "there are no known pixels"
        rows = np.asarray(numbers) % len(self.masks)
        return np.where(self.masks[rows][..., None] == 1, images, self.images[rows])


def encode_conditions(
    header: WeightsHeader,
    autoencoder: Autoencoder,
    class_index: int | Sequence[int] | None = None,
    images: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    segmentations: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Conditions:
    """Check and encode condition inputs for the model of `header`.

    Args:
        header: the model's description.
        autoencoder: the model's.
        class_index: classes; by default all of a class-conditional model.
        images: uint8 (N, H, W, 3).
        masks: uint8 or bool (N, H, W), 0 is known, anything else is to be filled.
        segmentations: uint8 or uint16 (N, H, W), class ids.
        names: of the N images or maps, for messages; by default their numbers.

    Raises:
        ConfigError: names the first input that the model does not take, or that it needs and is missing.
    """
    arrays = {"image": images, "mask": masks, "segmentation": segmentations}
    _check_tasks(header, {kind for kind, array in arrays.items() if array is not None})
    for kind, array in arrays.items():
        if array is None:
            continue
        names = names or [str(number) for number in range(len(array))]
        height, width = array.shape[1:3]
        size = header.image_size
        if (height, width) != (size, size):
            raise ConfigError(
                f"{kind} {names[0]}: is {width} x {height} pixels, the model makes {size} x {size}; scale it first"
            )
    spatial = None
    if segmentations is not None:
        _check_labels(header.labels, segmentations, names)
    if images is not None and masks is not None:
        if len(masks) != len(images):
            raise ConfigError(f"`masks`: {len(masks)} for {len(images)} images; their numbers must be equal")
        masks = (masks != 0).astype(np.uint8)
        _check_masks(masks, names)
        masked = _masked if header.missing_pixels == "grey" else _masked_black
        spatial = torch.cat([masked(autoencoder, image, mask) for image, mask in zip(images, masks, strict=True)])
    return with_classes(Conditions(None, spatial, segmentations, images, masks), class_index, header.model.num_classes)


def with_classes(
    conditions: Conditions, class_index: int | Sequence[int] | None, num_classes: int | None
) -> Conditions:
    """Return `conditions` with these classes, or with all classes if the model takes any and `class_index` is None.

    Raises:
        ConfigError: the model has no such class.
    """
    if class_index is None and num_classes is None:
        return conditions
    classes = range(num_classes or 0) if class_index is None else np.atleast_1d(class_index).tolist()
    return replace(conditions, class_index=class_condition(classes, num_classes).class_index)


def spatial_condition(autoencoder: Autoencoder, masked_mean: Tensor, mask: Tensor) -> Tensor:
    """Return `Condition.spatial`, float32 (N, C + 1, h, w).

    Args:
        autoencoder: that of the latents.
        masked_mean: unscaled posterior means (N, C, h, w) of the masked images.
        mask: (N, 1, h, w), 1 = missing.
    """
    return torch.cat([(masked_mean.float() - autoencoder.shift) * autoencoder.scale_factor, mask.float()], 1)


def _masked(autoencoder: Autoencoder, image: np.ndarray, mask: np.ndarray) -> Tensor:
    """Return `Condition.spatial` (1, C + 1, h, w) of one image (H, W, 3) and mask (H, W)."""
    pixels = torch.from_numpy(hide(image, mask)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    holes = torch.from_numpy(at_latent_size(mask, autoencoder.downsample_factor))[None, None]  # (1, 1, h, w)
    return spatial_condition(autoencoder, autoencoder.encode(pixels).mean.cpu(), holes)


def _masked_black(autoencoder: Autoencoder, image: np.ndarray, mask: np.ndarray) -> Tensor:
    """Return `Condition.spatial` as `_masked` does, in the conventions of the paper's code."""
    pixels = torch.from_numpy(np.where(mask[..., None] == 1, np.uint8(0), image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    factor = autoencoder.downsample_factor
    nearest = torch.from_numpy(mask[::factor, ::factor].astype(np.float32))[None, None]  # (1, 1, h, w)
    return spatial_condition(autoencoder, autoencoder.encode(pixels).mean.cpu(), 2 * nearest - 1)


def _check_tasks(header: WeightsHeader, kinds: set[str]) -> None:
    """Refuse kinds of inputs that the model was not trained with, and the absence of those it was trained with."""
    for needed, task, parts in (
        (header.model.condition_channels > 0, "to inpaint", {"image", "mask"}),
        (header.model.num_labels is not None, "on segmentation maps", {"segmentation"}),
    ):
        arguments = " and ".join(f"`{part}s`" for part in sorted(parts))
        if needed and not parts <= kinds:
            raise ConfigError(f"the model was trained {task}: needs {arguments}")
        if not needed and parts & kinds:
            raise ConfigError(f"the model was not trained {task}: leave out {arguments}")


def _check_masks(masks: np.ndarray, names: Sequence[str]) -> None:
    """Refuse masks (N, H, W) in which everything or nothing is missing."""
    for name, mask in zip(names, masks, strict=True):
        if mask.all() or not mask.any():
            problem = "everything is missing" if mask.all() else "nothing is missing"
            raise ConfigError(f"mask of {name}: {problem}; 1, or white, is what to fill, 0, or black, is known")


def _check_labels(labels: dict[int, str], segmentations: np.ndarray, names: Sequence[str]) -> None:
    """Refuse class ids that are not labels of the model."""
    for name, ids in zip(names, segmentations, strict=True):
        if unknown := sorted(set(np.unique(ids).tolist()) - set(labels)):
            raise ConfigError(
                f"segmentation {name}: class id {unknown[0]}: the model knows {_describe_labels(labels)}; draw with these"
            )


def _describe_labels(labels: dict[int, str]) -> str:
    """Return the number of labels and the first of them; the id of pixels without a label does not count as one."""
    named = [f"{index} {label}" for index, label in labels.items() if label != UNLABELLED]
    more = ", ..." if len(named) > MAX_LABELS_NAMED else ""
    rest = "".join(f", and {index} for pixels without one" for index, label in labels.items() if label == UNLABELLED)
    return f"{len(named)} labels: {', '.join(named[:MAX_LABELS_NAMED])}{more}{rest}"
