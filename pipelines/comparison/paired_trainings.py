"""The trainings of a comparison: which runs of which configurations, and which of them are pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm import storage, weights_file
from lfm.errors import ConfigError
from lfm.precision import trained_precision
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file, config_schema, shipped_experiments
from pipelines.common.experiment.config_schema import ExperimentConfig, differences
from pipelines.comparison.comparison_options import CompareConfig

LOG, CONFIG = "log.jsonl", "config.json"
# Keys that decide which samples a training reads when: trainings that differ in one of them are no pairs.
PAIRING_KEYS = (
    "data.shards",
    "data.where",
    "data.balance",
    "data.sources",
    "data.stages",
    "data.window",
    "data.skip_shards",
    "data.held_back",
    "train.seed",
)


@dataclass(frozen=True)
class Training:
    """One run of one configuration."""

    name: str  # of the configuration
    seed: int
    file: str
    config: ExperimentConfig
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run)

    @property
    def num_samples(self) -> int:
        """Samples of the whole training."""
        return self.config.train.num_steps * self.config.train.global_batch

    @property
    def samples_seen(self) -> int:
        """Samples that the log reports."""
        lines = read_log(self.folder)
        return lines[-1]["samples_seen"] if lines else 0

    @property
    def is_complete(self) -> bool:
        """Whether the run has its last weights."""
        return self.samples_seen == self.num_samples and (self.folder / weights_file.WEIGHTS).exists()


def plan_trainings(config: CompareConfig) -> list[Training]:
    """Return the trainings, all configurations of one seed before those of the next.

    Raises:
        ConfigError: two files have one name, or an experiment is wrong or measures nothing.
    """
    files = [shipped_experiments.find(name) for name in config.configs]
    names = [Path(file).stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"`configs`: two files are called {name}; rename one, since runs are named after them")
    trainings = []
    for number in range(config.seeds):
        for name, file in zip(names, files, strict=True):
            seed = config_file.load(file, config.overrides).train.seed + number
            folder = Path(config.out) / name / f"seed-{seed}"
            overrides = (*config.overrides, f"run={folder}", f"train.seed={seed}")
            experiment = config_file.load(file, overrides)
            if not experiment.evaluation and not (experiment.train.validate_every and experiment.data.held_back):
                raise ConfigError(
                    f"{file}: measures nothing during training; set train.validate_every and data.held_back, or evaluation"
                )
            trainings.append(Training(name, seed, file, experiment, overrides))
    return trainings


def describe(trainings: list[Training], config: CompareConfig) -> str:
    """Return what will be trained, one line for each configuration, and whether its runs are paired with the first's."""
    lines = []
    first = trainings[0]
    for training in trainings[: len(config.configs)]:
        seeds = [str(other.seed) for other in trainings if other.name == training.name]
        train = training.config.train
        pairing = "the first" if training is first else unpaired_key(first.config, training.config)
        pairing = "paired with the first" if pairing is None else pairing
        lines.append(
            f"{training.name}: seeds {', '.join(seeds)}; {train.num_steps:,} steps of {train.global_batch}; {pairing}"
        )
    return "\n".join(lines)


def unpaired_key(first: ExperimentConfig, other: ExperimentConfig) -> str | None:
    """Return why runs of two configurations are no pairs, or None if they are."""
    changed = {key for key, *_ in differences(first.model_dump(mode="json"), other.model_dump(mode="json"))}
    keys = [key for key in PAIRING_KEYS if key in changed]
    return f"not paired: {keys[0]} differs" if keys else None


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; without the last one while it is being written, and empty without a log."""
    path = run / LOG
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def check_same_run(training: Training) -> None:
    """Raise ConfigError if the run folder holds a run of another configuration."""
    path = training.folder / CONFIG
    if not path.exists():
        return
    recorded = storage.read_json(str(path))
    before = config_schema.validate(recorded, str(path)).model_dump(mode="json")
    # A run whose configuration sets no precision resumes in the recorded one.
    now = factory.with_precision(training.config, factory.device(World()), trained_precision(recorded))
    for key, old, new in differences(before, now.model_dump(mode="json")):
        raise ConfigError(f"{training.folder}: was trained with {key} {old}, now {new}; choose another `out`")
