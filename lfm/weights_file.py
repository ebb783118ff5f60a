"""Weights files: the EMA weights of a model in float32, with all that sampling needs to know in the file's header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from lfm import storage, tensor_file
from lfm.adapters import merge_adapters
from lfm.data.manifest import MANIFEST, AutoencoderRecord, ClassRecord, Pixels
from lfm.data.versions import Segment
from lfm.errors import CheckpointError, ConfigError, DataError, LfmError, on_one_line
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SourceRecord:
    """The weights from which a run started."""

    name: str
    """Path or URL."""
    digest: str
    """Of its tensors, see `digest`."""
    samples_seen: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """That the source had seen."""
    licence: Annotated[str, Field(min_length=1)] | None = None
    """Of the source, or of the source that it started from, as its own configuration states it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class WeightsHeader:
    """The description of a model in its weights file."""

    model: ModelConfig
    autoencoder: AutoencoderRecord
    image_size: Pixels
    classes: tuple[ClassRecord, ...]
    samples_seen: Annotated[int, Field(ge=0, lt=2**63)]
    manifest_digest: str
    code_version: str
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved experiment configuration; empty for imported checkpoints."""
    crop: str | None = None
    """The rule by which the training images were cropped and resized, or None if it was not recorded."""
    labels: dict[Annotated[int, Field(ge=0, lt=2**16)], str] = field(default_factory=dict)
    """Names of the class ids of segmentation maps."""
    prediction: Annotated[str, Field(pattern="^(velocity|noise)$")] = "velocity"
    """Output of the network: "velocity", or "noise" for an imported diffusion model."""
    missing_pixels: Annotated[str, Field(pattern="^(grey|black)$")] = "grey"
    """Condition of inpainting: "grey" in place of missing pixels and a mask of 0 and 1, or "black" and a mask of -1 and 1 at
    the first pixel of each latent element, in the paper's checkpoints."""
    initialized_from: SourceRecord | None = None
    """The weights from which the run started, or None."""
    base: SourceRecord | None = None
    """The weights that hold all tensors that this file does not, or None for a complete file."""
    data_history: tuple[Segment, ...] = ()
    """Which versions of its data the run read from which sample on; empty if that was not recorded."""

    @property
    def licence(self) -> str | None:
        """Licence that the configuration states, else that of the weights from which the run started."""
        own = self.config.get("licence")
        if isinstance(own, str):
            return own
        return self.initialized_from.licence if self.initialized_from else None

    def to_json(self) -> str:
        """Serialize to one line of JSON."""
        content = asdict(self) | {
            "model": registry.config_to_json(self.model),
            "autoencoder": self.autoencoder.model_dump(),
            "classes": [entry.model_dump() for entry in self.classes],
            "data_history": [segment.model_dump() for segment in self.data_history],
        }
        if not self.data_history:
            del content["data_history"]
        for name in ("initialized_from", "base"):
            if content[name] is None:
                del content[name]
            elif content[name]["licence"] is None:  # as it was before there was one
                del content[name]["licence"]
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> WeightsHeader:
        """Parse the output of `to_json`; raises ValueError, TypeError, KeyError or LfmError if it is malformed."""
        return WeightsHeader.from_content(json.loads(text))

    @staticmethod
    def from_content(content: dict[str, Any]) -> WeightsHeader:
        """Return the header of parsed JSON; raises like `from_json`."""
        try:
            header = WeightsHeader(
                **content
                | {
                    "model": registry.config_from_json(content["model"]),
                    "autoencoder": AutoencoderRecord(**content["autoencoder"]),
                    "classes": tuple(ClassRecord(**entry) for entry in content["classes"]),
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
        model, size = header.model, header.model.latent_size * header.autoencoder.downsample_factor
        if size != header.image_size or [entry.index for entry in header.classes] != list(range(len(header.classes))):
            raise ConfigError(f"image_size {header.image_size} or classes do not fit the model, of {size} pixels")
        if model.num_classes not in (None, len(header.classes)):
            raise ConfigError(f"{len(header.classes)} classes do not fit the model, of {model.num_classes}")
        return header


def digest(weights: dict[str, Tensor]) -> str:
    """Return the sha256 of names, types, shapes and values of tensors, whatever file they are in."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_weights(path: str, tensors: dict[str, Tensor], header: WeightsHeader) -> None:
    """Write a weights file atomically: `path` is either absent, the old file, or the complete new one."""
    tensor_file.save(path, tensors, json.loads(header.to_json()))


def load_weights(run: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Load the EMA weights and the header of a run folder, a checkpoint folder or a weights file, by path or URL.

    Those of a trained part are put together with their base.

    Raises:
        CheckpointError: there is no weights file, it cannot be read, it was damaged, or it was not written by lfm; or its
            base is not there, or another one.
    """
    tensors, header = load_with_base(run)
    return (tensors, header) if header.base is None else (merge_adapters(tensors), replace(header, base=None))


def load_with_base(run: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Load weights as `load_weights` does, but with adapters beside the weights that they change."""
    tensors, header = load_file(run)
    if header.base is None:
        return tensors, header
    try:
        base, _ = load_weights(header.base.name)
    except LfmError as error:
        raise CheckpointError(f"{run}: needs the weights {header.base.name}, of which it is a part: {error}") from error
    if digest(base) != header.base.digest:
        raise CheckpointError(
            f"{run}: is a part of {header.base.name}, which has changed: its sha256 is no longer {header.base.digest[:16]}; "
            "restore it"
        )
    own = _expected(header)
    return {name: value for name, value in base.items() if name in own} | tensors, header


def load_file(run: str) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Load the tensors of a file alone, without its base; see `load_weights`."""
    path = _weights_path(run)
    with _errors_of_weights(path):
        tensors, content = tensor_file.load(path)
        if content is not None:
            return tensors, WeightsHeader.from_content(content)
    raise CheckpointError(f"{path}: has no lfm header; it was not written by `launch/train.py`")


def load_header(run: str) -> WeightsHeader:
    """Load the header of a file without reading its tensors; see `load_weights`."""
    path = _weights_path(run)
    with _errors_of_weights(path):
        content = tensor_file.load_header(path)
        if content is not None:
            return WeightsHeader.from_content(content)
    raise CheckpointError(f"{path}: has no lfm header; it was not written by `launch/train.py`")


def _weights_path(run: str) -> str:
    """Return the path of the weights file of a run folder, a checkpoint folder or a weights file."""
    path = run if run.endswith(".safetensors") else storage.join(run, WEIGHTS)
    if not storage.exists(path):
        raise CheckpointError(f"{run}: {_why_no_weights(run)}")
    return path


def _why_no_weights(run: str) -> str:
    """Return what is at a path without weights, and the repair."""
    place = Path(run)
    if storage.is_local(run):
        if not place.exists():
            return "no such file or folder; name a run folder, or a weights file"
        if place.is_file():
            return "is no weights file; name a run folder, or a file whose name ends with .safetensors"
        if (place / MANIFEST).exists():
            return f"contains no {WEIGHTS}, but shards; name the run folder of a training on them"
        if (place / "checkpoints").is_dir():
            return (
                f"contains no {WEIGHTS} yet: training writes it with its first checkpoint; wait for that, or "
                "run the command of the training again"
            )
    return f"contains no {WEIGHTS}; train first, or name the run folder"


@contextmanager
def _errors_of_weights(path: str) -> Iterator[None]:
    """Turn errors of a file that cannot be read, or of its header, into CheckpointError."""
    try:
        yield
    except DataError as error:
        raise CheckpointError(f"{error}; is it truncated? Restore it, or choose another checkpoint") from error
    except (ValueError, TypeError, KeyError, AttributeError, LfmError) as error:
        raise CheckpointError(f"{path}: cannot be read ({on_one_line(error)}); is it of another version?") from error


def _expected(header: WeightsHeader) -> dict[str, Tensor]:
    """Return names and shapes of the weights of a network, without memory for them."""
    with torch.device("meta"):
        return registry.build_network(header.model).state_dict()


def build_network(weights: dict[str, Tensor], header: WeightsHeader, name: str) -> VelocityNetwork:
    """Build the network of a weights file, in training mode.

    The shapes are compared first, without memory for weights, so that a wrong header cannot ask for any amount of it.

    Args:
        name: the path or URL in error messages.

    Raises:
        CheckpointError: the weights do not fit their header.
    """
    try:
        expected = _expected(header)
        if {key: tensor.shape for key, tensor in weights.items()} != {
            key: value.shape for key, value in expected.items()
        }:
            raise ValueError("other names or shapes")
        network = registry.build_network(header.model)
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, MemoryError, LfmError) as error:
        raise CheckpointError(
            f"{name}: the weights do not fit their header ({on_one_line(error)}); choose another checkpoint"
        ) from error
    return network
