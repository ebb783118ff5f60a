"""Latent shards: tars whose members have one size and order, so that a shard is a strided array over all its samples.

The distance from one sample to the next is constant, so a batch is gathered without an index and without decoding. A shard
that another program packed, with members of other sizes or in another order, is read through an index of its members.
"""

from __future__ import annotations

import ctypes
import logging
import math
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from lfm.data.manifest import Member
from lfm.data.tar import BLOCK, encode_class
from lfm.errors import DataError, on_one_line
from lfm.types import LatentSample

# The members of a latent sample in the tar's order, which is that of their names, and the fields of LatentSample.
LATENT_MEMBERS = {
    "cls": "class_index",
    "latent.npy": "posterior",
    "latent_flip.npy": "posterior_flip",
    "mask.npy": "mask",
    "masked.npy": "masked",
    "masked_flip.npy": "masked_flip",
    "seg.npy": "segmentation",
}
_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22  # since Linux 5.14; an older one refuses, and reading is slower


def latent_layout(sample: LatentSample) -> tuple[tuple[Member, ...], int]:
    """Return the members and the stride in bytes of latent samples with the fields and shapes of this one."""
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
    """Return a latent sample as the members of a tar, for `write_tar`."""
    members: dict[str, Any] = {"__key__": sample.key}
    for suffix, field in LATENT_MEMBERS.items():
        value = getattr(sample, field)
        if value is not None:
            members[suffix] = _npy(value) if suffix.endswith(".npy") else encode_class(value)
    return members


def _npy(array: np.ndarray) -> bytes:
    """Return the .npy file of an array with a header that fills a tar block, so that the data is aligned."""
    prefix = b"\x93NUMPY\x01\x00" + (BLOCK - 10).to_bytes(2, "little")
    header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    return prefix + header.encode().ljust(BLOCK - 11) + b"\n" + array.tobytes()


class ScatteredColumn:
    """A member of a shard without a constant stride: indexed by rows like an array, each row copied from its offset."""

    def __init__(self, mapped: np.ndarray, offsets: np.ndarray, member: Member) -> None:
        self.mapped, self.offsets, self.member = mapped, offsets, member

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        shape, dtype = self.member.shape, np.dtype(self.member.dtype)
        return np.stack([np.ndarray(shape, dtype, self.mapped, offset) for offset in self.offsets[rows].tolist()])


class LatentShard:
    """A latent shard on the local disk, mapped into memory.

    Args:
        file: path or open file; it may be closed afterwards.
        samples, members, stride: as the manifest lists them, or the number of samples that the file holds.
        name: the path or URL in error messages.

    Attributes:
        columns: for each member's suffix, an array over all samples of the file.

    Raises:
        DataError: the file does not hold these members.
    """

    def __init__(
        self, file: Path | IO[bytes], samples: int, members: Sequence[Member], stride: int, name: str | None = None
    ) -> None:
        path = file if isinstance(file, Path) else Path(file.name)
        self.name, self.samples = name or str(path), samples
        # Copy on write, since torch refuses read-only memory; nothing writes to it.
        mapped = np.memmap(file, np.uint8, mode="c") if path.stat().st_size else np.zeros(0, np.uint8)
        if len(mapped) < samples * stride:
            raise DataError(f"{self.name}: truncated: {len(mapped)} bytes, {samples} samples need {samples * stride}")
        # Read all pages at once, without Python's lock (ctypes releases it): page faults would wait for the disk with it.
        _LIBC.madvise(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.nbytes), _MADV_POPULATE_READ)
        self.columns: dict[str, np.ndarray | ScatteredColumn]
        if not samples:
            self.columns = {member.suffix: np.zeros((0, *member.shape), member.dtype) for member in members}
        elif has_stride(mapped, (0, samples - 1), members, stride):
            self.columns = {member.suffix: _strided(mapped, samples, member, stride) for member in members}
        else:
            index = _index(path, self.name, samples, tuple(members))
            self.columns = {
                member.suffix: ScatteredColumn(mapped, index[member.suffix], member)
                for member in members
                if member.suffix != "cls"
            }
            if "cls" in index:
                self.columns["cls"] = index["cls"].copy()

    @property
    def class_indices(self) -> np.ndarray | None:
        """int64 (samples,), or None if the samples have no class.

        Raises:
            DataError: a class is not a number.
        """
        if "cls" not in self.columns:
            return None
        try:
            return np.asarray(self.columns["cls"]).astype(np.int64)
        except ValueError as error:
            raise DataError(f"{self.name}: a class is no number ({on_one_line(error)}); make it again") from error


def _strided(mapped: np.ndarray, samples: int, member: Member, stride: int) -> np.ndarray:
    """Return a member over all samples as a view: (samples, *shape)."""
    dtype = np.dtype(member.dtype)
    strides = (stride, *np.ndarray(member.shape, dtype).strides)
    return np.ndarray((samples, *member.shape), dtype, buffer=mapped, offset=member.offset, strides=strides)


def has_stride(mapped: np.ndarray, rows: Iterable[int], members: Sequence[Member], stride: int) -> bool:
    """Return whether the tar headers of some samples of uint8 (bytes,) are where a constant stride puts them."""
    if stride <= 0:
        return False
    for row in rows:
        for member in members:
            header = row * stride + member.offset - BLOCK * (2 if member.suffix.endswith(".npy") else 1)
            name = mapped[header : header + 100].tobytes().rstrip(b"\0")
            if name.partition(b".")[2] != member.suffix.encode():
                return False
    return True


@lru_cache(maxsize=4096)
def _index(path: Path, name: str, samples: int, members: tuple[Member, ...]) -> dict[str, np.ndarray]:
    """Read a tar from end to end once; return each member's data offsets, int64 (samples,), and for `cls` the classes."""
    by_suffix = {member.suffix: member for member in members}
    rows: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for entry in archive:
                folder, _, base = entry.name.rpartition("/")
                key, _, suffix = base.partition(".")
                if suffix in by_suffix and entry.isfile():
                    file.seek(entry.offset_data)
                    value = int(file.read(entry.size)) if suffix == "cls" else _data_offset(file, by_suffix[suffix])
                    rows.setdefault(f"{folder}/{key}", {})[suffix] = value
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{name}: {entry.name if rows else 'cannot be read as a tar'}: {error}; make it again"
        ) from error
    if len(rows) != samples or any(len(row) != len(by_suffix) for row in rows.values()):
        raise DataError(f"{name}: does not hold {samples} samples of {', '.join(by_suffix)}; make it again")
    logging.getLogger(__name__).warning("%s: its members have no constant stride: reading it is slower", name)
    return {suffix: np.array([row[suffix] for row in rows.values()]) for suffix in by_suffix}


def _data_offset(file: IO[bytes], member: Member) -> int:
    """Return the position of the data of the .npy file that begins here; raise ValueError if it is not as listed."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if shape != member.shape or dtype != np.dtype(member.dtype) or fortran:
        raise ValueError(f"{dtype} {shape}, the manifest says {member.dtype} {member.shape}")
    return file.tell()
