"""Build objects from configuration; the only module that does."""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm import autoencoder as autoencoders
from lfm import storage
from lfm.autoencoder import Autoencoder
from lfm.data import manifest as manifests
from lfm.data.columns.class_column import read_classes
from lfm.data.columns.selection import select
from lfm.data.manifest import AutoencoderRecord, Manifest
from lfm.data.stream.balanced_order import Balance
from lfm.data.stream.latent_stream import StreamOptions
from lfm.data.stream.mixture import LatentSource, Mixture, mix, single_source
from lfm.data.stream.mixture_order import Stage
from lfm.errors import ConfigError, DataError
from lfm.models.config import ModelConfig
from lfm.precision import precision_on
from lfm.storage.cache import DEFAULT_LIMIT, Cache
from lfm.training.loss_terms import LossTerm, TrainingLoss
from lfm.training.run_folder import RunFolder
from lfm.world import World
from pipelines.common.experiment.config_schema import ExperimentConfig


def device(world: World) -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.gpu_index(torch.cuda.device_count()))


@functools.cache  # all readers of a process share one cache, and its limit
def cache(folder: str | None, gigabytes: float | None = DEFAULT_LIMIT / 1e9) -> Cache:
    """Return the cache of remote shards in `folder`, of at most `gigabytes` of 10^9 bytes; None is no limit."""
    limit = math.inf if gigabytes is None else gigabytes * 1e9
    return Cache(Path(folder), limit) if folder else Cache(limit=limit)


def run_folder(config: ExperimentConfig) -> RunFolder:
    """Return the folder in which an experiment is trained: its run, or for a URL a folder of the cache."""
    if storage.is_local(config.run):
        return RunFolder(config.run)
    url = config.run.rstrip("/")
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    parent = cache(config.data.cache, config.data.cache_gigabytes).folder / "runs"
    return RunFolder(str(parent / name), key="data.cache")


def autoencoder(name: str, world: World, precision: str = "fp32") -> Autoencoder:
    """Return the named autoencoder on this process's device, in fp32, tf32 or bf16."""
    return autoencoders.load(name, device(world), precision)


def matching_autoencoder(record: AutoencoderRecord, name: str | None, world: World, user: str) -> Autoencoder:
    """Return the autoencoder of a record on this process's device; see `lfm.autoencoder.load_recorded`."""
    return autoencoders.load_recorded(record, name, device(world), user)


def autoencoder_record(autoencoder: Autoencoder) -> AutoencoderRecord:
    """Return the record of an autoencoder for manifests and weights."""
    return AutoencoderRecord(
        name=autoencoder.name,
        content_hash=autoencoder.content_hash,
        downsample_factor=autoencoder.downsample_factor,
        latent_channels=autoencoder.latent_channels,
        scale_factor=autoencoder.scale_factor,
        shift=autoencoder.shift,
    )


def load_mixture(config: ExperimentConfig) -> Mixture:
    """Return the training data of an experiment, held-back shards included.

    Raises:
        ConfigError: a class or a source is named wrongly, or the experiment cannot use a source.
        DataError: latents are missing, or do not fit each other.
    """
    data = config.data
    if data.shards is not None:
        mixture = single_source(data.shards, manifests.load(data.shards, "latents"), data.skip_shards)
        subset = _subset(mixture.sources[0], data.where, "data.where", config)
        return replace(mixture, sources=(_balanced(subset, data.balance, "data.balance", config),))
    sources = [
        _subset(
            LatentSource(each.shards, manifests.load(each.shards, "latents"), each.name, each.skip_shards, each.flips),
            each.where,
            f"data.sources {each.name}: where",
            config,
        )
        for each in data.sources
    ]
    mixture = mix(sources, config.conditions, [each.classes for each in data.sources])
    without_classes = next((source for source in sources if not source.manifest.classes), None)
    needs_classes = "class" in config.conditions and (config.condition != "class" or not config.condition_dropout)
    if needs_classes and mixture.manifest.classes and without_classes:
        raise ConfigError(
            f"data.sources {without_classes.name}: {without_classes.folder} has no classes, and can only serve the null "
            "condition of condition: class; set condition_dropout, or leave it out"
        )
    balanced = tuple(
        _balanced(source, each.balance, f"data.sources {each.name}: balance", config)
        for source, each in zip(mixture.sources, data.sources, strict=True)
    )
    mixture = replace(mixture, sources=balanced)
    return replace(mixture, stages=_stages(config, mixture.split(data.held_back)[0]))


def _subset(source: LatentSource, where: str | None, place: str, config: ExperimentConfig) -> LatentSource:
    """Return a source with the samples that the expression `where` holds for."""
    if where is None:
        return source
    of_columns = cache(config.data.cache, config.data.cache_gigabytes)
    return replace(source, where=where, selection=select(source.folder, source.manifest, where, of_columns, place))


def _balanced(source: LatentSource, power: float, place: str, config: ExperimentConfig) -> LatentSource:
    """Return a source with its classes balanced; those that are one class of the mixture count as one."""
    if not power:
        return source
    of_columns = cache(config.data.cache, config.data.cache_gigabytes)
    codes, counts = read_classes(source.folder, source.manifest, source.selection, of_columns, place)
    if source.class_map is not None:
        codes = np.array([source.class_map.index(index) for index in source.class_map], codes.dtype)[codes]
    return replace(source, balance=Balance(codes, counts, power))


def _stages(config: ExperimentConfig, training: Mixture) -> tuple[Stage, ...]:
    """Return the stages of the `data:` section, for the shards to train on."""
    current = {}
    for each, source in zip(config.data.sources, training.sources, strict=True):
        if not source.num_samples:
            raise DataError(
                f"data.sources {source.name}: {source.folder}: nothing is left to train on; leave fewer shards out"
            )
        in_one_pass = Fraction(str(each.repeat or 1)) * source.num_samples
        current[each.name] = Fraction(str(each.weight)) if each.weight else Fraction(each.num_samples or in_one_pass)
    stages = [Stage(0, tuple(current.values()))]
    for stage in config.data.stages:
        current |= {name: Fraction(str(weight)) for name, weight in stage.weights.items()}
        stages.append(Stage(stage.samples_seen, tuple(current.values())))
    return tuple(stages)


def model_config(config: ExperimentConfig, manifest: Manifest) -> ModelConfig:
    """Return the configuration of the experiment's network for the latents of `manifest`.

    Raises:
        ConfigError: the latents do not have what the condition needs, or options of the network do not fit them.
        DataError: the manifest names no autoencoder.
    """
    members = {member.suffix for member in manifest.members}
    for condition, is_available, repair in (
        ("class", manifest.classes, "classes; shard class folders"),
        (
            "inpaint",
            {"mask.npy", "masked.npy"} <= members,
            "masks; shard with `lfm shard --masks`, or a layout that has them",
        ),
        ("semantic", manifest.labels and "seg.npy" in members, "segmentations; shard a layout that has them"),
    ):
        if condition in config.conditions and not is_available:
            raise ConfigError(f"condition: {config.condition}: the latents have no {repair}, or set another condition")
    record = manifest.autoencoder
    if record is None:
        raise DataError("the latents' manifest names no autoencoder; encode them again")
    base = ModelConfig(
        latent_channels=record.latent_channels,
        latent_size=manifest.image_size // record.downsample_factor,
        num_classes=len(manifest.classes) if "class" in config.conditions else None,
        condition_dropout=config.condition_dropout,
        condition_channels=record.latent_channels + 1 if "inpaint" in config.conditions else 0,
        num_labels=manifest.num_labels if "semantic" in config.conditions else None,
        downsample_factor=record.downsample_factor,
    )
    return config.model.build_config(base)


def with_precision(config: ExperimentConfig, device: torch.device, recorded: str | None = None) -> ExperimentConfig:
    """Return the experiment with the precision that it is trained in on this device.

    If none is set, it is `recorded`, that of the checkpoint to resume from, else bf16 on a GPU and fp32 on a CPU.
    """
    precision = config.train.precision or recorded or ("bf16" if device.type == "cuda" else "fp32")
    train = config.train.model_copy(update={"precision": precision_on(device, precision)})
    return config.model_copy(update={"train": train})


def compiles_blocks(config: ExperimentConfig) -> bool:
    """Return whether to compile the network's blocks: as `model.compile` says, by default where it pays and is possible."""
    if config.model.compile is not None:
        return config.model.compile
    return can_compile_on_gpu()


def can_compile_on_gpu() -> bool:
    """Return whether there are a GPU and the C compiler that torch.compile needs on it."""
    return torch.cuda.is_available() and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def stream_options(config: ExperimentConfig, model: ModelConfig) -> StreamOptions:
    """Return all settings that decide the training stream."""
    return StreamOptions(
        seed=config.train.seed,
        window=config.data.window,
        global_batch=config.train.global_batch,
        conditions=frozenset(config.conditions),
        condition_dropout=config.condition_dropout,
        coupling_group=config.flow.coupling_group,
        num_noises=config.flow.num_noises,
        num_tokens=model.num_tokens,
        num_kept_tokens=model.num_kept_tokens,
    )


def training_loss(config: ExperimentConfig, model: ModelConfig) -> TrainingLoss:
    """Return the training loss, with the terms and weights of the `flow:` section.

    Raises:
        ConfigError: the network has no head or blocks that a term needs.
    """
    flow = config.flow
    if bool(flow.internal_weight) != model.has_internal_velocity:
        raise ConfigError(
            f"flow.internal_weight {flow.internal_weight:g}: trains the head that model.internal_head adds; set both, or "
            "neither"
        )
    if bool(flow.latent_weight) != model.has_latent_head:
        raise ConfigError(
            f"flow.latent_weight {flow.latent_weight:g}: trains the head that model.latent_head adds; set both, or neither"
        )
    if flow.layer_sync_weight:
        blocks = flow.layer_sync_blocks
        if blocks is None or not blocks[0] < blocks[1] < model.num_blocks_with_tokens:
            raise ConfigError(
                f"flow.layer_sync_blocks {blocks}: must be an early and a later block, of {model.num_blocks_with_tokens} "
                "counted from 0, as in [0, 2]"
            )
    terms = [
        LossTerm("velocity"),
        LossTerm("direction", flow.direction_weight),
        LossTerm("internal", flow.internal_weight, needs_internal=True),
        LossTerm("latent", flow.latent_weight, needs_latent=True),
        LossTerm("layer_sync", flow.layer_sync_weight, token_blocks=flow.layer_sync_blocks or ()),
    ]
    return TrainingLoss(terms, config.flow.sigma_min)


def micro_batch(config: ExperimentConfig, world: World) -> int:
    """Return the number of samples per forward pass of one rank.

    Raises:
        ConfigError: the global batch cannot be divided evenly.
    """
    train, group = config.train, config.flow.coupling_group
    per_rank, rest = divmod(train.global_batch, world.size)
    if rest:
        raise ConfigError(
            f"train.global_batch {train.global_batch}: not divisible by {world.size} ranks; change either"
        )
    size = train.micro_batch or per_rank
    if per_rank % size:
        raise ConfigError(
            f"train.micro_batch {size}: does not divide the {per_rank} samples of each of {world.size} ranks "
            f"(train.global_batch {train.global_batch}); change either"
        )
    if per_rank % group:
        raise ConfigError(
            f"flow.coupling_group {group}: does not divide the {per_rank} samples of each of {world.size} ranks "
            f"(train.global_batch {train.global_batch}); change either"
        )
    return size


def deepspeed_settings(config: ExperimentConfig, world: World) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the JSON file's content and the values that the YAML file owns.

    The precision must have been resolved by `with_precision`; if it is None, it is fp32.
    """
    train, micro = config.train, micro_batch(config, world)
    if not isinstance(config.deepspeed, dict):
        raise ConfigError("deepspeed: must have been read from its JSON file")
    return config.deepspeed | {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.global_batch // world.size // micro,
        "gradient_clipping": train.gradient_clipping,
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW needs no compilation on any device.
            "params": {
                "torch_adam": True,
                "fused": True,
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "weight_decay": train.weight_decay,
            },
        },
        # The step guard checks the norm of the whole gradient, in place of every tensor of it.
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
    }
