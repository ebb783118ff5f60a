"""Files that were uploaded to the page, as images and segmentations of the model's size, cropped as `lfm shard` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lfm.data.sources.source import unlabelled
from lfm.data.transforms import Rejected, crop, crop_ids, decode, decode_ids
from lfm.errors import ConfigError


def read_image(path: str, image_size: int, rule: str) -> np.ndarray:
    """Return an image, uint8 (image_size, image_size, 3).

    Raises:
        ConfigError: the file is no image.
    """
    with _errors_name_file(path):
        return crop(decode(Path(path).read_bytes()), image_size, rule)


def read_segmentation(path: str, labels: dict[int, str], image_size: int, rule: str) -> np.ndarray:
    """Return a segmentation, uint8 or uint16 (image_size, image_size).

    Raises:
        ConfigError: the file is no map of class ids, or has one that is no label of the model.
    """
    with _errors_name_file(path):
        ids = decode_ids(Path(path).read_bytes())
        result = crop_ids(ids, (ids.shape[1], ids.shape[0]), image_size, rule, unlabelled(labels))
    if unknown := sorted(set(np.unique(result).tolist()) - set(labels)):
        raise ConfigError(f"{Path(path).name}: has the class id {unknown[0]}, which the model does not know")
    return result


@contextmanager
def _errors_name_file(path: str) -> Iterator[None]:
    try:
        yield
    except Rejected as error:
        detail = f": {error.detail}" if error.detail else ""
        raise ConfigError(f"{Path(path).name}: {error.reason}{detail}") from error
