"""The first weights of a run, adapted from those of a source: which rows its classes begin at, and what is refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from lfm import weights_file
from lfm.data.manifest import Manifest
from lfm.errors import CheckpointError, ConfigError
from lfm.models import registry
from lfm.models.adaptation import NewClasses, Rows
from lfm.models.network import VelocityNetwork
from lfm.weights_file import SourceRecord, WeightsHeader
from pipelines.common import config_schema

LARGEST_CLASS_MAP = 8 << 20  # bytes


@dataclass(frozen=True)
class Initialization:
    """Options of a run that starts from the weights of a source."""

    source: str
    """Run folder, checkpoint or weights file, by path or URL."""
    class_map: str | None = None
    """File that names for own classes one or several classes of the source."""
    new_classes: NewClasses = "mean"
    """Row at which classes begin that the source has not."""
    other_latents: bool = False
    """Whether the source may be of latents of another autoencoder."""


@dataclass(frozen=True)
class InitialWeights:
    """The first weights of a run."""

    weights: dict[str, Tensor]
    record: SourceRecord
    prediction: str  # what the weights predict: velocity or noise
    table: str  # which rule each part was made by


def load_initial_weights(
    options: Initialization, model: VelocityNetwork, manifest: Manifest, time_shift: float = 1.0
) -> InitialWeights:
    """Load the EMA weights of a source, and adapt them to a network and to the classes of its latents.

    Raises:
        CheckpointError: there is no rule for a difference, or the source is of other latents; names the key on both sides.
        ConfigError: the class map cannot be used.
    """
    name = f"`initialize_from` {options.source}"
    weights, header = weights_file.load_weights(options.source)
    record = manifest.autoencoder
    if (record is None or header.autoencoder.content_hash != record.content_hash) and not options.other_latents:
        raise CheckpointError(
            f"{name}: was trained on latents of {header.autoencoder.name}, another autoencoder; encode with that one, or "
            "set `other_latents`"
        )
    if model.config.condition_channels and header.model.condition_channels and header.missing_pixels != "grey":
        raise CheckpointError(
            f"{name}: its missing_pixels is {header.missing_pixels}, and grey here; such a condition cannot be adapted"
        )
    try:
        adaptation = registry.adapt_weights(
            model,
            weights,
            header.model,
            class_rows=_class_rows(options, model, header, manifest),
            label_rows=_label_rows(model, header, manifest),
            new_classes=options.new_classes,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; set model and condition as they were for it") from error
    digest = weights_file.digest(weights)
    lines = [f"weights of {options.source}, sha256 {digest[:16]}:", adaptation.table()]
    if header.prediction == "noise":
        lines.append("  its prediction of noise is converted to a velocity, in training as in sampling")
    lines += _advice(model, header, time_shift)
    return InitialWeights(
        adaptation.result,
        SourceRecord(options.source, digest, header.samples_seen),
        header.prediction,
        "\n".join(lines),
    )


def _advice(model: VelocityNetwork, header: WeightsHeader, time_shift: float) -> list[str]:
    """Return which shift of the times fits latents of another size: noise hides less of larger images (Esser et al. 2024)."""
    ratio = model.config.latent_size / header.model.latent_size
    shift = ratio * header.config.get("flow", {}).get("time_shift", 1.0)
    if ratio == 1 or math.isclose(shift, time_shift):
        return []
    return [
        f"  latents of {model.config.latent_size} elements a side in place of {header.model.latent_size}: set "
        f"flow.time_shift={shift:g}, now {time_shift:g}, so that as much of an image is hidden at each time"
    ]


def _class_rows(options: Initialization, model: VelocityNetwork, header: WeightsHeader, manifest: Manifest) -> Rows:
    """Return for each class the source's classes at whose mean row it begins.

    By the class map, else by name. Where the source's classes are numbers, as those of an imported checkpoint are, and
    are as many, they are the same classes in the same order.
    """
    theirs = [entry.name for entry in header.classes]
    if model.config.num_classes is None or header.model.num_classes is None:
        if options.class_map:
            raise ConfigError(f"`class_map` {options.class_map}: source and model must both have classes; leave it out")
        return ()
    own = [entry.name for entry in manifest.classes]
    mapped = _read_class_map(options.class_map, own, theirs) if options.class_map else {}
    by_name = _by_name(theirs, own)
    return tuple(mapped.get(index, by_name[index]) for index in range(len(own)))


def _label_rows(model: VelocityNetwork, header: WeightsHeader, manifest: Manifest) -> Rows:
    if model.config.num_labels is None or header.model.num_labels is None:
        return ()
    theirs = [header.labels.get(index, str(index)) for index in range(header.model.num_labels)]
    return _by_name(theirs, [manifest.labels.get(index, str(index)) for index in range(model.config.num_labels)])


def _by_name(theirs: Sequence[str], own: Sequence[str]) -> Rows:
    are_numbers = list(theirs) == [str(index) for index in range(len(theirs))]
    if len(own) == len(theirs) and (are_numbers or list(own) == list(theirs)):
        return tuple((index,) for index in range(len(own)))
    names = {name: index for index, name in enumerate(theirs)}
    return tuple((names[name],) if name in names and not are_numbers else () for name in own)


def _read_class_map(path: str, own: Sequence[str], theirs: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Return by own class the classes of the source that a file names: JSON or YAML, a mapping; CSV, the own class first.

    Raises:
        ConfigError: names the class that is unknown.
    """
    text = config_schema.read_text(path, LARGEST_CLASS_MAP)
    if Path(path).suffix.lower() == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        content: Any = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    else:
        content = config_schema.parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ConfigError(f"`class_map` {path}: must be a mapping of own classes to classes of the source")
    result = {}
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        index = _index_of(key, own, path, "of the latents")
        result[index] = tuple(_index_of(each, theirs, path, "of the source") for each in values)
        if not values:
            raise ConfigError(f"`class_map` {path}: {key}: names no class of the source; leave it out, or name one")
    return result


def _index_of(value: Any, names: Sequence[str], path: str, whose: str) -> int:
    """Return the index of a class by its name, or else by its number."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if str(value).isdecimal() and int(str(value)) < len(names):
        return int(str(value))
    near = get_close_matches(str(value), names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {len(names)}, such as {', '.join(names[:3])}"
    raise ConfigError(f"`class_map` {path}: {value}: is no class {whose}; {hint}")
