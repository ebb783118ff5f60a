"""Keys of an experiment that contradict each other."""

from __future__ import annotations

from typing import Any

from lfm.errors import ConfigError
from pipelines.common.experiment.config_schema import ExperimentConfig


def check(config: ExperimentConfig, settings: dict[str, Any], name: str) -> None:
    """Refuse keys of an experiment, and of its DeepSpeed settings, that contradict each other.

    Raises:
        ConfigError: names the file `name`, the keys and the repair.
    """
    _check_keys(config, name)
    _check_deepspeed(settings, name)


def _check_keys(config: ExperimentConfig, name: str) -> None:
    train = config.train
    if train.warmup_steps > train.num_steps:
        raise ConfigError(
            f"{name}: train.warmup_steps {train.warmup_steps} is more than train.num_steps {train.num_steps}; "
            f"change either, as in --set train.warmup_steps={train.num_steps // 10}"
        )
    if train.micro_batch and train.global_batch % train.micro_batch:
        raise ConfigError(
            f"{name}: train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch}"
        )
    if config.flow.coupling_group > 1 and config.conditions:
        raise ConfigError(
            f"{name}: flow.coupling_group: makes the noise depend on the condition, which sampling does not; "
            "set it to 1, or condition: none"
        )
    if config.flow.coupling_group > 1 and config.flow.num_noises > 1:
        raise ConfigError(f"{name}: flow.coupling_group, flow.num_noises: are two ways to assign noise; set one")
    if config.condition_dropout and config.condition == "none":
        raise ConfigError(f"{name}: condition_dropout: needs a condition, as in condition: class")
    if config.evaluation and config.evaluation.task_score and "class" not in config.conditions:
        raise ConfigError(f"{name}: evaluation.task_score: needs classes, as in condition: class")
    if config.evaluation and not (config.evaluation.reference or config.evaluation.task_score):
        raise ConfigError(f"{name}: evaluation: measures nothing; set its reference, task_score, or both")
    if config.data.held_back and not train.validate_every:
        raise ConfigError(f"{name}: data.held_back: needs train.validate_every, the steps between validation losses")
    if len(set(train.ema_sigma_rel)) != len(train.ema_sigma_rel):
        raise ConfigError(f"{name}: train.ema_sigma_rel: lists a width twice")


def _check_deepspeed(settings: dict[str, Any], name: str) -> None:
    for offload in ("offload_optimizer", "offload_param"):
        where = settings["zero_optimization"].get(offload)
        if isinstance(where, dict) and where.get("device") == "nvme":
            raise ConfigError(
                f"{name}: deepspeed: zero_optimization.{offload}: nvme is not supported; set its device to cpu"
            )
    stage = settings["zero_optimization"].get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(f"{name}: deepspeed: zero_optimization.stage is {stage}; choose 1, 2 or 3")
