"""Random images, files that hold them, and the content of folders of shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from lfm.data.raw_shards import read_raw
from lfm.types import RawSample


def random_pixels(*shape: int, high: int = 256) -> np.ndarray:
    """Return uint8 noise in [0, high), the same for the same shape."""
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(np.uint8)


def image_bytes(pixels: np.ndarray | Image.Image, **options: object) -> bytes:
    """Return the content of an image file: PNG, or as `options` of `PIL.Image.save` say."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def save_image(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    """Write an image file, with its parent folders; `options` are those of `PIL.Image.save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)


def image_folder(root: Path, count: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write random JPEGs into class folders and return their root."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = root / classes[index % len(classes)] / f"{index}.jpg"
        save_image(path, random.integers(0, 256, (20, 24, 3), np.uint8))
    return root


def random_images(folder: Path, count: int = 30, size: int = 16) -> Path:
    """Write random square PNGs to a new folder and return it."""
    random = np.random.default_rng(0)
    for index in range(count):
        save_image(folder / f"{index:03d}.png", random.integers(0, 256, (size, size, 3), np.uint8))
    return folder


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw_samples(raw: Path) -> dict[str, RawSample]:
    """Return the samples of all raw shards of a folder by their source path."""
    samples = {}
    for shard in sorted(raw.glob("*.tar")):
        with shard.open("rb") as stream:
            samples |= {sample.metadata["source"]: sample for sample in read_raw(stream, str(shard))}
    return samples
