"""Near duplicates: those of a brute-force search, copies that were compressed or resized, and no image of another colour."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm.data.near_duplicates import (
    HASHED_SIZE,
    MOST_BITS,
    MOST_LEVELS,
    NO_IMAGE,
    import_imagehash,
    near_duplicates,
    perceptual_hash,
)
from lfm.data.transforms import crop
from lfm.errors import ConfigError
from lfm.synthetic.scenes import draw_scene

FLIPPED = st.lists(st.integers(0, 63), max_size=5)
COLOURS = st.sampled_from([0x000000, 0x0C0000, 0x0D0000, 0x180C0C, 0x0000FF, 2**63])


def hash_of(image: Image.Image) -> np.ndarray:
    return perceptual_hash(crop(image, HASHED_SIZE))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 2**64 - 1]), FLIPPED, COLOURS), max_size=30))
def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(images: list[tuple[int, list[int], int]]) -> None:
    """In the order of the images, each is compared with all that were not near to an earlier one."""
    hashes = []
    for value, flipped, colour in images:
        for bit in flipped:
            value ^= 1 << bit
        hashes.append((value, colour))
    kept: list[int] = []
    expected = []
    for number, (value, colour) in enumerate(hashes):
        if colour == NO_IMAGE[1]:
            continue
        near = [
            other
            for other in kept
            if (value ^ hashes[other][0]).bit_count() <= MOST_BITS
            and all(abs((colour >> s & 255) - (hashes[other][1] >> s & 255)) <= MOST_LEVELS for s in (0, 8, 16))
        ]
        if near:
            expected.append((number, near))
        else:
            kept.append(number)
    found = near_duplicates(np.array(hashes, np.uint64).reshape(-1, 2))
    assert [each.image for each in found] == [number for number, _ in expected]
    for each, (number, near) in zip(found, expected, strict=True):
        assert each.earlier in near
        assert each.bits == (hashes[number][0] ^ hashes[each.earlier][0]).bit_count()


def test_copies_are_found_and_other_images_are_not() -> None:
    images = [Image.fromarray(draw_scene(0, number, 128).image) for number in range(12)]
    copies = [compressed(images[0], 40), images[3].resize((77, 77)), images[5].convert("L").convert("RGB")]
    hashes = np.stack([hash_of(image) for image in [*images, *copies]])
    assert [(each.image, each.earlier) for each in near_duplicates(hashes)] == [(12, 0), (13, 3)]


def test_one_shape_in_two_colours_is_no_copy() -> None:
    shirt = np.full((64, 64, 3), 255, np.uint8)
    red, blue = shirt.copy(), shirt.copy()
    red[16:56, 16:48] = 200, 60, 60
    blue[16:56, 16:48] = 60, 60, 200
    hashes = np.stack([perceptual_hash(image) for image in (red, blue, red * 0, red * 0 + 255)])
    assert near_duplicates(hashes) == []


def test_without_imagehash_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ConfigError, match=r"`near_duplicates` drop: needs `pip install lfm\[duplicates\]`"):
        import_imagehash("`near_duplicates` drop")
