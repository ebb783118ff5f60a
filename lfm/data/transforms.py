"""Decoding images, maps and masks, and resizing them to one size by named rules.

Resize and crop follow ADM (Dhariwal and Nichol, 2021, `center_crop_arr`): halve by box filter while the short side is at
least twice its target, then bicubic to the target, then crop the centre. The rules differ only in the target. An image's
map is resized to the same target by nearest neighbour.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lfm.errors import DataError

# Not all formats of Pillow: for some it runs other programs (Ghostscript for EPS).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LARGEST_PIXELS = 200_000_000  # larger images are taken for decompression bombs
BACKGROUND = (255, 255, 255)  # behind transparent pixels and around padded images


class Rejected(Exception):
    """A sample cannot be used: `reason`, one or two words by which rejects are counted, and `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Turn every exception of Pillow into a rejection with a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        raise Rejected("not an image") from error
    except Image.DecompressionBombError as error:
        raise Rejected("too large", str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # Pillow's decoders raise struct.error, TypeError, RuntimeError and others
        raise Rejected("cannot be decoded", str(error)) from error


def _loaded(content: bytes) -> Image.Image:
    if not content:
        raise Rejected("empty file")
    image = Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    if image.width * image.height > LARGEST_PIXELS:
        raise Rejected("too large", f"{image.width} x {image.height} pixels")
    image.load()
    return image


def decode(content: bytes | np.ndarray) -> Image.Image:
    """Return an encoded image, or pixels uint8 (H, W, 3), as an upright RGB image.

    EXIF orientation is applied; transparent pixels are blended with white; grey, palette, CMYK and 16-bit images become
    8-bit RGB.

    Raises:
        Rejected: the content is empty, no image, truncated or too large.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    with _rejecting():
        return _to_rgb(ImageOps.exif_transpose(_loaded(content)))


def decode_ids(content: bytes) -> np.ndarray:
    """Return the class ids of a segmentation, uint8 or uint16 (H, W): grey levels, or the indices of a palette image.

    Raises:
        Rejected: the content is no image, or its pixels are no class ids.
    """
    with _rejecting():
        image = _loaded(content)
        if image.format in ("JPEG", "JPEG2000"):
            raise Rejected("not a map", f"{image.format} alters class ids; store it as PNG")
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise Rejected("not a map", f"mode {image.mode}; class ids are grey levels or palette indices")
        ids = np.asarray(image)
        if ids.min() < 0 or ids.max() > 0xFFFF:
            raise Rejected("not a map", f"ids {ids.min()} to {ids.max()}; at most 16 bits")
        return ids.astype(np.uint16 if image.mode.startswith("I") else np.uint8)


def decode_mask(content: bytes) -> Image.Image:
    """Return a mask as an image of mode L; levels from 128 on are holes.

    Raises:
        Rejected: the content is no image.
    """
    return decode(content).convert("L")


def binary(mask: np.ndarray) -> np.ndarray:
    """Return a mask's grey levels, thresholded at one half: uint8 (H, W), 1 = hole."""
    return (mask >= 128).astype(np.uint8)


def paint(parts: Iterable[tuple[int, bytes]]) -> np.ndarray:
    """Return the map, uint8 (H, W), of parts, each a class id and a mask; later parts cover earlier ones, 0 elsewhere.

    Raises:
        Rejected: there are no parts, or they differ in size.
    """
    masks = [binary(np.asarray(decode_mask(content))) * np.uint8(class_id) for class_id, content in parts]
    if len({mask.shape for mask in masks}) != 1:
        raise Rejected("missing" if not masks else "not a map", "its parts differ in size" if masks else "no parts")
    ids = masks[0]
    for mask in masks[1:]:
        ids = np.where(mask, mask, ids)
    return ids


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba)
    return image.convert("RGB")


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))


# The width and height to which an image is resized before its centre, size x size, is cropped or padded.
CROPS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "centre": lambda width, height, size: _scaled(width, height, size / min(width, height)),
    "pad": lambda width, height, size: _scaled(width, height, size / max(width, height)),
    "squash": lambda width, height, size: (size, size),
}


def _centred(image: Image.Image, size: int, fill: int | tuple[int, ...]) -> np.ndarray:
    """Return the centre (size, size) of an image or map, padded with `fill` if it is smaller."""
    canvas = Image.new(image.mode, (size, size), fill)
    canvas.paste(image, (-((image.width - size) // 2), -((image.height - size) // 2)))
    return np.asarray(canvas)


def _target(width: int, height: int, size: int, rule: str) -> tuple[int, tuple[int, int]]:
    """Return how often an image is halved, and the width and height to which it is then resized.

    Raises:
        Rejected: the target would fill the memory.
    """
    halvings, target = 0, CROPS[rule](width, height, size)
    while min(width, height) >= 2 * min(target):
        halvings, width, height = halvings + 1, width // 2, height // 2
        target = CROPS[rule](width, height, size)
    if target[0] * target[1] > LARGEST_PIXELS:
        raise Rejected("too narrow", f"{width} x {height} pixels")
    return halvings, target


def crop(image: Image.Image, size: int, rule: str = "centre") -> np.ndarray:
    """Resize and crop an RGB image or a grey mask by a rule of CROPS: uint8 (size, size, 3) or (size, size).

    Raises:
        Rejected: it is too narrow.
    """
    if rule not in CROPS:
        raise DataError(f"crop {rule}: unknown rule; one of {', '.join(CROPS)}")
    halvings, target = _target(image.width, image.height, size, rule)
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _centred(image.resize(target, Image.Resampling.BICUBIC), size, BACKGROUND if image.mode == "RGB" else 0)


def crop_ids(ids: np.ndarray, image: tuple[int, int], size: int, rule: str, fill: int) -> np.ndarray:
    """Resize and crop a map as `crop` does its image of size (width, height): class ids (size, size).

    Args:
        fill: the class id of the border of a padded image.
    """
    _, target = _target(*image, size, rule)
    return _centred(Image.fromarray(ids).resize(target, Image.Resampling.NEAREST), size, fill)
