"""The training stage: latent shards -> the weights of a network, by flow matching under DeepSpeed ZeRO."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lfm import storage, weights_file
from lfm.data.dropped import drops_digest
from lfm.data.stream.mixture import LatentSource, Mixture, shared_shards
from lfm.data.versions import Segment
from lfm.errors import ConfigError, DataError, hide_credentials
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.precision import float32_arithmetic, trained_precision
from lfm.training.engine import Engine
from lfm.training.ranks import Ranks
from lfm.training.run_folder import RunFolder, RunState
from lfm.training.run_mirror import RunMirror
from lfm.training.step_guard import StepGuard
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment.config_schema import ExperimentConfig, differences
from pipelines.common.experiment.mixture_plan import describe_history, describe_mixture
from pipelines.common.provenance import code_version
from pipelines.common.reference_features import ReferenceSet
from pipelines.training import forecast
from pipelines.training.continued_data import choose_history, read_history, selects_as_before
from pipelines.training.forecast import PlannedTraining
from pipelines.training.initialization import Initialization, Origin, prepare_weights
from pipelines.training.measurement.best_weights import load_reference_set
from pipelines.training.resume_checks import check_continues
from pipelines.training.training_loop import TrainingLoop, averages

CONFIG = "config.json"


@dataclass(frozen=True)
class TrainResult:
    """The plan of a training, and its result; `weights` is their path or URL, None after a dry run."""

    plan: str
    weights: str | None = None
    samples_seen: int = 0
    loss: float | None = None


def run(
    config: ExperimentConfig,
    world: World,
    *,
    dry_run: bool = False,
    allow_changes: bool = False,
    initialization: Initialization | None = None,
    repeat_data: str | None = None,
    num_ranks: int | None = None,
    rate: float | None = None,
) -> TrainResult:
    """Train to the configured number of steps, from the newest checkpoint if there is one.

    Args:
        config: the experiment.
        world: this process among the ranks.
        dry_run: check everything, say what it will take, and do nothing.
        allow_changes: resume although the configuration has changed.
        initialization: the weights that a run without checkpoints starts from, and how they are adapted.
        repeat_data: run, checkpoint or weights file whose versions of the data are read, each from the same sample on.
        num_ranks: number of ranks that a dry run plans for; by default those that there are.
        rate: samples per second for the hours that a dry run tells; by default measured.

    Raises:
        ConfigError, DataError, CheckpointError: raised before training if the cause can be known before.
        KeyboardInterrupt: a rank received SIGTERM or SIGINT; a checkpoint was saved.
    """
    with Ranks(world) as ranks:
        _require_equal_configuration(config, ranks)
        data = _load_data(config, ranks, repeat_data)
        folder = factory.run_folder(config)
        if dry_run:
            if world.is_main and not storage.is_local(config.run):
                RunMirror(config.run, folder).fetch()
            checkpoint = _choose_checkpoint(folder, ranks, dry_run=True)
            planned = World(size=num_ranks) if num_ranks else world
            prepared = _prepare(config, data, planned, folder, checkpoint, initialization, allow_changes)
            state = checkpoint[1] if checkpoint else None
            lines = _forecast(prepared, planned, folder, state, rate)
            return TrainResult("\n".join([prepared.plan, *lines]))
        with folder.only_one() if world.is_main else nullcontext():
            folder.require_shared(ranks)
            mirror = None
            if world.is_main and not storage.is_local(config.run):
                mirror = RunMirror(config.run, folder)
                mirror.fetch()
            checkpoint = _choose_checkpoint(folder, ranks)
            if checkpoint and world.is_main:
                folder.repair_weights(checkpoint[0])
            prepared = _prepare(config, data, world, folder, checkpoint, initialization, allow_changes)
            precision = prepared.config.train.precision or "fp32"
            with mirror or nullcontext(), float32_arithmetic(precision, factory.device(world)):
                loop = _start(prepared, ranks, folder, mirror)
                loop.run(checkpoint[0] if checkpoint else None, prepared.origin.weights)
                loop.engine.close()
    if loop.stop_requested:
        raise KeyboardInterrupt
    return TrainResult(
        prepared.plan, storage.join(config.run, weights_file.WEIGHTS), loop.samples_seen, loop.losses.get("loss")
    )


@dataclass(frozen=True)
class PreparedTraining:
    """What was built and checked before the engine starts."""

    plan: str
    config: ExperimentConfig  # with its precision
    mixture: Mixture  # with the history of its versions
    model: VelocityNetwork
    settings: dict[str, Any]  # DeepSpeed's configuration
    reference_set: ReferenceSet | None  # for a distance during training
    origin: Origin
    rate_factors: dict[str, float]  # of the learning rate, by the name of a parameter; of others 1


def _require_equal_configuration(config: ExperimentConfig, ranks: Ranks) -> None:
    """Raise ConfigError, naming the key, if this rank's configuration is not that of rank 0; caches may differ."""
    own = config.model_dump(mode="json", exclude={"data": {"cache", "cache_gigabytes"}})
    for key, main_value, own_value in differences(ranks.broadcast(own), own):
        raise ConfigError(
            f"{key}: {main_value} on rank 0, {own_value} on rank {ranks.world.rank}; start all ranks with one configuration"
        )


@dataclass(frozen=True)
class CurrentData:
    """The data sets of a training as they are now."""

    newest: tuple[LatentSource, ...]
    repeated: tuple[Segment, ...]  # the history of another run, if it is to be repeated


def _load_data(config: ExperimentConfig, ranks: Ranks, repeat_data: str | None) -> CurrentData:
    """Find the data sets, which must be the same on all ranks."""
    newest = factory.load_sources(config)
    repeated = read_history(repeat_data) if repeat_data else ()
    mixture = factory.mixture_of(config, newest)
    digests = [mixture.digest, mixture.subsets_digest, *(drops_digest(source.drops) for source in newest)]
    ranks.require_equal(f"latents of {mixture.name}", [*digests, *(segment.model_dump() for segment in repeated)])
    return CurrentData(newest, repeated)


def _choose_checkpoint(folder: RunFolder, ranks: Ranks, *, dry_run: bool = False) -> tuple[Path, RunState] | None:
    """Return the checkpoint to resume from, with its state, as rank 0 chooses it; None if there is none.

    Damaged checkpoints are put aside, except in a dry run.
    """
    choice: tuple[Path, RunState] | None = None
    if ranks.world.is_main:
        newest = folder.newest()
        if not dry_run:
            choice = folder.newest_intact()
        elif newest:
            choice = newest, folder.read_state(newest)
    name = ranks.broadcast(choice[0].name if choice else None)
    if name is None:
        return None
    path = folder.checkpoints / name
    state = choice[1] if choice else folder.read_state(path, verify=False)
    ranks.require_equal(f"{path}", state.model_dump(mode="json"))
    return path, state


def _prepare(
    config: ExperimentConfig,
    data: CurrentData,
    world: World,
    folder: RunFolder,
    checkpoint: tuple[Path, RunState] | None,
    initialization: Initialization | None,
    allow_changes: bool,
) -> PreparedTraining:
    """Check everything that can be checked before training, and build the network."""
    recorded = trained_precision(checkpoint[1].config) if checkpoint else None
    config = factory.with_precision(config, factory.device(world), recorded)
    mixture = factory.mixture_of(config, data.newest, choose_history(config, data.newest, checkpoint, data.repeated))
    (training, held_back), manifest = mixture.split(config.data.held_back), mixture.manifest
    if not config.data.allow_leaks and (leaks := shared_shards(training, held_back)):
        held, trained = leaks[0]
        raise DataError(
            f"data.held_back {config.data.held_back}: the samples of {held} are also trained on, in {trained}; lower it, leave "
            "one of the two out with skip_shards, or set data.allow_leaks"
        )
    if not all(source.num_samples for source in training.sources):
        raise DataError(
            f"{mixture.name}: data.skip_shards leaves nothing to train on, or where selects none of the rest; leave less out"
        )
    model_config = factory.model_config(config, manifest)
    factory.training_loss(config, model_config)  # checks its terms
    settings = factory.deepspeed_settings(config, world)
    reference_set = load_reference_set(config, manifest, world) if config.evaluation else None
    torch.manual_seed(config.train.seed)  # used for the initial weights only
    model = registry.build_network(model_config)
    rate_factors = _rate_factors(config, model)
    if checkpoint:
        is_same = selects_as_before(data.newest, mixture, checkpoint[1])
        check_continues(config, model, *checkpoint, allow_changes, has_same_selection=is_same)
    origin = prepare_weights(config, model, manifest, checkpoint, initialization)
    if config.train.optimizer == "muon" and not model.hidden_matrices():
        raise ConfigError(
            f"train.optimizer muon: needs matrices, of which the backbone {config.model.backbone} has none; set it to adamw"
        )
    if factory.compiles_blocks(config):
        model.compile_blocks()
    size = forecast.checkpoint_bytes(origin.num_trained, len(averages(config.train)))
    folder.require_space(size, config.train.keep_checkpoints, 4 * origin.num_trained)
    name = checkpoint[0].name if checkpoint else initialization.source if initialization else None
    lines = [
        _describe(config, training, held_back.manifest.num_samples, model, world, settings, name),
        *describe_history(mixture),
        *describe_mixture(config, training),
        *origin.lines,
    ]
    return PreparedTraining("\n".join(lines), config, mixture, model, settings, reference_set, origin, rate_factors)


def _forecast(
    prepared: PreparedTraining,
    world: World,
    folder: RunFolder,
    state: RunState | None,
    rate: float | None,
) -> list[str]:
    """Return in lines what a training will take that begins, or resumes from a checkpoint of this state."""
    device = factory.device(world)
    planned = PlannedTraining(
        prepared.config,
        prepared.settings,
        prepared.mixture.split(prepared.config.data.held_back)[0],
        prepared.model,
        num_averages=len(averages(prepared.config.train)),
        num_ranks=world.size,
        on_gpu=device.type == "cuda",
    )
    lines = [*forecast.describe_memory(planned), *forecast.describe_disk(planned, folder.path)]
    origin = "given"
    if rate is None and state and state.world_size == world.size:
        origin, rate = "of the run so far", forecast.logged_rate(folder.path)
    if rate is None:
        origin = f"passes on this device{', without communication' if planned.on_gpu and world.size > 1 else ''}"
        try:
            rate = forecast.measured_rate(planned, device)
        except torch.OutOfMemoryError:
            return [
                *lines,
                "  time: unknown, since passes to measure it need more memory than the GPU has; name a rate",
            ]
    return [*lines, forecast.describe_hours(planned, state.samples_seen if state else 0, rate, origin)]


def _rate_factors(config: ExperimentConfig, model: VelocityNetwork) -> dict[str, float]:
    """Scale the new weights of a network for `train.reference_width`, and return the factors of its learning rates."""
    width = config.train.reference_width
    if width is None:
        return {}
    if config.train.optimizer != "adamw":
        raise ConfigError(f"train.reference_width {width}: is for train.optimizer adamw; leave it out")
    factors = model.scale_for_width(width)
    if not factors:
        raise ConfigError(f"train.reference_width {width}: the backbone {config.model.backbone} has none; leave it out")
    return factors


def _start(prepared: PreparedTraining, ranks: Ranks, folder: RunFolder, mirror: RunMirror | None) -> TrainingLoop:
    """Start the engine on all ranks, and build the training loop."""
    config, mixture = prepared.config, prepared.mixture
    guard = StepGuard(config.train.skip_above)
    matrices = prepared.model.hidden_matrices() if config.train.optimizer == "muon" else None
    engine = Engine(
        prepared.model,
        prepared.settings,
        ranks.world,
        averages(config.train),
        guard,
        ranks.store,
        matrices,
        prepared.rate_factors,
        prepared.origin.fixed,
    )
    if ranks.world.is_main:
        print(hide_credentials(prepared.plan), flush=True)
        storage.write_json(str(folder.path / CONFIG), config.model_dump(mode="json"))
    engine.barrier()
    header = replace(
        _header(config, mixture, prepared.model.config),
        prediction=prepared.origin.prediction,
        initialized_from=prepared.origin.record,
        base=prepared.origin.base,
    )
    if mirror is None:
        return TrainingLoop(config, mixture, header, engine, folder, prepared.reference_set)
    mirror.carry()
    return TrainingLoop(config, mixture, header, engine, folder, prepared.reference_set, mirror.carry)


def _header(config: ExperimentConfig, mixture: Mixture, model_config: ModelConfig) -> WeightsHeader:
    """Return the header of the weights of a run, at its start."""
    manifest = mixture.manifest
    assert manifest.autoencoder is not None, "checked when the model's configuration was built"
    return WeightsHeader(
        model=model_config,
        autoencoder=manifest.autoencoder,
        image_size=manifest.image_size,
        classes=manifest.classes if "class" in config.conditions else (),
        samples_seen=0,
        manifest_digest=mixture.digest,
        code_version=code_version(),
        config=config.model_dump(mode="json"),
        crop=manifest.recipe.get("crop"),
        labels=manifest.labels if "semantic" in config.conditions else {},
        data_history=mixture.history,
    )


def _describe(
    config: ExperimentConfig,
    training: Mixture,
    num_held_back: int,
    model: VelocityNetwork,
    world: World,
    settings: dict[str, Any],
    origin: str | None,
) -> str:
    """Return the plan of a training in one line; samples and epochs are those of the shards to train on."""
    manifest = training.manifest
    num_samples = config.train.num_steps * config.train.global_batch
    matrices = ""
    if config.train.optimizer == "muon":
        names, parameters = model.hidden_matrices(), dict(model.named_parameters())
        size = sum(parameters[name].numel() for name in names)
        matrices = f"{sum(names.values())} matrices of {size:,} parameters by Muon, the rest by AdamW; "
    skipped = f"{len(config.data.skip_shards)} shards left out; " if config.data.skip_shards else ""
    held_back = f" ({num_held_back:,} more are held back)" if num_held_back else ""
    return (
        f"{model.num_parameters:,} parameters, {manifest.num_samples:,} samples in {training.name}{held_back}; "
        f"{skipped}{matrices}"
        f"{config.train.num_steps:,} steps of {config.train.global_batch} "
        f"({num_samples / manifest.num_samples:.1f} epochs) on {world.size} {'rank' if world.size == 1 else 'ranks'}, "
        f"ZeRO {settings['zero_optimization']['stage']}, {config.train.precision}, from {origin or 'the start'} -> "
        f"{config.run}"
    )
