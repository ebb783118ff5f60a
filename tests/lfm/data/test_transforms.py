"""Every kind of image becomes the right RGB, and every kind of rubbish is rejected with a reason."""

from __future__ import annotations

import io
import subprocess
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from lfm.data.transforms import BACKGROUND, CROPS, Rejected, crop, decode
from lfm.errors import DataError
from tests.support.recorded_values import recorded

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 17, 3)).astype(np.uint8)
# a smooth one, which JPEG keeps nearly as it is
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[40:200:24j, 60:220:17j], 90.0), -1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- what an image becomes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_rgb_is_unchanged(file_format: str) -> None:
    assert np.array_equal(decoded(encoded(PIXELS, file_format)), PIXELS)
    assert np.array_equal(decoded(encoded(PIXELS, "WEBP", lossless=True)), PIXELS)


def test_lossy_rgb_is_near() -> None:
    for options in ({"file_format": "JPEG", "quality": 95}, {"file_format": "WEBP", "quality": 95}):
        assert np.abs(decoded(encoded(SMOOTH, **options)).astype(int) - SMOOTH).max() < 12  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """How the stored pixels must be turned to stand upright, by the EXIF specification."""
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(PIXELS, exif=exif)), turned)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return pixels * share + 255 * (1 - share)


ALPHA = np.linspace(0, 255, 24 * 17).reshape(24, 17).round().astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_alpha_is_put_on_white(file_format: str) -> None:
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    content = encoded(np.dstack([PIXELS, ALPHA]), file_format, **options)
    assert np.abs(decoded(content) - on_white(PIXELS, ALPHA)).max() <= 1
    assert (decoded(content)[ALPHA == 0] == 255).all()


def test_grey_with_alpha_is_put_on_white() -> None:
    content = encoded(Image.merge("LA", [Image.fromarray(PIXELS[..., 0]), Image.fromarray(ALPHA)]))
    assert np.abs(decoded(content) - on_white(PIXELS[..., :1].repeat(3, 2), ALPHA)).max() <= 1


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255]), None])
def test_a_palette_with_transparency_is_put_on_white(transparency: int | bytes | None) -> None:
    index = (PIXELS[..., 0] % 3).astype(np.uint8)
    palette = np.array([[200, 10, 20], [30, 180, 40], [50, 60, 170]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    alpha = {0: [0, 255, 255], None: [255] * 3}.get(transparency, [0, 128, 255])  # type: ignore[arg-type]
    content = encoded(image, **({} if transparency is None else {"transparency": transparency}))
    expected = on_white(palette[index], np.array(alpha, np.uint8)[index])
    assert np.abs(decoded(content) - expected).max() <= 1


def test_one_transparent_colour_of_rgb_and_grey_is_white() -> None:
    pixels = PIXELS.copy()
    pixels[3, 4] = (1, 2, 3)
    assert decoded(encoded(pixels, transparency=(1, 2, 3)))[3, 4].tolist() == [255] * 3
    grey = PIXELS[..., 0].copy()
    grey[3, 4] = 77
    assert decoded(encoded(grey, transparency=77))[3, 4].tolist() == [255] * 3


def test_grey_and_black_and_white_become_rgb() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(decoded(encoded(grey)), grey[..., None].repeat(3, 2))
    assert set(decoded(encoded(Image.fromarray(grey > 127))).ravel()) == {0, 255}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_cut(file_format: str) -> None:
    levels = np.linspace(0, 65535, 24 * 17).reshape(24, 17).round().astype(np.uint16)
    assert Image.open(io.BytesIO(encoded(levels, file_format))).mode.startswith("I;16")
    result = decoded(encoded(levels, file_format))
    assert np.abs(result[..., 0] - levels / 257.0).max() <= 0.5
    assert result.min() == 0 and result.max() == 255


def test_cmyk_is_not_inverted() -> None:
    content = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert np.abs(decoded(content).astype(int) - SMOOTH).max() < 16


def test_the_first_image_of_a_film_is_taken() -> None:
    flat = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    content = encoded(flat[0], "GIF", save_all=True, append_images=flat[1:])
    assert decoded(content)[0, 0].tolist() == [255, 0, 0]


# --- what is rejected --------------------------------------------------------------------------------------------


def rejected(content: bytes) -> Rejected:
    with pytest.raises(Rejected) as error:
        decode(content)
    assert error.value.reason and error.value.reason == error.value.reason.strip()
    return error.value


def test_what_is_no_image_is_rejected() -> None:
    assert rejected(b"").reason == "empty file"
    for content in (b"\0", b"hello", b"<html></html>" * 99, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(10_000)):
        assert rejected(content).reason in ("not an image", "cannot be decoded")


FORMATS: dict[str, bytes] = {
    "PNG": encoded(PIXELS),
    "JPEG": encoded(PIXELS, "JPEG"),
    "progressive": encoded(PIXELS, "JPEG", progressive=True),
    "WEBP": encoded(PIXELS, "WEBP"),
    "GIF": encoded(PIXELS, "GIF"),
    "TIFF": encoded(PIXELS, "TIFF"),
    "JPEG2000": encoded(PIXELS, "JPEG2000"),
    "AVIF": encoded(PIXELS, "AVIF"),
    "BMP": encoded(PIXELS, "BMP"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_image_is_rejected_or_whole(name: str) -> None:
    content = FORMATS[name]
    whole = decoded(content)
    for length in [*range(0, min(len(content), 200), 3), *range(200, len(content), max(1, len(content) // 60))]:
        try:
            image = decoded(content[:length])
        except Rejected:
            continue
        # what is cut may have been an end mark or a later section; an image that is smaller or grey would be wrong
        assert name == "JPEG2000" or length > 0.9 * len(content), f"{length} of {len(content)} bytes were accepted"
        assert image.shape == whole.shape


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_image_is_rejected_or_decoded_and_nothing_else(
    name: str, changes: list[tuple[float, bool, int]]
) -> None:
    content = bytearray(FORMATS[name])
    for where, in_header, value in changes:
        content[int(where * (min(len(content), 128 if in_header else len(content)) - 1))] = value
    try:
        assert decode(bytes(content)).mode == "RGB"
    except Rejected as error:
        assert error.reason


def exif_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block of orientation 6 and one more entry, as cameras and editors write them wrongly."""
    entries = [(0x0112, 3, 1, b"\x06\0\0\0"), (tag, kind, count, value.ljust(4, b"\0"))]
    packed = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
        for tag, kind, count, value in sorted(entries)
    )
    return b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + packed + bytes(4)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x011A, 2, b"ab"), (0x0100, 2, b"ab"), (0x0128, 2, b"x"), (0x8769, 2, b"x"), (0x9003, 3, b"\1\0")],
)
def test_a_damaged_exif_block_is_no_reason_to_stop(tag: int, kind: int, value: bytes) -> None:
    content = encoded(SMOOTH, "JPEG", exif=exif_with(tag, kind, 1 if kind == 3 else len(value) + 1, value))
    try:
        assert decode(content).size == (24, 17), "turned"
    except Rejected as error:
        assert error.reason


def test_an_image_that_is_far_too_large_is_rejected_before_it_is_decoded() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
        assert rejected(bomb + chunk(b"IEND", b"")).reason == "too large"


def test_no_other_program_is_started_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called: an image is no program to run."""
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    for name in ("check_call", "check_output", "run", "Popen", "call"):
        monkeypatch.setattr(subprocess, name, lambda *arguments, **_: started.append(arguments))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Rejected):
        decode(eps)
    assert not started


# --- the crop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [48, 64])
def test_the_crop_is_adms_bit_for_bit(size: int) -> None:
    values = recorded("metrics")
    image = Image.fromarray(values["crop_in_u8_hwc"].numpy())
    assert np.array_equal(crop(image, size), values[f"crop{size}_u8"].numpy())


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_a_crop_has_its_size_whatever_the_image(width: int, height: int, size: int) -> None:
    flat = Image.new("RGB", (width, height), (10, 200, 30))
    for rule in CROPS:
        result = crop(flat, size, rule)
        assert result.shape == (size, size, 3) and result.dtype == np.uint8
        image = (result == (10, 200, 30)).all(-1)
        assert (image | (rule == "pad") & (result == BACKGROUND).all(-1)).all() and image[size // 2, size // 2]


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 40), extra=st.integers(0, 20), wide=st.booleans())
def test_a_crop_of_the_right_size_is_the_centre_itself(size: int, extra: int, wide: bool) -> None:
    pixels = np.random.default_rng(extra).integers(0, 256, (size, size + extra, 3)).astype(np.uint8)
    pixels = pixels if wide else pixels.swapaxes(0, 1)
    expected = pixels[:, extra // 2 : extra // 2 + size] if wide else pixels[extra // 2 : extra // 2 + size]
    assert np.array_equal(crop(Image.fromarray(pixels), size), expected)


def test_a_thread_of_an_image_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel wide and 60,000 high, it would be resized to 256 x 15,360,000: 12 GB."""
    sizes: list[int] = []

    def resize(self: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
        sizes.append(size[0] * size[1])
        return Image.new("RGB", (256, 256))

    monkeypatch.setattr(Image.Image, "resize", resize)
    try:
        crop(Image.new("RGB", (1, 60_000)), 256)
    except Rejected:
        return
    assert max(sizes, default=0) <= 100_000_000


def test_an_unknown_rule_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^crop random: unknown rule; one of centre, pad, squash$"):
        crop(Image.new("RGB", (8, 8)), 8, "random")
