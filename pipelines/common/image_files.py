"""Write images: grids, single files with metadata, animations and plots."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from lfm import storage

NOTE = "lfm"  # key of the metadata in a PNG
COLOURS = ("steelblue", "darkorange")


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


def note(path: str) -> Any:
    """Return the note of a PNG; None if the file has none or is not an image."""
    try:
        with storage.open_read(path) as file, Image.open(file) as image:
            return json.loads(image.info.get(NOTE, "null"))
    except (OSError, ValueError, SyntaxError):
        return None


def save_animation(frames: Sequence[Image.Image], path: str, *, seconds: float = 3.0) -> None:
    """Write images of equal size as a GIF that plays for `seconds` and then shows the last image for two seconds."""
    buffer = io.BytesIO()
    times = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    storage.write_bytes(path, buffer.getvalue())


def plot(curves: dict[str, list[tuple[float, float]]], width: int = 640, height: int = 360) -> Image.Image:
    """Curves over samples seen, by name; the vertical axis is logarithmic where all values are positive."""
    image = Image.new("RGB", (width, height), "white")
    draw, edge = ImageDraw.Draw(image), 50
    values = [value for points in curves.values() for _, value in points]
    logarithmic = min(values) > 0
    rise = math.log if logarithmic else float
    low, high = rise(min(values)), rise(max(values))
    last = max(x for points in curves.values() for x, _ in points)

    def place(x: float, value: float) -> tuple[float, float]:
        share = (rise(value) - low) / (high - low) if high > low else 0.5
        return edge + x / last * (width - 1.5 * edge), height - edge - share * (height - 1.5 * edge)

    for part in range(5):
        value = low + (high - low) * part / 4
        at = place(0, math.exp(value) if logarithmic else value)[1]
        draw.line([(edge, at), (width - edge / 2, at)], "lightgrey")
        draw.text((4, at - 6), f"{math.exp(value) if logarithmic else value:.3g}", "black")
        seen = f"{round(last * part / 4):,}"
        draw.text(
            (place(last * part / 4, values[0])[0], height - edge + 8), seen, "black", anchor="ra" if part else "la"
        )
    draw.text((width / 2, height - 20), "samples seen", "black", anchor="ma")
    for number, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        draw.line([place(*point) for point in points], colour, width=2)
        draw.text((width - edge / 2 - 110, 8 + 14 * number), name, colour)
    return image
