"""What a training begins with: its newest checkpoint, if that is of the same experiment, or another run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lfm import weights_file
from lfm.data.manifest import Manifest
from lfm.errors import CheckpointError, ConfigError, DataError
from lfm.models import registry
from lfm.models.network import VelocityNetwork
from lfm.training.run_folder import RunState
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import config_schema as configs
from pipelines.common.config_schema import ExperimentConfig

# Keys whose change does not change what is learned, only how long or how visibly.
FREE_KEYS = {
    *("run", "data.shards", "data.cache", "data.cache_gigabytes", "data.skip_shards", "train.micro_batch"),
    *("model.attention", "model.activation_checkpointing", "model.compile"),
    *("train.num_steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.validate_every"),
    "train.ema_snapshots",
}
FREE_PARTS = {"attention", "activation_checkpointing", "token_dropout"}  # of a network, whose function stays the same
# How the work is shared out, and what is looked at meanwhile: no number of the optimization.
FREE_SECTIONS = ("deepspeed", "evaluation")


def initial_weights(source: str, model: VelocityNetwork, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The EMA of another run, for this model.

    Raises:
        CheckpointError: it is of another model, or of latents of another autoencoder.
    """
    weights, header = weights_file.load_weights(source)
    check_same_network(f"--initialize-from {source}", header, model)
    if manifest.autoencoder is None or header.autoencoder.content_hash != manifest.autoencoder.content_hash:
        raise CheckpointError(
            f"--initialize-from {source}: was trained on latents of {header.autoencoder.name}, another autoencoder; "
            "encode with that one"
        )
    return weights


def check_same_network(user: str, header: WeightsHeader, model: VelocityNetwork) -> None:
    """Refuse weights of another function than `model`, be it of the same shapes.

    Raises:
        CheckpointError: names `user` and the first difference.
    """
    theirs, ours = (
        registry.config_to_json(config) | {"prediction": prediction, "condition_dropout": config.condition_dropout > 0}
        for config, prediction in ((header.model, header.prediction), (model.config, "velocity"))
    )
    for name in theirs:
        if theirs[name] != ours[name] and name not in FREE_PARTS:
            raise CheckpointError(
                f"{user}: its {name} is {theirs[name]} and here it is {ours[name]}; set model and condition as they were "
                "for it"
            )


def check_continues(
    config: ExperimentConfig,
    manifest: Manifest,
    model: VelocityNetwork,
    state: RunState,
    newest: Path,
    allow_changes: bool,
) -> None:
    """Refuse to go on with other data or another configuration than the checkpoint's."""
    if state.manifest_digest != manifest.digest:
        raise DataError(
            f"{config.data.shards}: other latents than {newest} was trained on; name those, or another folder with run"
        )
    if rest := state.samples_seen % config.train.global_batch:
        raise ConfigError(
            f"train.global_batch {config.train.global_batch}: {newest} has seen {state.samples_seen:,} samples, {rest} more "
            "than whole batches of that; name another folder with run and begin there with --initialize-from"
        )
    if state.samples_seen > config.train.num_steps * config.train.global_batch:
        raise ConfigError(
            f"train.num_steps {config.train.num_steps}: {newest} has gone {state.samples_seen // config.train.global_batch:,} "
            "steps already; raise it"
        )
    trained = configs.validate(state.config, str(newest))  # keys that are newer than the checkpoint get their defaults
    changes = [
        f"{key} ({before}, now {after})"
        for key, before, after in configs.differences(trained.model_dump(mode="json"), config.model_dump(mode="json"))
        if key not in FREE_KEYS and key.split(".")[0] not in FREE_SECTIONS
    ]
    if config.train.schedule == "cosine" and state.config["train"]["num_steps"] != config.train.num_steps:
        changes.append("train.num_steps (the cosine schedule depends on it)")
    if any(change.startswith(("model.", "condition")) for change in changes) and allow_changes:
        check_same_network(str(newest), weights_file.load_weights(str(newest))[1], model)
    if changes and not allow_changes:
        raise ConfigError(f"{newest}: was made with another configuration: {', '.join(changes)}; name another folder "
                          "with run, or go on all the same with --allow-changes")  # fmt: skip


def describe(
    config: ExperimentConfig,
    manifest: Manifest,
    model: VelocityNetwork,
    world: World,
    settings: dict[str, Any],
    origin: str | None,
) -> str:
    """What the training will do, in a line."""
    batch = config.train.global_batch
    stage, skipped = settings["zero_optimization"]["stage"], config.data.skip_shards
    return (
        f"{model.num_parameters:,} parameters, {manifest.num_samples:,} samples in {config.data.shards}; "
        f"{f'{len(skipped)} shards left out; ' if skipped else ''}"
        f"{config.train.num_steps:,} steps of {batch} ({config.train.num_steps * batch / manifest.num_samples:.1f} epochs) "
        f"on {world.size} {'rank' if world.size == 1 else 'ranks'}, ZeRO {stage}, {config.train.precision}, "
        f"from {origin or 'the start'} -> {config.run}"
    )
