"""Import of published checkpoints, and export of weights for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lfm import autoencoder as autoencoders
from lfm import storage, weights_file
from lfm.conversion import published_checkpoints
from lfm.conversion.to_diffusers import build_pipeline
from lfm.data.manifest import ClassRecord
from lfm.errors import CheckpointError, ConfigError, LfmError, on_one_line
from lfm.models import registry
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.exchange.exchange_options import ExportConfig, ImportConfig


def import_checkpoint(config: ImportConfig) -> str:
    """Write the weights of a published checkpoint to a run folder; return a description of the result.

    Raises:
        CheckpointError, ConfigError: it is not a checkpoint of `source`, or `dest` exists; nothing is written.
    """
    path = storage.join(config.dest, weights_file.WEIGHTS)
    if storage.exists(path):
        raise ConfigError(f"{path}: exists already; choose another folder")
    if config.source == "lfm" and config.path.endswith(".safetensors"):  # as `export_weights` writes it
        weights, header = weights_file.load_weights(config.path)
    else:
        weights, header = _convert(config)
    if not config.dry_run:
        weights_file.save_weights(path, weights, header)
    count = sum(tensor.numel() for tensor in weights.values())
    return f"{count:,} parameters of {config.path} -> {path}{_note(header)}"


def _note(header: WeightsHeader) -> str:
    """Return what differs from a model trained by lfm, for the end of a line."""
    if header.prediction == "noise":
        return "; its noise prediction is converted to a velocity while sampling"
    if header.missing_pixels == "black":
        return (
            "; as in the paper's code, missing pixels are black in its condition, and its mask is -1 or 1 at the nearest pixel "
            "of each latent element"
        )
    if header.model.condition_channels not in (0, header.model.latent_channels + 1):
        return (
            "; its condition is a rescaled segmentation, which `lfm sample` cannot compute: import it with `rescaler`"
        )
    return ""


def _convert(config: ImportConfig) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Return the converted weights of a checkpoint, and a header for them."""
    codec = factory.autoencoder(config.autoencoder, World())
    state = published_checkpoints.read_state_dict(config.path)
    if config.rescaler:
        state |= published_checkpoints.read_state_dict(config.rescaler)
    try:
        weights, model = published_checkpoints.from_state_dict(
            state,
            config.source,
            num_heads=config.num_heads,
            num_classes=config.num_classes,
            latent_size=None if config.image_size is None else codec.latent_size(config.image_size),
            downsample_factor=codec.downsample_factor,
        )
        registry.build_network(model).load_state_dict(weights)
    except ConfigError as error:
        raise ConfigError(str(error).replace("set `latent_size`", "set `image_size`")) from error
    except CheckpointError as error:
        message = str(error) if str(error).startswith(config.path) else f"{config.path}: {error}; check `source`"
        raise CheckpointError(message) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{config.path}: is not a checkpoint of `source` {config.source}: {on_one_line(error)}"
        ) from error
    if codec.latent_channels != model.latent_channels:
        raise ConfigError(
            f"`autoencoder` {config.autoencoder}: has {codec.latent_channels} channels, the model {model.latent_channels}"
        )
    header = WeightsHeader(
        model=model,
        autoencoder=factory.autoencoder_record(codec),
        image_size=model.latent_size * codec.downsample_factor,
        classes=tuple(ClassRecord(index=i, name=str(i), count=0) for i in range(model.num_classes or 0)),
        samples_seen=0,
        manifest_digest=f"imported from {config.path}",
        code_version=code_version(),
        labels={index: str(index) for index in range(model.num_labels or 0)},
        prediction=published_checkpoints.SOURCES[config.source].prediction,
        missing_pixels="black" if model.condition_channels == model.latent_channels + 1 else "grey",
    )
    return weights, header


def export_weights(config: ExportConfig) -> str:
    """Write the EMA weights of a run in the format `to`; return a description of the result.

    Raises:
        ConfigError: the format cannot express the model, or `dest` exists; nothing is written.
    """
    if storage.exists(config.dest):
        raise ConfigError(f"{config.dest}: exists already; choose another name")
    merges = config.merge or config.to == "diffusers"
    weights, header = (weights_file.load_weights if merges else weights_file.load_file)(config.run)
    if config.to == "diffusers":
        return _export_pipeline(config, weights, header)
    if not config.dest.endswith(".safetensors"):
        raise ConfigError(f"{config.dest}: must end with .safetensors")
    if not config.dry_run:
        weights_file.save_weights(config.dest, weights, header)
    rest = f"; a part of {header.base.name}, which it needs" if header.base else ""
    return f"{config.dest}: EMA weights, with the configuration in the header{rest}"


def _export_pipeline(config: ExportConfig, weights: dict[str, Tensor], header: WeightsHeader) -> str:
    """Write a folder that diffusers loads; return a description of it."""
    codec = autoencoders.load_recorded(header.autoencoder, config.autoencoder, "cpu", config.run)
    pipeline = build_pipeline(weights, header, codec)
    folder = Path(config.dest)
    if not config.dry_run:
        save_pipeline(pipeline, header, folder)
    steps = "those of the solver euler"
    if header.prediction == "noise":
        steps = "DDIM's, exact for 50, 25, 10 or 5 of them"
    return f"{folder}: DiffusionPipeline.from_pretrained loads it; its steps are {steps}"


def save_pipeline(pipeline: Any, header: WeightsHeader, folder: Path) -> None:
    """Write a pipeline of diffusers with the names of the classes.

    Raises:
        LfmError: the folder cannot be written.
    """
    try:
        pipeline.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {entry.index: entry.name for entry in header.classes}
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    except OSError as error:
        raise LfmError(f"{folder}: cannot be written: {error}") from error
