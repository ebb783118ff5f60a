"""What a run leaves behind: checkpoints, from which training goes on, and weights, from which pictures are made.

    RUN/checkpoints/samples-000000064000/   complete if it has this name: it is written under another and renamed
        state.json                          samples seen, configuration, code version, manifest digest
        weights.safetensors                 the EMA in float32
        ...                                 DeepSpeed's own files, one set per rank
    RUN/weights.safetensors                 the newest checkpoint's, all that sampling needs

A weights file carries in its header everything that sampling must know and check.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfm import storage
from lfm.data.manifest import AutoencoderRecord, ClassRecord
from lfm.errors import CheckpointError, LfmError
from lfm.models.dit import DiTConfig

WEIGHTS = "weights.safetensors"
STATE = "state.json"
_FOLDER = "checkpoints"
_PREFIX = "samples-"
_HEADER = "lfm"


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says of itself."""

    model: DiTConfig
    autoencoder: AutoencoderRecord
    image_size: int
    classes: tuple[ClassRecord, ...]
    samples_seen: int
    manifest_digest: str
    code_version: str
    config: dict[str, Any] = field(default_factory=dict)  # the resolved experiment

    def to_json(self) -> str:
        """As one line of JSON."""
        content = asdict(self) | {
            "autoencoder": self.autoencoder.model_dump(),
            "classes": [entry.model_dump() for entry in self.classes],
        }
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> WeightsHeader:
        """The inverse of `to_json`."""
        content = json.loads(text)
        return WeightsHeader(
            **content
            | {
                "model": DiTConfig(**content["model"]),
                "autoencoder": AutoencoderRecord(**content["autoencoder"]),
                "classes": tuple(ClassRecord(**entry) for entry in content["classes"]),
            }
        )


def save_weights(path: str, tensors: dict[str, Tensor], header: WeightsHeader) -> None:
    """Publish a weights file in one step."""
    with storage.writing(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {_HEADER: header.to_json()}
        )
        temporary.chmod(0o644)  # safetensors writes for the owner alone


def load_weights(run: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    """The EMA weights of a run folder, a checkpoint folder or a weights file, by path or URL.

    Raises:
        CheckpointError: there are none, or the file is not one of ours.
    """
    path = run if run.endswith(".safetensors") else storage.join(run, WEIGHTS)
    if not storage.exists(path):
        raise CheckpointError(f"{run}: no {WEIGHTS} there; train first, or name the run's folder")
    if storage.is_local(path):
        return _read_weights(path, path)
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(storage.read_bytes(path))
        copy.flush()
        return _read_weights(copy.name, path)


def _read_weights(local: str, path: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    try:
        with safe_open(local, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise CheckpointError(f"{path}: has no header of lfm; it was not written by `launch/train.py`")
            return {name: file.get_tensor(name) for name in file.keys()}, WeightsHeader.from_json(header)  # noqa: SIM118
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, LfmError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({reason}); is it truncated, or of another version?") from error


class RunFolder:
    """The checkpoints of one run on the local disk."""

    def __init__(self, path: str) -> None:
        if not storage.is_local(path):
            raise CheckpointError(f"{path}: a run is written to a local folder; copy it to object storage afterwards")
        self.path = Path(path)
        self.checkpoints = self.path / _FOLDER

    def tag(self, samples_seen: int) -> str:
        """The name of the checkpoint at this point."""
        return f"{_PREFIX}{samples_seen:012d}"

    def temporary_tag(self, samples_seen: int) -> str:
        """The name it has while it is written."""
        return storage.TEMPORARY_PREFIX + self.tag(samples_seen)

    def complete(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        return sorted(path for path in self.checkpoints.glob(f"{_PREFIX}*") if (path / STATE).is_file())

    def newest(self) -> Path | None:
        """The checkpoint to go on from."""
        return next(reversed(self.complete()), None)

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.checkpoints.glob(f"{storage.TEMPORARY_PREFIX}*"):
            shutil.rmtree(path)
        storage.sweep(str(self.path))

    def publish(self, samples_seen: int, state: dict[str, Any], keep: int) -> Path:
        """Make the checkpoint that was written under its temporary name visible, and drop the oldest beyond `keep`.

        Its weights become the run's.
        """
        temporary, final = (self.checkpoints / name(samples_seen) for name in (self.temporary_tag, self.tag))
        storage.write_json(str(temporary / STATE), state)
        for path in temporary.rglob("*"):
            _flush(path)
        with storage.writing(str(self.path / WEIGHTS)) as weights:  # first: never older than the newest checkpoint
            shutil.copyfile(temporary / WEIGHTS, weights)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(self.checkpoints)
        for path in self.complete()[:-keep]:
            shutil.rmtree(path)
        return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
