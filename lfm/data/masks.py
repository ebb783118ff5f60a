"""Random masks for inpainting, a function of the sample's key: the large holes of MAT (Li et al., 2022), as in the paper.

A mask is the union of up to three boxes of at most half the side, at most one of up to the whole side, and up to seven
strokes of a brush that turns sharply at each of its 4 to 17 corners. Lengths are fractions of the side, so that masks of
all sizes cover the same share of the image: 41 % on average, from nearly nothing to nearly all.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

_STREAM = 1 << 62  # distinguishes these random numbers from those of other modules
TURN, TURN_SPREAD = 2 * math.pi / 5, 2 * math.pi / 15
BRUSH = (12 / 256, 48 / 256)
GREY = 128  # of hidden pixels: zero to the autoencoder


def free_form(seed: int, key: str, size: int) -> np.ndarray:
    """Return the mask of one sample: uint8 (size, size), 1 = hole; if size > 1, neither empty nor full."""
    random = np.random.Generator(np.random.Philox(key=np.array([_STREAM + seed, int(key)], np.uint64)))
    while True:
        mask = Image.new("L", (size, size))
        draw = ImageDraw.Draw(mask)
        for most, largest in ((4, size / 2), (2, size)):
            for _ in range(random.integers(most)):  # at least half of each side lies within the image
                sides = random.uniform(0, largest, 2)
                corner = random.uniform(-sides / 2, size - sides / 2)
                draw.rectangle((*corner, *(corner + sides - 1).clip(corner)), fill=1)
        flip = random.random(2) < 0.5
        for _ in range(random.integers(8)):
            width = max(1, int(random.uniform(*BRUSH) * size))
            corners = [tuple(np.where(flip, size - corner, corner)) for corner in _stroke(random, size)]
            draw.line(corners, fill=1, width=width)
            for x, y in corners:
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
        holes = np.asarray(mask)
        if 0 < holes.mean() < 1 or size == 1:
            return holes


def _stroke(random: np.random.Generator, size: int) -> list[np.ndarray]:
    """Return the corners (x, y) of a zigzag line."""
    spread, length = random.uniform(0, TURN_SPREAD, 2), math.sqrt(2) * size / 8
    corners = [random.uniform(0, size, 2)]
    for number in range(random.integers(4, 18)):
        angle = random.uniform(TURN - spread[0], TURN + spread[1]) * (-1 if number % 2 == 0 else 1)
        step = np.clip(random.normal(length, length / 2), 0, 2 * length)
        corners.append((corners[-1] + step * np.array([math.cos(angle), math.sin(angle)])).clip(0, size))
    return corners


MASKS = {"free-form": free_form}


def hide(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return images uint8 (..., H, W, 3) with the pixels where the masks (..., H, W) are 1 set to middle grey."""
    return np.where(masks[..., None] != 0, np.uint8(GREY), images)


def at_latent_size(masks: np.ndarray, factor: int) -> np.ndarray:
    """Max-pool masks (..., H, W) to uint8 (..., H / factor, W / factor), so that thin strokes survive."""
    *rest, height, width = masks.shape
    cells = masks.reshape(*rest, height // factor, factor, width // factor, factor)
    return cells.max((-3, -1)).astype(np.uint8)
