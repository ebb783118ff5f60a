"""Safetensors files with a header as JSON, and a checksum of the header and all tensors in it.

Weights, references and features are stored this way, so that a damaged file is refused instead of giving other numbers.
Files without a checksum, as they were written before, are read too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfm import storage
from lfm.errors import DataError, on_one_line

_HEADER = "lfm"  # the only key of the metadata: safetensors writes several keys in a random order
_CHECKSUM = "crc32"  # key of the checksum in the header
_LENGTH_SIZE = 8  # bytes at the start of a safetensors file, the length of the JSON that follows
_MOST_METADATA = 100_000_000  # bytes of that JSON; safetensors refuses more, too


def save(path: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file atomically: `path` is either absent, the old file, or the complete new one."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored = storage.as_stored(dict(header))
    metadata = json.dumps(stored | {_CHECKSUM: _checksum(contiguous, stored)})
    with storage.writing(path) as temporary:
        save_file(contiguous, temporary, {_HEADER: metadata})
        temporary.chmod(0o644)  # safetensors creates files that only their owner can read


def load(path: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors and the header of a file; the header is None if there is none.

    Raises:
        DataError: the file is no safetensors file, or was changed after it was written.
        StorageError: it cannot be read.
    """
    try:
        with _local_copy(path) as local, safe_open(local, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = _parsed(metadata)
        if header is not None and _CHECKSUM in header and header.pop(_CHECKSUM) != _checksum(tensors, header):
            raise ValueError("damaged: its checksum is another one")
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({on_one_line(error)})") from error
    return tensors, header


def load_header(path: str) -> dict[str, Any] | None:
    """Return the header of a file without reading its tensors, so that damage in them stays unnoticed; None if there is none.

    Raises:
        DataError: the file is no safetensors file.
        StorageError: it cannot be read.
    """
    if storage.is_local(path):
        storage.require_regular(path)
    try:
        length = int.from_bytes(storage.read_range(path, 0, _LENGTH_SIZE), "little")
        if not 0 < length <= _MOST_METADATA:
            raise ValueError("it is no safetensors file")
        content = json.loads(storage.read_range(path, _LENGTH_SIZE, length))
        header = _parsed(content.get("__metadata__") or {})
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({on_one_line(error)})") from error
    if header is not None:
        header.pop(_CHECKSUM, None)
    return header


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the header in the metadata of a safetensors file; None if there is none. Raises ValueError."""
    if _HEADER not in metadata:
        return None
    header = json.loads(metadata[_HEADER])
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    json.dumps(header, ensure_ascii=False).encode()  # half of a character can be printed and written nowhere
    return header


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    value = storage.crc32(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        value = storage.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = storage.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


@contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """Provide `path` as a local file; a remote file is copied to a temporary one."""
    if storage.is_local(path):
        storage.require_regular(path)
        yield path
        return
    with tempfile.NamedTemporaryFile() as copy:
        storage.download(path, Path(copy.name))
        yield copy.name
