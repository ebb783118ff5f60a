"""Pictures for people: grids and single files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from lfm import storage


def grid(images: np.ndarray, *, columns: int | None = None, gap: int = 2, enlarge: int = 1) -> Image.Image:
    """Pictures uint8 (B, H, W, 3) side by side on white, row by row; nearly square unless `columns` is given."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def save(image: np.ndarray | Image.Image, path: str | Path, *, flush: bool = True) -> None:
    """Publish a picture, uint8 (H, W, 3), as PNG."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    storage.write_bytes(str(path), buffer.getvalue(), flush=flush)
