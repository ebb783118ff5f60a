"""Writing and reading the samples of shards: plain USTAR tars that `tar` and webdataset read, equal bytes for equal input."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lfm.errors import DataError

BLOCK = 512  # bytes of a header; the data of every member is padded to a multiple
CLASS_DIGITS = 8
_OWNER = "bigdata"  # webdataset's user and group


def sample_key(shard: int, row: int) -> str:
    """Return the key of a sample: digits only, since webdataset splits a member's name at its first dot."""
    return f"{shard:06d}{row:06d}"


def encode_class(class_index: int) -> bytes:
    """Return a class index as fixed-width ASCII digits, which webdataset decodes as an int."""
    return f"{class_index:0{CLASS_DIGITS}d}".encode()


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples, each a dictionary of `__key__` and of bytes by suffix, as a plain tar.

    The bytes are those of `webdataset.TarWriter(file, encoder=False, mtime=0)`, which is not called because its package
    imports torch: more than a second for each worker process that only packs images.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix in sorted(sample.keys() - {"__key__"}):
                member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                member.size, member.mode = len(sample[suffix]), 0o444
                member.uname = member.gname = _OWNER
                tar.addfile(member, io.BytesIO(sample[suffix]))


def read_tar(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of an open tar, each a dictionary of `__key__` and of bytes by suffix.

    Raises:
        DataError: the stream is not a tar, or two members of a sample have one suffix.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # here, since it imports torch

    try:
        yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{name}: cannot be read as a tar ({error.args[0]}); make the shard again") from error
