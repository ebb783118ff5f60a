"""What there is to tell a model, checked and encoded: classes, masked images, maps of class ids.

Inpainting is told the posterior mean of the image with grey in place of what is missing, scaled as latents are, and the
mask at latent size; each image is encoded by itself, so that its condition does not depend on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lfm.autoencoder import Autoencoder
from lfm.data.masks import at_latent_size, hide
from lfm.errors import ConfigError
from lfm.flow.null_condition import class_condition
from lfm.types import Condition
from lfm.weights_file import WeightsHeader


@dataclass(frozen=True)
class Conditions:
    """What there is to tell a model; images take the rows of each part in turns. Known pixels, where there are any."""

    class_index: Tensor | None = None  # int64 (classes,)
    spatial: Tensor | None = None  # float32 (masks, C + 1, h, w)
    segmentation: np.ndarray | None = None  # uint8 or uint16 (maps, H, W)
    images: np.ndarray | None = None  # uint8 (masks, H, W, 3)
    masks: np.ndarray | None = None  # uint8 (masks, H, W), 1 = missing

    def of(self, number: int) -> list[Tensor | np.ndarray | None]:
        """All that is told of one image, its known pixels included."""
        return [None if part is None else part[number % len(part)] for part in vars(self).values()]

    def condition(self, numbers: Sequence[int]) -> Condition:
        """The condition of the images of these numbers, counted over all seeds."""
        index = torch.as_tensor(numbers)
        ids = self.segmentation
        return Condition(
            None if self.class_index is None else self.class_index[index % len(self.class_index)],
            None if self.spatial is None else self.spatial[index % len(self.spatial)],
            None if ids is None else torch.from_numpy(ids[index.numpy() % len(ids)].astype(np.int64)),
        )

    def composite(self, numbers: Sequence[int], images: np.ndarray) -> np.ndarray:
        """Images uint8 (B, H, W, 3) of these numbers, with the pixels that are known put back."""
        assert self.images is not None and self.masks is not None, "there are known pixels"
        turns = np.asarray(numbers) % len(self.masks)
        return np.where(self.masks[turns][..., None] == 1, images, self.images[turns])


def encode_conditions(
    header: WeightsHeader,
    autoencoder: Autoencoder,
    class_index: int | Sequence[int] | None = None,
    images: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    segmentations: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Conditions:
    """Images uint8 (N, H, W, 3), masks (N, H, W) and maps (N, H, W) for the model of `header`; classes, or all of them.

    Raises:
        ConfigError: names the first thing (by `names`, or its number) that the model does not take.
    """
    _check_tasks(header, images, masks, segmentations)
    size = header.image_size
    for kind, given in (("image", images), ("mask", masks), ("segmentation", segmentations)):
        if given is None:
            continue
        names = names or [str(number) for number in range(len(given))]
        if given.shape[1:3] != (size, size):
            height, width = given.shape[1:3]
            raise ConfigError(
                f"{kind} {names[0]}: is {width} x {height} pixels, the model makes {size} x {size}; scale it first"
            )
    if segmentations is not None:
        _check_labels(header.labels, segmentations, names)
    spatial = None
    if images is not None and masks is not None:
        masks = (masks != 0).astype(np.uint8)
        for name, mask in zip(names, masks, strict=True):
            if mask.all() or not mask.any():
                wrong = "everything is missing" if mask.all() else "nothing is missing"
                raise ConfigError(f"mask of {name}: {wrong}; 1, or white, is what to fill, 0, or black, is known")
        spatial = torch.cat([_masked(autoencoder, image, mask) for image, mask in zip(images, masks, strict=True)])
    return with_classes(Conditions(None, spatial, segmentations, images, masks), class_index, header.model.num_classes)


def with_classes(
    conditions: Conditions, class_index: int | Sequence[int] | None, num_classes: int | None
) -> Conditions:
    """What is told, and these classes, or all of them where the model takes any.

    Raises:
        ConfigError: the model has no such class.
    """
    if class_index is None and num_classes is None:
        return conditions
    wanted = range(num_classes or 0) if class_index is None else np.atleast_1d(class_index).tolist()
    return replace(conditions, class_index=class_condition(wanted, num_classes).class_index)


def spatial_condition(autoencoder: Autoencoder, masked_mean: Tensor, mask: Tensor) -> Tensor:
    """Condition.spatial of unscaled means (N, C, h, w) of masked images, and masks (N, 1, h, w), 1 = missing."""
    return torch.cat([(masked_mean.float() - autoencoder.shift) * autoencoder.scale_factor, mask.float()], 1)


def _masked(autoencoder: Autoencoder, image: np.ndarray, mask: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(hide(image, mask)).permute(2, 0, 1)[None]
    holes = torch.from_numpy(at_latent_size(mask, autoencoder.downsample_factor))[None, None]
    return spatial_condition(autoencoder, autoencoder.encode(pixels).mean.cpu(), holes)


def _check_tasks(
    header: WeightsHeader, images: np.ndarray | None, masks: np.ndarray | None, segmentations: np.ndarray | None
) -> None:
    for takes, given, flags, task in (
        (header.model.condition_channels > 0, (images, masks), "--image and --mask", "to inpaint"),
        (header.model.num_labels is not None, (segmentations,), "--segmentation", "on segmentations"),
    ):
        if takes and any(value is None for value in given):
            raise ConfigError(f"the model was trained {task}: give {flags}, or --shards")
        if not takes and any(value is not None for value in given):
            raise ConfigError(f"{flags}: the model was not trained {task}; leave it out")
    if images is not None and masks is not None and len(masks) != len(images):
        raise ConfigError(f"--mask: {len(masks)} for {len(images)} images; give as many")


def _check_labels(labels: dict[int, str], segmentations: np.ndarray, names: Sequence[str]) -> None:
    for name, ids in zip(names, segmentations, strict=True):
        if unknown := sorted(set(np.unique(ids).tolist()) - set(labels)):
            known = ", ".join(f"{index} {label}" for index, label in list(labels.items())[:8])
            raise ConfigError(
                f"segmentation {name}: class id {unknown[0]}: the model knows {len(labels)} labels: {known}, ..."
            )
