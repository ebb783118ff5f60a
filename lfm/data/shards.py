"""Shards: plain USTAR tars that `tar` and vanilla webdataset read, and equal bytes for equal input.

A raw shard holds `{key}.webp` (lossless), `.png` or `.jpg`, `{key}.cls`, `{key}.json` and what else the sample has. A latent
shard's members all have the same size in the same order, so that the distance from one sample to the next is constant:
a shard is then one strided array, and a batch is gathered without an index and without decoding.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from lfm.data.manifest import Member
from lfm.data.transforms import Rejected, decode
from lfm.errors import DataError
from lfm.prefetch import map_ahead
from lfm.types import LatentSample, RawSample

BLOCK = 512  # of a tar: a header, and what every member's data is padded to
CLASS_DIGITS = 8
FORMATS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "method": 0},
    "png": {"format": "PNG", "compress_level": 1},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},  # 4:4:4
}


def key_of(shard: int, row: int) -> str:
    """A sample key: digits only, since webdataset splits a member's name at its first dot."""
    return f"{shard:06d}{row:06d}"


def encode_class(class_index: int) -> bytes:
    """A class index as fixed-width ASCII digits: an int to webdataset, a strided array of labels to us."""
    return f"{class_index:0{CLASS_DIGITS}d}".encode()


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples, each `__key__` and bytes by suffix, as a plain tar that depends on nothing but them.

    The bytes are those of `webdataset.TarWriter(file, encoder=False, mtime=0)`, which is not called because its package
    imports torch: more than a second for each worker that only packs pictures.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix in sorted(sample.keys() - {"__key__"}):
                member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                member.size, member.mode, member.uname, member.gname = len(sample[suffix]), 0o444, *2 * ("bigdata",)
                tar.addfile(member, io.BytesIO(sample[suffix]))


# --- raw shards --------------------------------------------------------------------------------------------------


def raw_members(sample: RawSample, image_format: str) -> dict[str, Any]:
    """A raw sample as the members of a tar."""
    members: dict[str, Any] = {"__key__": sample.key, image_format: _encoded(sample.image, image_format)}
    if sample.class_index is not None:
        members["cls"] = encode_class(sample.class_index)
    if sample.mask is not None:
        members["mask.png"] = _encoded(sample.mask * 255, "png")
    if sample.segmentation is not None:
        members["seg.png"] = _encoded(sample.segmentation, "png")
    members["json"] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
    return members


def _encoded(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **FORMATS[image_format])
    return buffer.getvalue()


def read_raw(stream: IO[bytes], name: str, *, threads: int = 1) -> Iterator[RawSample]:
    """The samples of a raw shard, in order, from an open tar whose content has been verified; decoded by `threads`.

    Raises:
        DataError: a member is missing or cannot be read.
    """
    return map_ahead(lambda members: _decoded(members, name), _groups(stream, name), threads)


def _decoded(members: dict[str, Any], name: str) -> RawSample:
    image = next((members[suffix] for suffix in FORMATS if suffix in members), None)
    if image is None:
        raise DataError(f"{name}: sample {members['__key__']} has no picture; make the shard again")
    try:
        return RawSample(
            key=members["__key__"],
            image=np.asarray(decode(image)),
            class_index=int(members["cls"]) if "cls" in members else None,
            mask=_grey(members, "mask.png", lambda levels: (levels > 127).astype(np.uint8)),
            segmentation=_grey(members, "seg.png", lambda levels: levels),
            metadata=json.loads(members.get("json", b"{}")),
        )
    except (Rejected, ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{name}: sample {members['__key__']}: {error}; make the shard again") from error


def _groups(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander  # here, since it imports torch

    try:
        yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{name}: cannot be read as a tar ({error.args[0]}); make the shard again") from error


def _grey(members: dict[str, Any], suffix: str, change: Any) -> np.ndarray | None:
    return change(np.asarray(Image.open(io.BytesIO(members[suffix])))) if suffix in members else None


# --- latent shards -----------------------------------------------------------------------------------------------


# The members of a latent sample in the tar's order, which is that of their names, and the fields that they hold.
LATENT_MEMBERS = {
    "cls": "class_index",
    "latent.npy": "posterior",
    "latent_flip.npy": "posterior_flip",
    "mask.npy": "mask",
    "masked.npy": "masked",
    "masked_flip.npy": "masked_flip",
    "seg.npy": "segmentation",
}


def latent_layout(sample: LatentSample) -> tuple[tuple[Member, ...], int]:
    """The members of every latent sample that has the fields and shapes of this one, and the stride in bytes."""
    members, position = [], 0
    for suffix, field in LATENT_MEMBERS.items():
        value = getattr(sample, field)
        if value is not None:
            header = BLOCK if suffix.endswith(".npy") else 0  # the npy header is padded to a block of its own
            array = np.asarray(value) if header else np.asarray(encode_class(value))
            dtype, shape = array.dtype.str, array.shape
            members.append(Member(suffix=suffix, dtype=dtype, shape=shape, offset=position + BLOCK + header))
            position += BLOCK + math.ceil((header + array.nbytes) / BLOCK) * BLOCK
    return tuple(members), position


def latent_members(sample: LatentSample) -> dict[str, Any]:
    """A latent sample as the members of a tar."""
    values = {suffix: getattr(sample, field) for suffix, field in LATENT_MEMBERS.items()}
    encoded = {
        suffix: _npy(value) if suffix.endswith(".npy") else encode_class(value)
        for suffix, value in values.items()
        if value is not None
    }
    return {"__key__": sample.key} | encoded


def _npy(array: np.ndarray) -> bytes:
    """The .npy file of an array whose header fills a tar block, so that the data is aligned."""
    prefix = b"\x93NUMPY\x01\x00" + (BLOCK - 10).to_bytes(2, "little")
    header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    return prefix + header.encode().ljust(BLOCK - 11) + b"\n" + array.tobytes()


class LatentShard:
    """A latent shard on the local disk, mapped: each member is an array over all its samples.

    Raises:
        DataError: the file is not as long as its samples need.
    """

    def __init__(self, path: Path, samples: int, members: Sequence[Member], stride: int) -> None:
        self.path, self.samples = path, samples
        mapped = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        if len(mapped) < samples * stride:
            raise DataError(f"{path}: truncated: {len(mapped)} bytes, {samples} samples need {samples * stride}")
        self.columns = {
            member.suffix: np.zeros((0, *member.shape), member.dtype)
            if not samples
            else np.ndarray(
                (samples, *member.shape),
                np.dtype(member.dtype),
                buffer=mapped,
                offset=member.offset,
                strides=(stride, *np.ndarray(member.shape, member.dtype).strides),
            )
            for member in members
        }
