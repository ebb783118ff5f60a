"""Build objects from configuration; the only module that does."""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
from collections.abc import Sequence
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
from lfm.data.columns.selection import Selection, select
from lfm.data.dropped import load_drops
from lfm.data.manifest import AutoencoderRecord, Manifest
from lfm.data.stream.balanced_order import Balance
from lfm.data.stream.data_history import state_of, with_views
from lfm.data.stream.latent_stream import StreamOptions
from lfm.data.stream.mixture import LatentSource, Mixture, View, mix
from lfm.data.stream.mixture_order import Stage
from lfm.data.versions import Segment
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
    """Return the training data of an experiment as it is now, held-back shards included; see `mixture_of`."""
    return mixture_of(config, load_sources(config))


def load_sources(config: ExperimentConfig) -> tuple[LatentSource, ...]:
    """Return the newest versions of the data sets of an experiment, with all samples that `where` selects.

    Raises:
        ConfigError: `where` is wrong.
        DataError: latents are missing, or their list of dropped samples is damaged.
    """
    data = config.data
    if data.shards is not None:
        source = LatentSource(data.shards, manifests.load(data.shards, "latents"), data.shards, data.skip_shards)
        return (_subset(source, data.where, "data.where", config),)
    return tuple(
        _subset(
            LatentSource(each.shards, manifests.load(each.shards, "latents"), each.name, each.skip_shards, each.flips),
            each.where,
            f"data.sources {each.name}: where",
            config,
        )
        for each in data.sources
    )


def mixture_of(config: ExperimentConfig, newest: Sequence[LatentSource], history: tuple[Segment, ...] = ()) -> Mixture:
    """Return the training data of an experiment, held-back shards included.

    Args:
        newest: of `load_sources`.
        history: the versions of the data sets that are read; by default the newest ones, from the start.

    Raises:
        ConfigError: a class or a source is named wrongly, or the experiment cannot use a source.
        DataError: latents do not fit each other, or are not those of the history.
    """
    data, history = config.data, history or (Segment(first_sample=0, sources=tuple(map(state_of, newest))),)
    sources = [
        with_views(source, [segment.sources[number] for segment in history]) for number, source in enumerate(newest)
    ]
    if data.shards is not None:
        mixture = Mixture(tuple(sources), sources[0].manifest, history=history)
        return replace(mixture, sources=(_balanced(sources[0], newest[0], data.balance, "data.balance", config),))
    mixture = replace(mix(sources, config.conditions, [each.classes for each in data.sources]), history=history)
    without_classes = next((source for source in sources if not source.manifest.classes), None)
    needs_classes = "class" in config.conditions and (config.condition != "class" or not config.condition_dropout)
    if needs_classes and mixture.manifest.classes and without_classes:
        raise ConfigError(
            f"data.sources {without_classes.name}: {without_classes.folder} has no classes, and can only serve the null "
            "condition of condition: class; set condition_dropout, or leave it out"
        )
    balanced = tuple(
        _balanced(source, whole, each.balance, f"data.sources {each.name}: balance", config)
        for source, whole, each in zip(mixture.sources, newest, data.sources, strict=True)
    )
    mixture = replace(mixture, sources=balanced)
    return replace(mixture, stages=_stages(config, mixture.split(data.held_back)[0]))


def _subset(source: LatentSource, where: str | None, place: str, config: ExperimentConfig) -> LatentSource:
    """Return a source with the samples that the expression `where` holds for, and the list of dropped samples."""
    source = replace(source, drops=load_drops(source.folder))
    if where is None:
        return source
    of_columns = cache(config.data.cache, config.data.cache_gigabytes)
    return replace(source, where=where, chosen=select(source.folder, source.manifest, where, of_columns, place))


def _balanced(
    source: LatentSource, newest: LatentSource, power: float, place: str, config: ExperimentConfig
) -> LatentSource:
    """Return a source with its classes balanced, in all views; those that are one class of the mixture count as one.

    Args:
        newest: the same data set in its newest version, of which the index is.
    """
    if not power:
        return source
    of_columns = cache(config.data.cache, config.data.cache_gigabytes)

    def balance(view: View) -> Balance:
        selection, shards = view.selection, newest.manifest.shards
        if rest := len(shards) - view.num_shards:
            sizes = np.array([shard.samples for shard in shards[: view.num_shards]], np.int64)
            first = selection or Selection.of_all(sizes)
            selection = replace(first, counts=np.append(first.counts, np.zeros(rest, np.int64)))
        codes, counts = read_classes(source.folder, newest.manifest, selection, of_columns, place)
        if source.class_map is not None:
            codes = np.array([source.class_map.index(index) for index in source.class_map], codes.dtype)[codes]
        return Balance(codes, counts[: view.num_shards], power)

    return replace(
        source,
        balance=balance(View(len(source.manifest.shards), source.selection)),
        views=tuple(replace(view, balance=balance(view)) for view in source.views),
    )


def _stages(config: ExperimentConfig, training: Mixture) -> tuple[Stage, ...]:
    """Return the stages of the `data:` section, for the shards to train on.

    Weights that follow from numbers of samples change with the versions of the data; others are set with the stages.
    """
    for source in training.sources:
        if not source.num_samples:
            raise DataError(
                f"data.sources {source.name}: {source.folder}: nothing is left to train on; leave fewer shards out"
            )
    stages: list[Stage] = []
    current: dict[str, Fraction] = {}
    for number, segment in enumerate(training.history):
        for each, source in zip(config.data.sources, training.sources, strict=True):
            num_samples = sum(source.shard_sizes(source.views[number] if source.views else None))
            in_one_pass = Fraction(str(each.repeat or 1)) * num_samples
            current[each.name] = (
                Fraction(str(each.weight)) if each.weight else Fraction(each.num_samples or in_one_pass)
            )
        stage = Stage(segment.first_sample, tuple(current.values()))
        if not stages or stage.weights != stages[-1].weights:
            stages.append(stage)
    for later in config.data.stages:
        current |= {name: Fraction(str(weight)) for name, weight in later.weights.items()}
        stages.append(Stage(later.samples_seen, tuple(current.values())))
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
