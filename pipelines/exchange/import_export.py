"""`lfm import` and `lfm export`: other people's checkpoints in, ours out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lfm import autoencoder as autoencoders
from lfm import storage, weights_file
from lfm.conversion import published_checkpoints
from lfm.data.manifest import ClassRecord
from lfm.errors import CheckpointError, ConfigError, LfmError, on_one_line
from lfm.models import registry
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.exchange.exchange_options import ExportConfig, ImportConfig

FORMATS = ("safetensors", "diffusers")
INNER = ("ema", "model", "state_dict")  # where training scripts keep the weights, the best first


def bring_in(config: ImportConfig) -> str:
    """Write a checkpoint's weights to a run folder; returns what it is.

    Raises:
        CheckpointError, ConfigError: it is none of `source`; nothing is written.
    """
    if config.source not in published_checkpoints.SOURCES:
        raise ConfigError(f"--from {config.source}: unknown; one of {', '.join(published_checkpoints.SOURCES)}")
    path = storage.join(config.dest, weights_file.WEIGHTS)
    if storage.exists(path):
        raise ConfigError(f"{path}: is there already; choose another folder")
    weights, header = _of_ours(config) or _converted(config)
    if not config.dry_run:
        weights_file.save_weights(path, weights, header)
    note = "; its prediction of noise is converted as it samples" if header.prediction == "noise" else ""
    return f"{registry.build_network(header.model).num_parameters:,} parameters of {config.path} -> {path}{note}"


def _of_ours(config: ImportConfig) -> tuple[dict[str, Tensor], WeightsHeader] | None:
    """Weights that are in our format already, as `lfm export --to safetensors` writes it."""
    if config.source != "lfm" or not config.path.endswith(".safetensors"):
        return None
    return weights_file.load_weights(config.path)


def _converted(config: ImportConfig) -> tuple[dict[str, Tensor], WeightsHeader]:
    try:
        weights, shape = published_checkpoints.from_state_dict(
            _state(config.path), config.source, num_heads=config.num_heads, num_classes=config.num_classes
        )
        registry.build_network(shape).load_state_dict(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{config.path}: {error}; name the checkpoint's own --from") from error
    except RuntimeError as error:
        what = on_one_line(error)
        raise CheckpointError(f"{config.path}: is no checkpoint of --from {config.source}: {what}") from error
    codec = factory.autoencoder(config.autoencoder, World())
    if codec.latent_channels != shape.latent_channels:
        raise ConfigError(
            f"--autoencoder {config.autoencoder}: has {codec.latent_channels} channels, the model {shape.latent_channels}"
        )
    classes = tuple(ClassRecord(index=index, name=str(index), count=0) for index in range(shape.num_classes or 0))
    header = WeightsHeader(
        model=shape,
        autoencoder=factory.autoencoder_record(codec),
        image_size=shape.latent_size * codec.downsample_factor,
        classes=classes,
        samples_seen=0,
        manifest_digest=f"imported from {config.path}",
        code_version=code_version(),
        prediction="noise" if config.source == "dit" else "velocity",
    )
    return weights, header


def _state(path: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the local disk."""
    try:
        content: Any = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and reading it would run its code; name the file of the weights alone"
        ) from error
    except Exception as error:  # torch's reader raises anything where the bytes are not its own
        raise CheckpointError(
            f"{path}: cannot be read ({on_one_line(error)}); is it a checkpoint, and whole?"
        ) from error
    inner = next(
        (content[key] for key in INNER if isinstance(content, dict) and isinstance(content.get(key), dict)), content
    )
    if not isinstance(inner, dict) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise CheckpointError(f"{path}: holds no weights by name")
    return inner


def send_out(config: ExportConfig) -> str:
    """Write a run's EMA weights for others; returns what was written.

    Raises:
        ConfigError: the format cannot express the model, or something is in the way; nothing is written.
    """
    if config.to not in FORMATS:
        raise ConfigError(f"--to {config.to}: unknown; one of {', '.join(FORMATS)}")
    if storage.exists(config.dest):
        raise ConfigError(f"{config.dest}: is there already; choose another name")
    weights, header = weights_file.load_weights(config.run)
    if config.to == "safetensors":
        if not config.dest.endswith(".safetensors"):
            raise ConfigError(f"{config.dest}: must end with .safetensors")
        if not config.dry_run:
            weights_file.save_weights(config.dest, weights, header)
        return f"{config.dest}: EMA weights, with their configuration in the header"
    return _to_diffusers(config, weights, header)


def _to_diffusers(config: ExportConfig, weights: dict[str, Tensor], header: WeightsHeader) -> str:
    diffusers = autoencoders.import_diffusers()
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        raise ConfigError("--to diffusers: needs a diffusers with FlowMapEulerDiscreteScheduler; upgrade it")
    model = published_checkpoints.expressible(header.model)
    if header.prediction != "velocity" or model.time_scale % 1:
        raise ConfigError("--to diffusers: the model predicts noise, or has a broken time_scale; use --to safetensors")
    codec = autoencoders.load_recorded(header.autoencoder, config.autoencoder, "cpu", config.run)
    if codec.shift or type(codec.model).__name__ != "AutoencoderKL":
        raise ConfigError(
            "--to diffusers: DiTPipeline decodes with an AutoencoderKL without shift_factor; use --to safetensors"
        )
    theirs, arguments = published_checkpoints.to_diffusers(weights, model)
    transformer = diffusers.DiTTransformer2DModel(**arguments)
    transformer.load_state_dict(theirs)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=int(model.time_scale))
    labels = {entry.index: entry.name for entry in header.classes}
    pipeline = diffusers.DiTPipeline(transformer.eval(), codec.model, scheduler)
    folder = Path(config.dest)
    said = f"{folder}: DiffusionPipeline.from_pretrained loads it; its steps are those of --solver euler"
    if config.dry_run:
        return said
    try:
        pipeline.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"id2label": labels}, indent=1))
    except OSError as error:
        raise LfmError(f"{folder}: cannot be written: {error}") from error
    return said
