"""Weights files: the EMA weights of a model in float32, with all that sampling needs to know in the file's header."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfm import storage
from lfm.data.manifest import AutoencoderRecord, ClassRecord
from lfm.errors import CheckpointError, LfmError, on_one_line
from lfm.models import registry
from lfm.models.config import ModelConfig

WEIGHTS = "weights.safetensors"
_HEADER = "lfm"  # the key of the header in the metadata of the safetensors file
_PIECE_SIZE = 64 << 20  # bytes of one request to remote storage


@dataclass(frozen=True)
class WeightsHeader:
    """The description of a model in its weights file."""

    model: ModelConfig
    autoencoder: AutoencoderRecord
    image_size: int
    classes: tuple[ClassRecord, ...]
    samples_seen: int
    manifest_digest: str
    code_version: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved experiment configuration; empty for imported checkpoints."""
    crop: str | None = None
    """The rule by which the training images were cropped and resized, or None if it was not recorded."""
    labels: dict[int, str] = field(default_factory=dict)
    """Names of the class ids of segmentation maps."""
    prediction: str = "velocity"
    """Output of the network: "velocity", or "noise" for an imported diffusion model."""

    def to_json(self) -> str:
        """Serialize to one line of JSON."""
        content = asdict(self) | {
            "model": registry.config_to_json(self.model),
            "autoencoder": self.autoencoder.model_dump(),
            "classes": [entry.model_dump() for entry in self.classes],
        }
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> WeightsHeader:
        """Parse the output of `to_json`; raises ValueError, TypeError, KeyError or LfmError if it is malformed."""
        content = json.loads(text)
        return WeightsHeader(
            **content
            | {
                "model": registry.config_from_json(content["model"]),
                "autoencoder": AutoencoderRecord(**content["autoencoder"]),
                "classes": tuple(ClassRecord(**entry) for entry in content["classes"]),
                "labels": {int(index): name for index, name in content.get("labels", {}).items()},
            }
        )


def save_weights(path: str, tensors: dict[str, Tensor], header: WeightsHeader) -> None:
    """Write a weights file atomically: `path` is either absent, the old file, or the complete new one."""
    with storage.writing(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {_HEADER: header.to_json()})
        temporary.chmod(0o644)  # safetensors creates files that only their owner can read


def load_weights(run: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Load the EMA weights and the header of a run folder, a checkpoint folder or a weights file, by path or URL.

    Raises:
        CheckpointError: there is no weights file, it cannot be read, or it was not written by lfm.
    """
    path = run if run.endswith(".safetensors") else storage.join(run, WEIGHTS)
    if not storage.exists(path):
        raise CheckpointError(f"{run}: contains no {WEIGHTS}; train first, or name the run folder")
    with _local_copy(path) as local:
        try:
            with safe_open(local, "pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
                if header is None:
                    raise CheckpointError(f"{path}: has no lfm header; it was not written by `launch/train.py`")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, WeightsHeader.from_json(header)
        except CheckpointError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, LfmError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({on_one_line(error)}); is it truncated, or of another version?"
            ) from error


@contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """Provide `path` as a local file; a remote file is copied to a temporary one, piece by piece."""
    if storage.is_local(path):
        yield path
        return
    with tempfile.NamedTemporaryFile() as copy:
        size = -1
        while copy.tell() != size:  # a range past the end of the file is empty
            size = copy.tell()
            copy.write(storage.read_range(path, size, _PIECE_SIZE))
        copy.flush()
        yield copy.name
