"""Shards: plain USTAR tars that `tar` and vanilla webdataset read, and equal bytes for equal input.

A raw shard holds `{key}.webp` (lossless), `.png` or `.jpg`, `{key}.cls`, `{key}.json` and what else the sample has. A latent
shard's members all have the same size in the same order, so that the distance from one sample to the next is constant:
a shard is then one strided array, and a batch is gathered without an index and without decoding.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
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
    imports torch: more than a second for each worker that only packs images.
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
        raise DataError(f"{name}: sample {members['__key__']} has no image; make the shard again")
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


_LIBC, _MADV_POPULATE_READ = ctypes.CDLL(None), 22  # a Linux before 5.14 declines, and it is slower


class LatentShard:
    """A latent shard on the local disk, mapped: each member is an array over all its samples.

    A shard that somebody else made, with members of other sizes or in another order, is read through an index of it.

    Args:
        file: path, or the open file; it may be closed afterwards.
        name: by which people know the file.

    Raises:
        DataError: the file does not hold what its samples need.
    """

    def __init__(
        self, file: Path | IO[bytes], samples: int, members: Sequence[Member], stride: int, name: str | None = None
    ) -> None:
        path = file if isinstance(file, Path) else Path(file.name)
        self.name, self.samples = name or str(path), samples
        # Copy on write, as torch takes no read-only memory; nobody writes.
        mapped = np.memmap(file, np.uint8, mode="c") if path.stat().st_size else np.zeros(0, np.uint8)
        if len(mapped) < samples * stride:
            raise DataError(f"{self.name}: truncated: {len(mapped)} bytes, {samples} samples need {samples * stride}")
        # All pages at once, and by ctypes, since whoever reads them one by one waits for the disk with Python's lock held.
        _LIBC.madvise(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.nbytes), _MADV_POPULATE_READ)
        self.columns: dict[str, np.ndarray | Scattered]
        if samples and not _has_stride(mapped, samples, members, stride):
            offsets = _index(path, self.name, samples, tuple(members))
            self.columns = {
                member.suffix: np.array(offsets[member.suffix])
                if member.suffix == "cls"
                else Scattered(mapped, offsets[member.suffix], member)
                for member in members
            }
            return
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

    @property
    def class_indices(self) -> np.ndarray | None:
        """int64 (samples,), or None where the samples have no class."""
        return np.asarray(self.columns["cls"]).astype(np.int64) if "cls" in self.columns else None


class Scattered:
    """A member of a shard without a stride: indexed by rows as an array would be, each copied from where it lies."""

    def __init__(self, mapped: np.ndarray, offsets: np.ndarray, member: Member) -> None:
        self.mapped, self.offsets, self.member = mapped, offsets, member

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        shape, dtype = self.member.shape, np.dtype(self.member.dtype)
        return np.stack([np.ndarray(shape, dtype, self.mapped, offset) for offset in self.offsets[rows].tolist()])


def _has_stride(mapped: np.ndarray, samples: int, members: Sequence[Member], stride: int) -> bool:
    """Whether the headers of the first and the last sample are where a constant stride has them."""
    for start in (0, (samples - 1) * stride) if stride else ():
        for member in members:
            at = start + member.offset - BLOCK * (2 if member.suffix.endswith(".npy") else 1)
            name = mapped[at : at + 100].tobytes().rstrip(b"\0")
            if name.partition(b".")[2] != member.suffix.encode():
                return False
    return stride > 0


@lru_cache(maxsize=4096)
def _index(path: Path, name: str, samples: int, members: tuple[Member, ...]) -> dict[str, np.ndarray]:
    """Where the data of each member of each sample begins, and the classes, of a tar that is read from end to end once."""
    wanted = {member.suffix: member for member in members}
    rows: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for entry in archive:
                folder, _, base = entry.name.rpartition("/")
                key, _, suffix = base.partition(".")
                if suffix in wanted and entry.isfile():
                    file.seek(entry.offset_data)
                    found = int(file.read(entry.size)) if suffix == "cls" else _data_offset(file, wanted[suffix])
                    rows.setdefault(f"{folder}/{key}", {})[suffix] = found
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{name}: {entry.name if rows else 'cannot be read as a tar'}: {error}; make it again"
        ) from error
    if len(rows) != samples or any(len(row) != len(wanted) for row in rows.values()):
        raise DataError(f"{name}: does not hold {samples} samples of {', '.join(wanted)}; make it again")
    logging.getLogger(__name__).warning("%s: its members have no constant stride: reading it is slower", name)
    return {suffix: np.array([row[suffix] for row in rows.values()]) for suffix in wanted}


def _data_offset(file: IO[bytes], member: Member) -> int:
    """Where the data of the .npy file begins that begins here; ValueError where it is not what the manifest says."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if shape != member.shape or dtype != np.dtype(member.dtype) or fortran:
        raise ValueError(f"{dtype} {shape}, the manifest says {member.dtype} {member.shape}")
    return file.tell()
