"""The canvas of the page: what is drawn on it, as masks and segmentations of the model's size.

A model's image is shown enlarged by a whole number, so that a cell of canvas pixels stands for each of its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from lfm.errors import ConfigError
from pipelines.common import image_files

CANVAS_SIZE = 512  # pixels; models of larger images have a canvas of their own size
MOST_DIFFERENCE = 3  # levels between a painted colour and that of its label: browsers may add noise to a canvas
OPAQUE = 128  # least alpha of a painted pixel

Colour = tuple[int, int, int]


def cell_size(image_size: int) -> int:
    """Return the height and width of the cell of canvas pixels that stands for one pixel of the image."""
    return max(1, CANVAS_SIZE // image_size)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) as it is shown on the canvas: each pixel repeated over its cell."""
    cell = cell_size(len(image))
    return image.repeat(cell, 0).repeat(cell, 1)


def palette(labels: Mapping[int, str]) -> dict[int, Colour]:
    """Return a colour for each class id: that of the grids of `lfm sample`, changed slightly where two would be equal."""
    ids = np.array(list(labels), np.uint16)
    colours: dict[int, Colour] = {}
    for class_id, values in zip(labels, image_files.colours(ids[None])[0].round().astype(int).tolist(), strict=True):
        red, green, blue = values
        while (red, green, blue) in colours.values():
            blue = (blue + 2 * MOST_DIFFERENCE) % 256
        colours[class_id] = (red, green, blue)
    return colours


def draw_map(ids: np.ndarray, colours: Mapping[int, Colour]) -> np.ndarray:
    """Return the image, uint8 (H, W, 3), of a segmentation (H, W) whose class ids all have a colour."""
    image = np.zeros((*ids.shape, 3), np.uint8)
    for class_id in np.unique(ids).tolist():
        image[ids == class_id] = colours[class_id]
    return image


def read_mask(layers: Sequence[np.ndarray], image_size: int) -> np.ndarray:
    """Return the mask, uint8 (image_size, image_size), 1 = missing, of what is painted on layers, uint8 (H, W, 4).

    One painted pixel of a cell suffices, so that thin strokes count.
    """
    mask = np.zeros((image_size, image_size), bool)
    for layer in layers:
        mask |= (_cells(layer, image_size)[..., 3] >= OPAQUE).any((1, 3))
    return mask.astype(np.uint8)


def read_map(canvas: np.ndarray, colours: Mapping[int, Colour], image_size: int) -> np.ndarray:
    """Return the segmentation, uint8 or uint16 (image_size, image_size), that a canvas, uint8 (H, W, 3 or 4), shows.

    A cell belongs to the label that most of its pixels have the colour of; pixels of other colours, as at the edge of a
    smooth stroke, do not count, and a cell of nothing else belongs to the label of the nearest cell.

    Raises:
        ConfigError: no pixel has the colour of a label.
    """
    ids = np.array(list(colours))
    cells = _cells(canvas, image_size)[..., :3].astype(np.int64)
    codes, positions = np.unique(cells @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    painted = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1)  # (colours of the canvas, 3)
    distances = np.abs(painted[:, None] - np.array(list(colours.values()))).max(-1)  # (colours of the canvas, labels)
    label = np.where(distances.min(1) <= MOST_DIFFERENCE, distances.argmin(1), -1)[positions].reshape(cells.shape[:4])
    used = np.unique(label[label >= 0])
    if not used.size:
        raise ConfigError("the map shows none of the labels; paint with their colours, or fill it with one of them")
    votes = np.stack([(label == each).sum((1, 3)) for each in used])  # (labels, size, size)
    result = ids[used[votes.argmax(0)]]
    if (empty := votes.max(0) == 0).any():
        rows, columns = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
        result = result[rows, columns]
    return result.astype(np.uint8 if ids.max() < 256 else np.uint16)


def _cells(canvas: np.ndarray, image_size: int) -> np.ndarray:
    """Return a canvas (H, W, C) as (image_size, cell, image_size, cell, C); one of another size is resized before."""
    side = image_size * cell_size(image_size)
    if canvas.shape[:2] != (side, side):
        canvas = np.asarray(Image.fromarray(canvas).resize((side, side), Image.Resampling.NEAREST))
    return canvas.reshape(image_size, side // image_size, image_size, side // image_size, -1)
