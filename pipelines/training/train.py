"""The training stage: latents -> a network's weights, by flow matching under DeepSpeed ZeRO.

Everything is a function of the samples seen, so a run that was killed at any moment goes on, by the same command, as if
it had not been: bit for bit on as many ranks at the same ZeRO stage, and to rounding on others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfm import storage, weights_file
from lfm.data import manifest as manifests
from lfm.data.manifest import Manifest
from lfm.data.stream.latent_stream import LatentStream, shard_sizes
from lfm.errors import ConfigError, DataError
from lfm.flow.time_samplers import TIME_SAMPLERS, shifted_time
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.training.ema import decay_after, power_decay_after
from lfm.training.engine import BYTES_PER_PARAMETER, Engine
from lfm.training.ranks import Ranks
from lfm.training.run_folder import RunFolder, RunState
from lfm.training.step_guard import StepGuard
from lfm.types import LatentBatch
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.config_schema import ExperimentConfig, TrainConfig, differences
from pipelines.common.progress import Progress
from pipelines.common.provenance import code_version
from pipelines.common.reference_features import ReferenceSet
from pipelines.training.best_weights import BestWeights, load_reference_set
from pipelines.training.resume_checks import check_continues, describe, initial_weights
from pipelines.training.stop_signals import StopRequest
from pipelines.training.training_log import Log
from pipelines.training.validation import Validation, split

CONFIG = "config.json"
MOST_SKIPPED_IN_A_ROW = 5  # then training goes back to the newest checkpoint, once


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, and what it came to; weights are None after a dry run."""

    plan: str
    weights: Path | None = None
    samples_seen: int = 0
    loss: float | None = None


def run(
    config: ExperimentConfig,
    world: World,
    *,
    dry_run: bool = False,
    allow_changes: bool = False,
    initialize_from: str | None = None,
) -> TrainResult:
    """Train to the configured number of steps, from the newest checkpoint if there is one.

    Args:
        initialize_from: a run or weights file whose EMA a run without checkpoints begins with.

    Raises:
        ConfigError, DataError, CheckpointError: before training, wherever it can be known before.
        KeyboardInterrupt: SIGTERM or Ctrl-C came; everything is saved.
    """
    with Ranks(world) as ranks:
        _require_equal_configuration(config, ranks)
        manifest = manifests.load(config.data.shards, "latents")
        ranks.require_equal(f"data.shards {config.data.shards}", manifest.digest)
        folder = RunFolder(config.run)
        if dry_run:
            checkpoint, _ = _choose_checkpoint(folder, ranks, dry_run=True)
            return TrainResult(
                _prepare(config, manifest, world, folder, checkpoint, initialize_from, allow_changes).plan
            )
        with folder.only_one() if world.is_main else nullcontext():
            folder.require_shared(ranks)
            checkpoint, newest = _choose_checkpoint(folder, ranks)
            prepared = _prepare(config, manifest, world, folder, checkpoint, initialize_from, allow_changes)
            training = _start(config, manifest, prepared, ranks, folder)
            training.run(newest, prepared.initial)
            training.engine.close()
    if training.stop_requested:
        raise KeyboardInterrupt
    return TrainResult(
        prepared.plan, folder.path / weights_file.WEIGHTS, training.samples_seen, training.losses.get("loss")
    )


@dataclass(frozen=True)
class Prepared:
    """What training begins with."""

    plan: str
    model: VelocityNetwork
    settings: dict[str, Any]  # DeepSpeed's configuration
    reference_set: ReferenceSet | None
    initial: dict[str, torch.Tensor] | None  # weights of another run


def _require_equal_configuration(config: ExperimentConfig, ranks: Ranks) -> None:
    """Raise ConfigError, naming the key, if this rank's configuration is not that of rank 0; caches may differ."""
    own = config.model_dump(mode="json", exclude={"data": {"cache", "cache_gigabytes"}})
    for key, main_value, own_value in differences(ranks.broadcast(own), own):
        raise ConfigError(
            f"{key}: {main_value} on rank 0, {own_value} on rank {ranks.world.rank}; start all ranks with one configuration"
        )


def _choose_checkpoint(
    folder: RunFolder, ranks: Ranks, *, dry_run: bool = False
) -> tuple[tuple[Path, RunState] | None, Path | None]:
    """Return the checkpoint to resume from, with its state, as rank 0 chooses it; None to start anew."""
    choice: tuple[Path, RunState] | None = None
    if dry_run:
        newest = folder.newest()
        choice = (newest, folder.read_state(newest)) if newest else None
    elif ranks.world.is_main:
        choice = folder.newest_intact()
    name = ranks.broadcast(choice[0].name if choice else None)
    if name is None:
        return None, None
    path = folder.checkpoints / name
    state = choice[1] if choice else folder.read_state(path, verify=False)
    ranks.require_equal(f"{path}", state.model_dump(mode="json"))
    return (path, state), path


def _prepare(
    config: ExperimentConfig,
    manifest: Manifest,
    world: World,
    folder: RunFolder,
    checkpoint: tuple[Path, RunState] | None,
    initialize_from: str | None,
    allow_changes: bool,
) -> Prepared:
    """Check everything that can be checked before training, and build the network."""
    training_shards, _ = split(manifest, config.data.held_back)
    if not sum(shard_sizes(training_shards, config.data.skip_shards, config.data.shards)):
        raise DataError(f"{config.data.shards}: data.skip_shards leaves nothing to train on; name fewer")
    model_config = factory.model_config(config, manifest)
    settings = factory.deepspeed_settings(config, world)
    reference_set = load_reference_set(config, manifest, world) if config.evaluation else None
    torch.manual_seed(config.train.seed)  # used for the initial weights only
    model = registry.build_network(model_config)
    if checkpoint:
        path, state = checkpoint
        check_continues(config, manifest, model, state, path, allow_changes)
    if factory.compiles_blocks(config):
        model.compile_blocks()
    initial = initial_weights(initialize_from, model, manifest) if initialize_from and not checkpoint else None
    bytes_of_checkpoint = (BYTES_PER_PARAMETER + 4 * (1 + len(config.train.ema_sigma_rel))) * model.num_parameters
    folder.require_space(bytes_of_checkpoint, config.train.keep_checkpoints, 4 * model.num_parameters)
    plan = describe(config, manifest, model, world, settings, checkpoint[0].name if checkpoint else initialize_from)
    return Prepared(plan, model, settings, reference_set, initial)


def _start(
    config: ExperimentConfig, manifest: Manifest, prepared: Prepared, ranks: Ranks, folder: RunFolder
) -> Training:
    """Start the engine on all ranks and build the training loop."""
    guard = StepGuard(config.train.skip_above)
    averages = ("ema", *map(_profile, config.train.ema_sigma_rel))
    engine = Engine(prepared.model, prepared.settings, ranks.world, averages, guard, ranks.store)
    if ranks.world.is_main:
        print(prepared.plan, flush=True)
        storage.write_json(str(folder.path / CONFIG), config.model_dump(mode="json"))
    engine.barrier()
    header = _header(config, manifest, prepared.model.config)
    return Training(config, manifest, header, engine, folder, prepared.reference_set)


class Training:
    """One rank's training loop."""

    def __init__(
        self,
        config: ExperimentConfig,
        manifest: Manifest,
        header: dict[str, Any],
        engine: Engine,
        folder: RunFolder,
        standard: ReferenceSet | None,
    ) -> None:
        self.config, self.train, self.header = config, config.train, header
        self.engine, self.world, self.folder = engine, engine.world, folder
        self.micro_batch = factory.micro_batch(config, self.world)
        trained, held_back = split(manifest, config.data.held_back)
        options = factory.stream_options(config, header["model"])
        cache = factory.cache(config.data.cache, config.data.cache_gigabytes)
        self.stream = LatentStream(config.data.shards, trained, options, self.world, cache, engine.device)
        self.validation = self.selection = None
        if self.train.validate_every or standard:
            decoder = factory.matching_autoencoder(header["autoencoder"], None, self.world, config.data.shards)
        if self.train.validate_every:
            self.validation = Validation(config, trained, held_back, header["model"], engine, decoder)
        if standard:
            self.selection = BestWeights(config, trained, header["model"], engine, decoder, standard)
        self.training_loss = factory.training_loss(config)
        self.samples_seen = 0
        self.losses: dict[str, float] = {}  # of the last step, over all ranks: "loss", and each term as "loss_NAME"
        self.stop_requested = False  # set on all ranks once any rank received SIGTERM or SIGINT

    @property
    def step(self) -> int:
        """Steps done, from the one clock."""
        return self.samples_seen // self.train.global_batch

    def run(self, newest: Path | None, initial: dict[str, torch.Tensor] | None) -> None:
        """Train from `newest`, from `initial` weights or from the start; after too many skipped steps back, once."""
        if newest:
            self._resume(newest)
        elif initial:
            self.engine.set_weights(initial)
        with StopRequest() as leave:
            if self._train(leave):
                return
            newest = self.folder.newest()
            if newest is None:
                raise self._diverged("before the first checkpoint")
            self._resume(newest)
            if not self._train(leave):
                raise self._diverged(f"again after going back to {newest.name}")

    def _train(self, leave: StopRequest) -> bool:
        """Train to the end, or until asked to leave; False after too many skipped steps in a row."""
        train, total = self.train, self.train.num_steps * self.train.global_batch
        log = Log(self.folder.path, self.samples_seen, self.engine, 3 * (self.header["model"].flops_per_sample or 0))
        bar = Progress("train", total, "samples", done=self.samples_seen, quiet=not self.world.is_main)
        with bar, closing(log), closing(self.stream.batches(self.samples_seen)) as batches:
            while self.samples_seen < total and not self.stop_requested:
                self._step(next(batches), leave)
                if self.engine.guard.in_a_row > MOST_SKIPPED_IN_A_ROW:
                    return False
                log.losses.append(self.losses)
                saves = self.step % train.checkpoint_every == 0 or self.stop_requested
                # What comes before skipped steps may be what ruined the weights: no checkpoint to go back to.
                saves = self.samples_seen == total or (saves and not self.engine.guard.in_a_row)
                figures: dict[str, str] = {}
                found = self._measured()
                if found or saves or self.step % train.log_every == 0:
                    rate = learning_rate_at(self.samples_seen - train.global_batch, train)
                    figures = log.write(self.samples_seen, self.step, self.stream, rate, found)
                if self._snapshots_due(self.step) > self._snapshots_due(self.step - 1):
                    self._snapshot()
                if saves and not self.engine.has_learned:
                    return False  # every step was left out
                if saves:
                    self._save()
                    log.draw(self.selection.name if self.selection else None)
                bar.advance(train.global_batch, **figures)
        return True

    def _step(self, batch: LatentBatch, leave: StopRequest) -> None:
        """One optimizer update, and the ranks' agreement on its loss and on leaving."""
        self.engine.set_learning_rate(learning_rate_at(self.samples_seen, self.train))
        parts = torch.arange(len(batch.latents), device=batch.latents.device).split(self.micro_batch)
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        for rows in parts:
            micro = batch.rows(rows)
            loss, terms = self.training_loss(self.engine, micro, self._times(micro.uniform))
            self.engine.backward_and_step(loss)
            losses["loss"].append(loss.detach())
            for name, value in terms.items():
                losses[f"loss_{name}"].append(value)
        self.samples_seen += self.train.global_batch
        self.engine.averages["ema"].update(decay_after(self.step, self.train.ema_decay))
        for width in self.train.ema_sigma_rel:
            self.engine.averages[_profile(width)].update(power_decay_after(self.step, width))
        means = [torch.stack(values).mean() for values in losses.values()]
        stop = torch.full_like(means[0], leave.came)
        *sums, num_requests = self.engine.sum_over_ranks(torch.stack([*means, stop])).tolist()
        self.losses = {name: total / self.world.size for name, total in zip(losses, sums, strict=True)}
        self.stop_requested = num_requests > 0

    def _times(self, uniform: torch.Tensor) -> torch.Tensor:
        return shifted_time(TIME_SAMPLERS[self.config.flow.time](uniform), self.config.flow.time_shift)

    def _diverged(self, when: str) -> DataError:
        return DataError(
            f"more than {MOST_SKIPPED_IN_A_ROW} steps in a row, or all of them, had a gradient that is not finite or over "
            f"{self.train.skip_above:g} times the usual one, {when}; nothing of them was saved: lower "
            "train.learning_rate, set train.gradient_clipping, or look for broken latents, and run the same command"
        )

    def _measured(self) -> dict[str, float]:
        """What is measured on the EMA at this step."""
        found: dict[str, float] = {}
        if self.validation and self.step % self.validation.every == 0:
            found |= self.validation.measure(self.samples_seen)
        if self.selection and self.step % self.selection.every == 0:
            found |= self.selection.measure(self._header_now())
        return found

    def _snapshots_due(self, step: int) -> int:
        return step * self.train.ema_snapshots // self.train.num_steps

    def _snapshot(self) -> None:
        """Put the power-function averages aside, in float16."""
        for width in self.train.ema_sigma_rel:
            weights = self.engine.average_weights(_profile(width))
            if self.world.is_main:
                halves = {name: tensor.half() for name, tensor in weights.items()}
                path = self.folder.snapshot(self.samples_seen, width)
                weights_file.save_weights(str(path), halves, self._header_now())

    def _header_now(self) -> WeightsHeader:
        return WeightsHeader(**self.header, samples_seen=self.samples_seen)

    def _save(self) -> None:
        weights = self.engine.average_weights("ema")
        temporary = self.folder.checkpoints / self.folder.temporary_tag(self.samples_seen)
        numbers = self.engine.save(temporary)
        if self.world.is_main:
            header = self._header_now()
            weights_file.save_weights(str(temporary / weights_file.WEIGHTS), weights, header)
            state = RunState(
                samples_seen=self.samples_seen,
                world_size=self.world.size,
                manifest_digest=header.manifest_digest,
                code_version=header.code_version,
                config=header.config,
                engine=numbers,
            )
            self.folder.publish(self.samples_seen, state, self.train.keep_checkpoints)
        self.engine.barrier()

    def _resume(self, newest: Path) -> None:
        state = self.folder.read_state(newest, verify=False)
        self.samples_seen = state.samples_seen
        self.engine.load(newest, state.engine, state.samples_seen)


def learning_rate_at(samples_seen: int, train: TrainConfig) -> float:
    """The learning rate of the step that begins at `samples_seen`: linear warm-up, then constant or half a cosine."""
    warmup, total = train.warmup_steps * train.global_batch, train.num_steps * train.global_batch
    after = samples_seen + train.global_batch  # a step counts when it is done, so that the first one moves
    if after <= warmup:
        return train.learning_rate * after / warmup
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (samples_seen - warmup) / (total - warmup)))
    return train.learning_rate


def _header(config: ExperimentConfig, manifest: Manifest, model_config: ModelConfig) -> dict[str, Any]:
    return {
        "model": model_config,
        "autoencoder": manifest.autoencoder,
        "image_size": manifest.image_size,
        "crop": manifest.recipe.get("crop"),
        "classes": manifest.classes if "class" in config.conditions else (),
        "labels": manifest.labels if "semantic" in config.conditions else {},
        "manifest_digest": manifest.digest,
        "code_version": code_version(),
        "config": config.model_dump(mode="json"),
    }


def _profile(width: float) -> str:
    """The name under which the engine keeps a power-function average."""
    return f"ema-{width:g}"
