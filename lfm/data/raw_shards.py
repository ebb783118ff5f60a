"""Raw shards: tars of images with their class, mask and segmentation.

A sample has the members `{key}.webp` (lossless), `.png` or `.jpg`, `{key}.json` (metadata) and, where it has them, `{key}.cls`,
`{key}.mask.png` (255 = hole) and `{key}.seg.png` (class ids).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from PIL import Image

from lfm.data.tar import encode_class, read_tar
from lfm.data.transforms import Rejected, decode
from lfm.errors import DataError, on_one_line
from lfm.prefetch import map_ahead
from lfm.types import RawSample

# Options of Pillow's `save` by image format, which is also the member's suffix.
IMAGE_ENCODINGS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "method": 0},
    "png": {"format": "PNG", "compress_level": 1},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},  # 4:4:4
}


def raw_members(sample: RawSample, image_format: str) -> dict[str, Any]:
    """Return a raw sample as the members of a tar, for `write_tar`."""
    members: dict[str, Any] = {"__key__": sample.key, image_format: _encode(sample.image, image_format)}
    if sample.class_index is not None:
        members["cls"] = encode_class(sample.class_index)
    if sample.mask is not None:
        members["mask.png"] = _encode(sample.mask * 255, "png")
    if sample.segmentation is not None:
        members["seg.png"] = _encode(sample.segmentation, "png")
    members["json"] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
    return members


def content_digest(members: dict[str, Any]) -> int:
    """Return 63 bits of a hash of what a raw sample shows: its image, class and segmentation, and not its mask or origin."""
    total = hashlib.blake2b(digest_size=8)
    shown = (suffix for suffix in members if suffix not in ("json", "mask.png") and not suffix.startswith("__"))
    for suffix in sorted(shown):
        total.update(f"{suffix} {len(members[suffix])}\n".encode() + members[suffix])
    return int.from_bytes(total.digest(), "little") >> 1


def _encode(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **IMAGE_ENCODINGS[image_format])
    return buffer.getvalue()


def read_raw(stream: IO[bytes], name: str, *, threads: int = 1) -> Iterator[RawSample]:
    """Yield the samples of an open raw shard in order, decoded by `threads`.

    A truncated shard may end early without an error: verify its checksum or compare the number of samples.

    Raises:
        DataError: a member is missing or cannot be read.
    """
    return map_ahead(lambda members: _decode_sample(members, name), read_tar(stream, name), threads)


def _decode_sample(members: dict[str, Any], name: str) -> RawSample:
    image = next((members[suffix] for suffix in IMAGE_ENCODINGS if suffix in members), None)
    if image is None:
        raise DataError(f"{name}: sample {members['__key__']} has no image; make the shard again")
    try:
        pixels = decode(image)
        mask, segmentation = (_grey_levels(members, suffix, pixels.size) for suffix in ("mask.png", "seg.png"))
        return RawSample(
            key=members["__key__"],
            image=np.asarray(pixels),
            class_index=int(members["cls"]) if "cls" in members else None,
            mask=None if mask is None else (mask > 127).astype(np.uint8),
            segmentation=segmentation,
            metadata=json.loads(members.get("json", b"{}")),
        )
    except (Rejected, ValueError, OSError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: sample {members['__key__']}: {on_one_line(error)}; make the shard again") from error


def _grey_levels(members: dict[str, Any], suffix: str, size: tuple[int, int]) -> np.ndarray | None:
    """Return the pixels of a member, (H, W); compare its size first, so that it cannot ask for any amount of memory."""
    if suffix not in members:
        return None
    with Image.open(io.BytesIO(members[suffix]), formats=("PNG",)) as image:
        if image.size != size or len(image.getbands()) != 1:
            raise ValueError(f"{suffix}: {image.width} x {image.height} pixels in {image.mode}, the image has {size}")
        return np.asarray(image)
