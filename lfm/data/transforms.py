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
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lfm.errors import DataError

# Not all formats of Pillow: for some it runs other programs (Ghostscript for EPS).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_LOSSY = ("JPEG", "JPEG2000", "HEIF", "AVIF", "JXL", "MPO")
MOST_HEADER = 4096  # bytes of a WebP in front of its pixels, where its kind is named
MOST_LEVELS_OF_12_BITS = 0xFFF  # nearly black among those of 16 bits
LARGEST_PIXELS = 200_000_000  # larger images are taken for decompression bombs
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow images whose pixels are class ids
MOST_SATURATION = 32  # of a mask that counts as grey: JPEG alters equal channels
BACKGROUND = (255, 255, 255)  # behind transparent pixels and around padded images


MaskValue = Literal["white", "black", "opaque", "transparent"]


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


@cache
def _optional_formats() -> tuple[str, ...]:
    """Register the decoders of the extras that are installed, and return Pillow's names of their formats."""
    formats = []
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401

        formats.append("JXL")
    return tuple(formats)


def _optional_format(content: bytes) -> str | None:
    """Return the format of a file that Pillow reads with an extra: HEIF or JXL."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "HEIF"
    if content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JXL"
    return None


def _loaded(content: bytes) -> Image.Image:
    if not content:
        raise Rejected("empty file")
    optional = _optional_format(content)
    formats = (optional,) if optional and optional in _optional_formats() else PILLOW_FORMATS
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError as error:
        if optional and optional not in formats:
            raise Rejected("of a format of an extra", f"pip install 'lfm[{optional.lower()}]' reads it") from error
        raise
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

    An image of three equal channels is grey.

    Raises:
        Rejected: the content is no image, or its pixels are no class ids.
    """
    with _rejecting():
        image = load_map(content)
        ids = np.asarray(image if image.mode in ID_MODES else _grey(image))
        if ids.min() < 0 or ids.max() > 0xFFFF:
            raise Rejected("not a map", f"ids {ids.min()} to {ids.max()}; at most 16 bits")
        return ids.astype(np.uint16 if image.mode.startswith("I") else np.uint8)


def decode_colours(content: bytes) -> np.ndarray:
    """Return the colours of a segmentation whose classes are colours: int32 (H, W), 0xRRGGBB.

    Raises:
        Rejected: the content is no image, or lossy.
    """
    with _rejecting():
        rgb = np.asarray(load_map(content).convert("RGB"), np.int32)
    return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]


def load_map(content: bytes) -> Image.Image:
    """Return the image of a segmentation in its own mode.

    Raises:
        Rejected: its format alters class ids, or it is partly transparent.
    """
    with _rejecting():
        image = _loaded(content)
        if image.format in _LOSSY or (image.format == "WEBP" and b"VP8 " in content[:MOST_HEADER]):
            raise Rejected("not a map", f"{image.format} alters class ids; store it as PNG")
        if _alpha(image) is not None and image.mode != "P":
            raise Rejected("not a map", "it is partly transparent")
        return image


def _grey(image: Image.Image) -> Image.Image:
    """Return the first channel of an image whose three channels are equal."""
    rgb = np.asarray(image.convert("RGB"))
    if not (rgb == rgb[..., :1]).all():
        raise Rejected("not a map", f"mode {image.mode}; class ids are grey levels or palette indices, not colours")
    return Image.fromarray(np.ascontiguousarray(rgb[..., 0]))


def decode_mask(content: bytes, value: MaskValue = "white") -> Image.Image:
    """Return a mask as an image of mode L; levels from 128 on are holes.

    Holes are white or coloured, on black or on transparent; of 0 and one other level, such as 1, they are the other one.
    In a partly transparent image that is not painted in one colour, holes are transparent.

    Args:
        value: the kind of pixels that are holes, if the rule above does not hold.

    Raises:
        Rejected: the content is no image, or no mask.
    """
    with _rejecting():
        image = ImageOps.exif_transpose(_loaded(content))
        alpha = _alpha(image)
        if alpha is None:
            if value in ("opaque", "transparent"):
                raise Rejected("opaque", "no pixel is transparent")
            levels = _mask_levels(image)
        else:
            levels = _layer_levels(np.asarray(image.convert("RGBA"))[..., :3], alpha, value)
        return Image.fromarray(255 - levels if value == "black" else levels)


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha channel, uint8 (H, W); None if it is the same everywhere."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return None if alpha.min() == alpha.max() else alpha


def _layer_levels(colours: np.ndarray, alpha: np.ndarray, value: MaskValue) -> np.ndarray:
    """Return the levels of a partly transparent mask: strokes on a transparent layer, or an image with holes cut out.

    Raises:
        Rejected: it may be either, since the opaque pixels have one dark colour, and `value` does not decide.
    """
    if value in ("opaque", "transparent"):
        return alpha if value == "opaque" else 255 - alpha
    painted = colours[alpha >= 128]
    is_plain = painted.size > 0 and np.ptp(painted, 0).max() <= 16
    if is_plain and painted.max() < 128:
        raise Rejected("dark on transparent", "holes may be opaque or transparent; `mask_value` decides")
    return alpha if is_plain else 255 - alpha


def _mask_levels(image: Image.Image) -> np.ndarray:
    """Return the levels, uint8 (H, W), of a mask without transparency, spread to both sides of 128.

    Raises:
        Rejected: it has colours of several classes, or levels that are neither black nor white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        levels, largest = np.asarray(image).astype(np.int64), 0xFFFF
    else:
        rgb, largest = np.asarray(image.convert("RGB")), 255
        saturation = np.ptp(rgb, -1)
        if saturation.max() <= MOST_SATURATION:
            levels = np.asarray(image.convert("RGB").convert("L"))
        else:
            levels = rgb.max(-1)
            bright = rgb[levels >= 128].astype(np.int64)
            hues = (2 * bright > bright.max(-1, keepdims=True)) @ np.array([4, 2, 1])
            if (np.bincount(hues, minlength=1) > 0.01 * levels.size).sum() > 1:
                raise Rejected("of several colours", "holes have one colour, on black or on transparent")
    values = np.unique(levels)
    is_dark, is_bright = values[-1] <= largest // 2, values[0] > largest // 2
    if len(values) == 1 and values[0] > 0:
        return np.full(levels.shape, 255, np.uint8)
    if len(values) == 2 and values[0] == 0 and is_dark:
        return np.where(levels > 0, 255, 0).astype(np.uint8)
    if values[-1] > 0 and (is_dark or is_bright):
        raise Rejected("not binary", f"levels {values[0]} to {values[-1]}; class ids, or no black and white")
    return np.round(levels / (largest // 255)).clip(0, 255).astype(np.uint8)


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
    """Return an image as 8-bit RGB.

    Raises:
        Rejected: its pixels are real numbers, or integers of another range than 16 bits.
    """
    if image.mode == "F":
        raise Rejected("of real numbers", "which level is white is not known; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF or 0 < values.max() <= MOST_LEVELS_OF_12_BITS:
            raise Rejected("of another range", f"levels {values.min()} to {values.max()}, where 65535 is white")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
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
