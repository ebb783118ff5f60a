"""Near duplicates: images that differ by compression, size or small retouches alone, found by a hash of what they look like.

The perceptual hash (imagehash's phash) has a bit for each of the 64 lowest frequencies of the brightness: whether it is above
their median. Copies differ in few bits. Since it does not see colours, the mean colours of two images must be close, too.

All pairs of hashes that differ in at most 3 of 64 bits agree in at least one of four blocks of 16 bits, so that only hashes
with an equal block are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lfm.errors import ConfigError

MOST_BITS = 3  # of 64, in which the hashes of near duplicates differ
MOST_LEVELS = 12  # of 255, in which the mean of each colour differs
HASHED_SIZE = 64  # pixels of a side of the images that are hashed
NO_IMAGE = np.array([0, 2**63], np.uint64)
_BLOCK = 16  # bits


@dataclass(frozen=True)
class NearDuplicate:
    """An image and an earlier one that it is a near duplicate of, by their numbers."""

    image: int
    earlier: int
    bits: int  # in which their hashes differ


def import_imagehash(user: str) -> Any:
    """Return the module imagehash.

    Raises:
        ConfigError: it is not installed; names `user`, which needs it.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError(f"{user}: needs `pip install lfm[duplicates]`") from error
    return imagehash


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Return the hash and the mean colour, 0xRRGGBB, of an image, uint8 (64, 64, 3): uint64 (2,).

    Raises:
        ConfigError: imagehash is not installed.
    """
    bits = import_imagehash("perceptual hashes").phash(Image.fromarray(image)).hash
    red, green, blue = image.reshape(-1, 3).mean(axis=0).round().astype(int).tolist()
    value = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return np.array([value, (red << 16) | (green << 8) | blue], np.uint64)


def near_duplicates(hashes: np.ndarray) -> list[NearDuplicate]:
    """Return the images that are near duplicates of an earlier one that is none itself, in their order.

    Args:
        hashes: uint64 (images, 2), of `perceptual_hash`; `NO_IMAGE` is near to nothing.
    """
    images = np.flatnonzero(hashes[:, 1] != NO_IMAGE[1])
    different, first, of_image = np.unique(hashes[images], axis=0, return_index=True, return_inverse=True)
    # Of several images with one hash and colour the first stands for all; the others are near to it, or to what it is near to.
    in_order = np.argsort(first)
    pairs = _close_pairs(different[in_order])
    representative = np.arange(len(different))
    for earlier, later in pairs.tolist():
        if representative[later] == later and representative[earlier] == earlier:
            representative[later] = earlier
    rank = np.empty_like(in_order)
    rank[in_order] = np.arange(len(in_order))
    nearest = images[first[in_order][representative[rank[of_image.reshape(-1)]]]]
    copies = np.flatnonzero(nearest != images)
    bits = np.bitwise_count(hashes[images[copies], 0] ^ hashes[nearest[copies], 0])
    return [
        NearDuplicate(image, earlier, differing)
        for image, earlier, differing in zip(
            images[copies].tolist(), nearest[copies].tolist(), bits.tolist(), strict=True
        )
    ]


def _close_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return the pairs of different hashes that are close, int64 (pairs, 2): sorted by the later one, then the earlier one."""
    close = [np.zeros((0, 2), np.int64)]
    colours = np.stack([(hashes[:, 1] >> np.uint64(shift)) & np.uint64(255) for shift in (16, 8, 0)]).astype(np.int16)
    for block in range(64 // _BLOCK):
        keys = (hashes[:, 0] >> np.uint64(_BLOCK * block)) & np.uint64(2**_BLOCK - 1)
        order = np.argsort(keys, kind="stable")
        ends = np.searchsorted(keys[order], keys[order], side="right")  # of the group of equal blocks
        places = np.arange(len(order))
        distance = 1
        while len(places := places[places + distance < ends[places]]):
            earlier, later = order[places], order[places + distance]
            is_close = np.bitwise_count(hashes[earlier, 0] ^ hashes[later, 0]) <= MOST_BITS
            is_close &= (abs(colours[:, earlier] - colours[:, later]) <= MOST_LEVELS).all(axis=0)
            close.append(np.stack([earlier[is_close], later[is_close]], axis=1))
            distance += 1
    pairs = np.unique(np.concatenate(close), axis=0)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
