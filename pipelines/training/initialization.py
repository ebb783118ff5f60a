"""The first weights of a run, adapted from those of a source: which rows its classes begin at, and what is refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from lfm import adapters, storage, weights_file
from lfm.data.manifest import Manifest
from lfm.errors import CheckpointError, ConfigError
from lfm.models import registry
from lfm.models.adaptation import NewClasses, Rows
from lfm.models.network import VelocityNetwork
from lfm.training.run_folder import RunState
from lfm.weights_file import SourceRecord, WeightsHeader
from pipelines.common.experiment import config_file
from pipelines.common.experiment.config_schema import ExperimentConfig

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
    changed: frozenset[str]  # names of the weights that are not those of the source


@dataclass(frozen=True)
class Origin:
    """Where the weights of a run come from, and which of them are trained."""

    weights: dict[str, Tensor] | None  # the first weights; None for those of a new network, or of a checkpoint
    prediction: str  # of the network: velocity or noise
    record: SourceRecord | None  # of the source of the first weights
    num_trained: int  # number of trained values
    base: SourceRecord | None = None  # of a run that trains a part: what holds the rest
    fixed: dict[str, Tensor] = field(default_factory=dict)  # frozen weights that the base has not got
    lines: tuple[str, ...] = ()  # of the plan


def prepare_weights(
    config: ExperimentConfig,
    model: VelocityNetwork,
    manifest: Manifest,
    checkpoint: tuple[Path, RunState] | None,
    initialization: Initialization | None,
) -> Origin:
    """Choose the first weights, and freeze those that are not trained; adds adapters to the network, in place.

    Raises:
        ConfigError: the parts to train cannot be used.
        CheckpointError: the source does not fit, or the base of a part is not there.
    """
    trains_all = config.train.trainable == ("all",)
    if not trains_all:
        _check_part(config, bool(checkpoint or initialization))
    if checkpoint:
        path, state = checkpoint
        record = SourceRecord(**state.initialized_from) if state.initialized_from else None
        if trains_all:
            return Origin(None, state.prediction, record, model.num_parameters)
        return _resume_part(config, model, path, Origin(None, state.prediction, record, 0))
    if initialization is None:
        return Origin(None, "velocity", None, model.num_parameters)
    initial = load_initial_weights(initialization, model, manifest, config.flow.time_shift)
    if trains_all:
        lines = (initial.table,)
        return Origin(initial.weights, initial.prediction, initial.record, model.num_parameters, lines=lines)
    model.load_state_dict(initial.weights)
    num_trained = _freeze(config, model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    source = initial.record.name
    return Origin(
        weights,
        initial.prediction,
        initial.record,
        num_trained,
        replace(initial.record, name=str(Path(source).absolute()) if storage.is_local(source) else source),
        {name: weights[name] for name in sorted(frozen & initial.changed)},
        (initial.table, _describe_part(config, model, num_trained)),
    )


def _check_part(config: ExperimentConfig, has_source: bool) -> None:
    train = config.train
    if "all" in train.trainable:
        raise ConfigError("train.trainable: all is every weight; leave out the other parts")
    if not has_source:
        raise ConfigError("train.trainable: a part is trained from the weights of a source; set `initialize_from`")
    if train.optimizer == "muon" or train.ema_sigma_rel:
        key = "optimizer muon" if train.optimizer == "muon" else "ema_sigma_rel"
        raise ConfigError(f"train.{key}: is for training all weights; leave it out, or set train.trainable to all")


def _resume_part(config: ExperimentConfig, model: VelocityNetwork, checkpoint: Path, origin: Origin) -> Origin:
    """Load the frozen weights of a run of a part, as its checkpoint and its base hold them."""
    tensors, header = weights_file.load_with_base(str(checkpoint))
    if header.base is None:
        raise ConfigError(
            f"train.trainable: {checkpoint} trained all weights; name another folder with run, and start it with "
            "`initialize_from`"
        )
    num_trained = _freeze(config, model)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise CheckpointError(f"{checkpoint}: was trained with other parts; set train.trainable as it was")
    model.load_state_dict(tensors)
    own, _ = weights_file.load_file(str(checkpoint))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    fixed = {name: value for name, value in own.items() if name not in trained}
    lines = (_describe_part(config, model, num_trained),)
    return replace(origin, num_trained=num_trained, base=header.base, fixed=fixed, lines=lines)


def _freeze(config: ExperimentConfig, model: VelocityNetwork) -> int:
    adapters.add_adapters(model, config.train.trainable, config.train.adapter_rank)
    return adapters.freeze_others(model, config.train.trainable)


def _describe_part(config: ExperimentConfig, model: VelocityNetwork, num_trained: int) -> str:
    share = num_trained / model.num_parameters
    return f"  trains {', '.join(config.train.trainable)}: {num_trained:,} parameters ({share:.2%}); the rest is frozen"


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
        SourceRecord(options.source, digest, header.samples_seen, header.licence),
        header.prediction,
        "\n".join(lines),
        frozenset(part.name for part in adaptation.parts if part.origin in ("adapted", "new")),
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
    text = config_file.read_text(path, LARGEST_CLASS_MAP)
    if Path(path).suffix.lower() == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        content: Any = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    else:
        content = config_file.parse_yaml(text, path)
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
