"""Pictures for people: grids and single files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lfm import storage

NOTE = "lfm"  # the key of a PNG's metadata


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


def colours(ids: np.ndarray) -> np.ndarray:
    """A colour for each class id, neighbours far apart: float32 (H, W, 3)."""
    turns = np.multiply.outer(ids.astype(np.float32), np.array([0.618034, 0.381966, 0.754878], np.float32))
    return 255 * (0.5 + 0.5 * np.cos(2 * np.pi * turns))


def save(image: np.ndarray | Image.Image, path: str | Path, *, flush: bool = True, note: Any = None) -> None:
    """Publish a picture, uint8 (H, W, 3), as PNG, with a note in its metadata that is JSON."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer, metadata = io.BytesIO(), PngInfo()
    if note is not None:
        metadata.add_text(NOTE, json.dumps(note))
    picture.save(buffer, "PNG", pnginfo=metadata)
    storage.write_bytes(str(path), buffer.getvalue(), flush=flush)


def note(path: str) -> Any:
    """The note of a PNG, None where it has none or is no picture."""
    try:
        with storage.open_read(path) as file, Image.open(file) as picture:
            return json.loads(picture.info.get(NOTE, "null"))
    except (OSError, ValueError, SyntaxError):
        return None


def save_film(frames: Sequence[Image.Image], path: str, *, seconds: float = 3.0) -> None:
    """Publish pictures of equal size as a GIF that plays for this time, and then shows the last for a while."""
    buffer = io.BytesIO()
    times = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    storage.write_bytes(path, buffer.getvalue())
