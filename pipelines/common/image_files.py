"""Write images: grids, single files with metadata, and animations."""

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
from lfm.errors import ConfigError

NOTE = "lfm"  # key of the metadata in a PNG


def grid(images: np.ndarray, *, columns: int | None = None, gap: int = 2, enlarge: int = 1) -> Image.Image:
    """Arrange images, uint8 (B, H, W, 3), row by row on white; nearly square unless `columns` is set."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    sheet = Image.fromarray(canvas)
    return sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)


def colours(ids: np.ndarray) -> np.ndarray:
    """Return a colour for each class id, uint8 or uint16 (H, W), as float32 (H, W, 3) in [0, 255]; similar ids differ."""
    turns = np.multiply.outer(ids.astype(np.float32), np.array([0.618034, 0.381966, 0.754878], np.float32))
    return 255 * (0.5 + 0.5 * np.cos(2 * np.pi * turns))


def save(image: np.ndarray | Image.Image, path: str | Path, *, flush: bool = True, note: Any = None) -> None:
    """Write an image, uint8 (H, W, 3), as PNG, with a note in its metadata that JSON can represent."""
    pil_image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer, metadata = io.BytesIO(), PngInfo()
    if note is not None:
        metadata.add_text(NOTE, json.dumps(note))
    pil_image.save(buffer, "PNG", pnginfo=metadata)
    storage.write_bytes(str(path), buffer.getvalue(), flush=flush)


def require_png(option: str, path: str) -> None:
    """Raise ConfigError, naming the option, if a file to save an image in is not named as a PNG."""
    if not path.lower().endswith(".png"):
        raise ConfigError(f"`{option}` {path}: must be a file name that ends with .png")


def note(path: str) -> Any:
    """Return the note of a PNG; None if the file has none, is damaged, or is not an image."""
    try:
        with storage.open_read(path) as file, Image.open(file, formats=("PNG",)) as image:
            content = json.loads(image.info.get(NOTE, "null"))
            image.verify()  # the checksums of all its parts
            return content
    except (
        OSError,
        ValueError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        return None


def save_animation(frames: Sequence[Image.Image], path: str, *, seconds: float = 3.0) -> None:
    """Write images of equal size as a GIF that plays for `seconds` and then shows the last image for two seconds."""
    buffer = io.BytesIO()
    times = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    storage.write_bytes(path, buffer.getvalue())
