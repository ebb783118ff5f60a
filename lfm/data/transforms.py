"""From an encoded picture of any kind to uint8 (H, W, 3), by rules that have names.

Resize and crop follow ADM (Dhariwal and Nichol, 2021, `center_crop_arr`): halve by box filter while the short side is at
least twice the size, then bicubic to the size, then the centre.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lfm.errors import DataError

# Not all that Pillow knows: some it hands to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LARGEST_PIXELS = 200_000_000  # above this a file is taken for a decompression bomb
BACKGROUND = (255, 255, 255)  # what shows through where alpha is below one


class Rejected(Exception):
    """A sample cannot be used: `reason` is a word or two to count by, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(content: bytes) -> Image.Image:
    """An encoded picture as RGB, upright.

    EXIF orientation is applied; alpha is put on white; grey, palette, CMYK and 16-bit pictures become 8-bit RGB.

    Raises:
        Rejected: it is empty, no picture, truncated or too large.
    """
    if not content:
        raise Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > LARGEST_PIXELS:
                raise Rejected("too large", f"{image.width} x {image.height} pixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise Rejected("not a picture") from error
    except Image.DecompressionBombError as error:
        raise Rejected("too large", str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # Pillow's decoders raise anything: struct.error, TypeError, RuntimeError, ...
        raise Rejected("cannot be decoded", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, (*BACKGROUND, 255)), picture)
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's resize and centre crop of an RGB picture: uint8 (size, size, 3)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale * size > LARGEST_PIXELS:
        raise Rejected("too narrow", f"{image.width} x {image.height} pixels")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


CROPS = {"centre": centre_crop}


def crop(image: Image.Image, size: int, rule: str = "centre") -> np.ndarray:
    """The picture at the image size by the named rule: uint8 (size, size, 3)."""
    if rule not in CROPS:
        raise DataError(f"crop {rule}: unknown rule; one of {', '.join(CROPS)}")
    return CROPS[rule](image, size)
