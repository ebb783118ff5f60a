"""Checks before training resumes from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfm import weights_file
from lfm.errors import CheckpointError, ConfigError
from lfm.models import registry
from lfm.models.network import VelocityNetwork
from lfm.training.run_folder import RunState
from lfm.weights_file import WeightsHeader
from pipelines.common.experiment import config_schema
from pipelines.common.experiment.config_schema import ExperimentConfig

# Keys that may change when training resumes, besides the backbone's `execution_fields`: they determine how long
# training takes, and what is saved and logged, but not what is learned.
FREE_KEYS = {
    "run",
    "licence",
    "data.shards",
    "data.warn_passes",
    "data.allow_leaks",
    "data.new_samples",
    "data.cache",
    "data.cache_gigabytes",
    "data.skip_shards",
    "model.compile",
    "train.micro_batch",
    "train.num_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.validate_every",
    "train.ema_snapshots",
}
FREE_SECTIONS = {"deepspeed", "evaluation"}


def check_same_network(
    source: str, header: WeightsHeader, model: VelocityNetwork, prediction: str = "velocity"
) -> None:
    """Check that weights are of the same function as `model`; equal shapes are not enough.

    Raises:
        CheckpointError: names `source` and the first field that differs.
    """
    free = model.config.execution_fields | model.config.training_fields
    theirs, ours = _function_of(header.model, header.prediction), _function_of(model.config, prediction)
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in free and theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{source}: its {name} is {theirs.get(name)}, and {ours.get(name)} here; set model and condition as they "
                "were for it"
            )


def check_continues(
    config: ExperimentConfig,
    model: VelocityNetwork,
    checkpoint: Path,
    state: RunState,
    allow_changes: bool,
    *,
    has_same_selection: bool,
) -> None:
    """Check that the configuration is that of the checkpoint to resume from; for data see `choose_history`.

    Args:
        has_same_selection: whether `where` selects the samples that it selected then.

    Raises:
        ConfigError: the configuration has changed, or the checkpoint is beyond the last step.
        CheckpointError: with `allow_changes`, the network is another one.
    """
    train, resumed_from = config.train, str(checkpoint)
    if rest := state.samples_seen % train.global_batch:
        raise ConfigError(
            f"train.global_batch {train.global_batch}: {resumed_from} has seen {state.samples_seen:,} samples, {rest} more "
            "than a whole number of such batches; name another folder with run, and start it with `initialize_from`"
        )
    if state.samples_seen > train.num_steps * train.global_batch:
        raise ConfigError(
            f"train.num_steps {train.num_steps}: {resumed_from} is at step {state.samples_seen // train.global_batch:,} "
            "already; raise it"
        )
    changes = _changes(config, config_schema.validate(state.config, resumed_from))
    if not has_same_selection and not any("where" in change for change in changes):
        changes.append("data.where (the index of columns is another one)")
    if changes and not allow_changes:
        raise ConfigError(
            f"{resumed_from}: was made with another configuration: {', '.join(changes)}; name another folder with run, or "
            "set `allow_changes` to resume nevertheless"
        )
    if any(change.startswith(("model.", "condition")) for change in changes):
        check_same_network(resumed_from, weights_file.load_weights(resumed_from)[1], model, state.prediction)


def _changes(config: ExperimentConfig, recorded: ExperimentConfig) -> list[str]:
    """Return the keys whose change since a checkpoint changes what is learned, with both values."""
    free = FREE_KEYS | {f"model.{key}" for key in config.model.execution_fields}
    changes = [
        f"{key} ({before}, now {after})"
        for key, before, after in config_schema.differences(
            _without_paths(recorded.model_dump(mode="json")), _without_paths(config.model_dump(mode="json"))
        )
        if key not in free and key.split(".")[0] not in FREE_SECTIONS
    ]
    if config.train.schedule == "cosine" and recorded.train.num_steps != config.train.num_steps:
        changes.append("train.num_steps (the cosine schedule depends on it)")
    return changes


def _without_paths(content: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys of its sources that may change as those of `FREE_KEYS`."""
    free = ("shards", "skip_shards")
    sources = [{key: value for key, value in each.items() if key not in free} for each in content["data"]["sources"]]
    return content | {"data": content["data"] | {"sources": sources}}


def _function_of(config: Any, prediction: str) -> dict[str, Any]:
    """Return the fields that determine the output of a network, by name."""
    fields = registry.config_to_json(config)
    return fields | {"prediction": prediction, "condition_dropout": config.condition_dropout > 0}
