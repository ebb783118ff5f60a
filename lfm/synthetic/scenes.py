"""A synthetic data set of scenes, and a recogniser that measures whether a model's images are correct.

A scene is a sky with clouds over a ground, with one coloured shape in front. The outline of the shape is the class of the
scene, every pixel has a class id, and a mask covers the shape: enough for all four tasks. Sky, cloud, ground and shape
differ in saturation and hue, by which the recogniser segments an image; it then reads the class from the outline alone.
A scene is a pure function of (seed, index, image size).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]

SEGMENTS_BEHIND = ("sky", "ground", "cloud")
SUPERSAMPLING = 3


def _polygon(corners: np.ndarray) -> Outline:
    """The outline of a polygon by the even-odd rule; `corners` are its (x, y), float64 (N, 2)."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            crosses = (y0 > y) != (y1 > y)
            result ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0 + 1e-12) + x0)
        return result

    return inside


def _star(points: int, inner_radius: float) -> np.ndarray:
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner_radius, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# The outline of each class in [-1, 1]^2, with y pointing down as in images.
OUTLINES: dict[str, Outline] = {
    "crescent": lambda x, y: (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.72),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
    "disc": lambda x, y: x**2 + y**2 < 0.85,
    "heart": lambda x, y: (1.2 * x) ** 2 + (0.1 - 1.15 * y - 0.75 * np.sqrt(abs(1.2 * x))) ** 2 < 0.95,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.78,
    "star": _polygon(_star(5, 0.42)),
    "triangle": _polygon(np.array([[0.0, -0.95], [0.95, 0.75], [-0.95, 0.75]])),
}
CLASS_NAMES = tuple(OUTLINES)
SEGMENT_NAMES = (*SEGMENTS_BEHIND, *CLASS_NAMES)


@dataclass(frozen=True)
class Scene:
    """One image with its annotations."""

    image: np.ndarray  # uint8 (H, W, 3)
    segmentation: np.ndarray  # uint8 (H, W): an index into SEGMENT_NAMES
    mask: np.ndarray  # uint8 (H, W): 1 = missing, on a square around the shape
    class_index: int  # an index into CLASS_NAMES


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert hue, saturation and value in [0, 1] to RGB in [0, 1]."""
    return value * (1 - saturation * (1 - np.clip(abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)))


def draw_scene(seed: int, index: int, image_size: int) -> Scene:
    """Draw scene `index` of the infinite data set `seed`; all classes are equally likely."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    class_index = int(random.integers(len(CLASS_NAMES)))
    fine = image_size * SUPERSAMPLING
    y, x = np.mgrid[0:fine, 0:fine].astype(np.float32) / fine + 0.5 / fine

    horizon = random.uniform(0.55, 0.8) + random.uniform(-0.04, 0.04) * np.sin(6.3 * (x + random.uniform()))
    sky = _colour(random.uniform(0.52, 0.64), random.uniform(0.2, 0.38), random.uniform(0.85, 1.0))
    ground = _colour(random.uniform(0.2, 0.36), random.uniform(0.25, 0.42), random.uniform(0.45, 0.7))
    segments = (y > horizon).astype(np.uint8)
    image = np.where(segments[..., None] == 1, ground, sky) * (1.06 - 0.2 * y[..., None])

    for _ in range(random.integers(1, 4)):
        cloud_x, cloud_y, width = random.uniform(0.05, 0.95), random.uniform(0.08, 0.4), random.uniform(0.08, 0.18)
        cloud = np.zeros(x.shape, bool)
        for puff in (-0.7, 0.0, 0.7):
            radius = width * random.uniform(0.5, 0.8)
            cloud |= (x - cloud_x - puff * width) ** 2 + (1.5 * (y - cloud_y)) ** 2 < radius**2
        cloud &= segments == 0
        segments[cloud] = SEGMENTS_BEHIND.index("cloud")
        image[cloud] = 0.99

    size, tilt = random.uniform(0.28, 0.36), np.deg2rad(random.uniform(-8, 8))
    centre_x, centre_y = random.uniform((0.44, 0.47), (0.56, 0.57))
    across, down = (x - centre_x) / size, (y - centre_y) / size
    turned_x, turned_y = np.cos(tilt) * across + np.sin(tilt) * down, np.cos(tilt) * down - np.sin(tilt) * across
    shape = OUTLINES[CLASS_NAMES[class_index]](turned_x, turned_y)
    colour = _colour(random.uniform(), random.uniform(0.8, 1.0), random.uniform(0.75, 0.95))
    image[shape] = colour * (1 - 0.18 * down[shape][:, None])
    segments[shape] = len(SEGMENTS_BEHIND) + class_index

    mask = (np.maximum(abs(across), abs(down)) < 1.15).astype(np.uint8)
    middle = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
    cells = image.reshape(image_size, SUPERSAMPLING, image_size, SUPERSAMPLING, 3).mean((1, 3))
    return Scene(
        np.round(255 * np.clip(cells, 0, 1)).astype(np.uint8),
        segments[middle, middle],
        mask[middle, middle],
        class_index,
    )


# --- the recogniser ---------------------------------------------------------------------------------------------

_TEMPLATE_SIZE = 32
_TEMPLATE_REACH = 2.2  # in root mean square radii; contains every outline
_TILTS = np.deg2rad(np.arange(-20, 21, 5))


def _centred_view(shape: np.ndarray) -> np.ndarray:
    """A shape, bool (H, W), centred on its centroid and scaled by its root mean square radius: bool (32, 32)."""
    rows, columns = np.nonzero(shape)
    row, column = rows.mean(), columns.mean()
    radius = np.sqrt(((rows - row) ** 2 + (columns - column) ** 2).mean()) + 1e-6
    steps = np.linspace(-_TEMPLATE_REACH, _TEMPLATE_REACH, _TEMPLATE_SIZE) * radius
    at_row, at_column = np.round(row + steps).astype(int), np.round(column + steps).astype(int)
    height, width = shape.shape
    inside = ((at_row >= 0) & (at_row < height))[:, None] & ((at_column >= 0) & (at_column < width))[None]
    return shape[np.clip(at_row, 0, height - 1)[:, None], np.clip(at_column, 0, width - 1)[None]] & inside


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """The centred views of every outline at every tilt: bool (classes, tilts, 32 * 32)."""
    y, x = np.mgrid[-1.5:1.5:200j, -1.5:1.5:200j]
    views = [
        [_centred_view(outline(np.cos(t) * x + np.sin(t) * y, np.cos(t) * y - np.sin(t) * x)) for t in _TILTS]
        for outline in OUTLINES.values()
    ]
    return np.array(views).reshape(len(OUTLINES), len(_TILTS), -1)


def _smooth(shape: np.ndarray) -> np.ndarray:
    """Remove stray pixels of a shape, bool (H, W), by the majority of each 3 x 3 neighbourhood."""
    padded = np.pad(shape.astype(np.uint8), 1, mode="edge")
    height, width = shape.shape
    return np.sum([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0) >= 5


def recognise(image: np.ndarray, *, least_overlap: float = 0.6) -> int | None:
    """Recognise the class of an image, uint8 (H, W, 3), by the outline of its shape; None if no outline fits.

    Args:
        least_overlap: smallest intersection over union of the shape and the outline of a class.
    """
    shape = _smooth(_shape_pixels(image.astype(np.float32) / 255))
    if not 0.01 < shape.mean() < 0.6:
        return None
    view, templates = _centred_view(shape).reshape(-1), _templates()
    overlap = ((templates & view).sum(-1) / (templates | view).sum(-1)).max(1)
    return int(overlap.argmax()) if overlap.max() >= least_overlap else None


def segment(image: np.ndarray) -> np.ndarray:
    """Segment an image, uint8 (H, W, 3), by colour and outline: indices into SEGMENT_NAMES, uint8 (H, W).

    A shape that is not recognised counts as the first class: as a shape, but nearly always of the wrong class.
    """
    pixels = image.astype(np.float32) / 255
    low, high = pixels.min(-1), pixels.max(-1)
    is_cloud, is_ground = (high - low < 0.12 * high) & (high > 0.85), pixels[..., 1] > pixels[..., 2]
    result = np.where(is_cloud, SEGMENTS_BEHIND.index("cloud"), is_ground).astype(np.uint8)
    result[_shape_pixels(pixels)] = len(SEGMENTS_BEHIND) + (recognise(image) or 0)
    return result


def _shape_pixels(pixels: np.ndarray) -> np.ndarray:
    """The pixels of shapes, which are the saturated ones, in an RGB image in [0, 1]: bool (H, W)."""
    low, high = pixels.min(-1), pixels.max(-1)
    return (high - low > 0.56 * high) & (high > 0.35)
