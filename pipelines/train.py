"""The training stage: latents -> a DiT's weights, by flow matching under DeepSpeed ZeRO.

Everything is a function of the samples seen: a run killed at any moment goes on, by the same command, as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfm import checkpoint as checkpoints
from lfm import storage
from lfm.checkpoint import RunFolder, RunState, WeightsHeader
from lfm.data import manifest as manifests
from lfm.data.manifest import Manifest
from lfm.data.stream import LatentStream
from lfm.ema import decay_after
from lfm.engine import Engine
from lfm.errors import ConfigError, DataError
from lfm.flow import TIME_SAMPLERS, path_sample, shifted_time, velocity_loss
from lfm.models.dit import DiT, DiTConfig
from lfm.types import LatentBatch
from lfm.world import World
from pipelines import config as configs
from pipelines import factory
from pipelines.config import ExperimentConfig, TrainConfig
from pipelines.progress import Progress

LOG = "log.jsonl"
CONFIG = "config.json"
# Keys whose change does not change what is learned, only how long or how visibly.
FREE_KEYS = {
    *("run", "data.shards", "data.cache", "data.cache_gigabytes", "data.skip_shards"),
    *("model.attention", "model.activation_checkpointing", "model.compile", "train.micro_batch"),
    *("train.num_steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every"),
}


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, and what it came to; weights are None after a dry run."""

    plan: str
    weights: Path | None
    samples_seen: int
    loss: float | None


def run(config: ExperimentConfig, world: World, *, dry_run: bool = False, allow_changes: bool = False) -> TrainResult:
    """Train to the configured number of steps, from the newest checkpoint if there is one.

    Raises:
        ConfigError, DataError, CheckpointError: before training, wherever it can be known before.
    """
    manifest = manifests.load(config.data.shards, "latents")
    model_config = factory.model_config(config, manifest)
    settings = factory.deepspeed_settings(config, world)
    folder = RunFolder(config.run)
    newest = folder.newest()
    if newest:
        _check_continues(
            config, manifest, folder.read_state(newest, verify=world.is_main), newest, world, allow_changes
        )
    torch.manual_seed(config.train.seed)  # of the initial weights alone
    model = DiT(model_config)
    if config.model.compile:
        model.compile_blocks()
    plan = _plan(config, manifest, model, world, settings, newest)
    if dry_run:
        return TrainResult(plan, None, 0, None)
    header = _header(config, manifest, model_config)
    with folder.only_one() if world.is_main else nullcontext():
        engine = Engine(model, settings, world)
        if world.is_main:
            print(plan, flush=True)
            storage.write_json(str(folder.path / CONFIG), config.model_dump(mode="json"))
        engine.barrier()
        result = Training(config, manifest, header, engine, folder).run(plan, newest)
        engine.close()
        return result


class Training:
    """One rank's training loop."""

    def __init__(
        self, config: ExperimentConfig, manifest: Manifest, header: dict[str, Any], engine: Engine, folder: RunFolder
    ) -> None:
        self.config, self.train, self.header = config, config.train, header
        self.engine, self.world, self.folder = engine, engine.world, folder
        self.micro_batch = factory.micro_batch(config, self.world)
        options = factory.stream_options(config, header["model"])
        cache = factory.cache(config.data.cache, config.data.cache_gigabytes)
        self.stream = LatentStream(config.data.shards, manifest, options, self.world, cache, engine.device)
        self.samples_seen = 0
        self.loss: float | None = None

    def run(self, plan: str, newest: Path | None) -> TrainResult:
        """Train from `newest`, or from the start."""
        if newest:
            self._resume(newest)
        batch, total = self.train.global_batch, self.train.num_steps * self.train.global_batch
        log = Log(self.folder.path / LOG, self.samples_seen, quiet=not self.world.is_main)
        bar = Progress("train", total, "samples", done=self.samples_seen, quiet=not self.world.is_main)
        with bar, closing(log), closing(self.stream.batches(self.samples_seen)) as batches:
            losses: list[torch.Tensor] = []
            while self.samples_seen < total:
                losses.append(self._step(next(batches)))
                step = self.samples_seen // batch
                figures: dict[str, str] = {}
                saves = step % self.train.checkpoint_every == 0 or self.samples_seen == total
                if saves or step % self.train.log_every == 0:
                    self.loss = self._mean_over_ranks(losses)
                    figures = log.write(self.samples_seen, step, self.loss, self.engine, self.stream)
                    losses.clear()
                if saves:
                    self._save()
                bar.advance(batch, **figures)
        return TrainResult(plan, self.folder.path / checkpoints.WEIGHTS, self.samples_seen, self.loss)

    def _step(self, batch: LatentBatch) -> torch.Tensor:
        """One optimizer update; returns this rank's mean loss, float32 ()."""
        self.engine.set_learning_rate(learning_rate_at(self.samples_seen, self.train))
        parts = torch.arange(len(batch.latents), device=batch.latents.device).split(self.micro_batch)
        losses = []
        for rows in parts:
            micro = batch.rows(rows)
            example = path_sample(micro.latents, micro.noise, self._times(micro.uniform), self.config.flow.sigma_min)
            predicted = self.engine(example.state, example.time, micro.condition, micro.kept_tokens)
            loss = velocity_loss(predicted, example.velocity, self.config.flow.direction_weight).mean()
            self.engine.backward_and_step(loss)
            losses.append(loss.detach())
        self.samples_seen += self.train.global_batch
        step = self.samples_seen // self.train.global_batch
        self.engine.ema.update(decay_after(step, self.train.ema_decay))
        return torch.stack(losses).mean()

    def _times(self, uniform: torch.Tensor) -> torch.Tensor:
        return shifted_time(TIME_SAMPLERS[self.config.flow.time](uniform), self.config.flow.time_shift)

    def _mean_over_ranks(self, losses: list[torch.Tensor]) -> float:
        mean = float(self.engine.sum_over_ranks(torch.stack(losses).mean()) / self.world.size)
        if not math.isfinite(mean):
            raise DataError(
                f"the loss is {mean} at sample {self.samples_seen:,}: nothing of it was saved; lower train.learning_rate, "
                "set train.gradient_clipping, or look for broken latents, and run the same command"
            )
        return mean

    def _save(self) -> None:
        weights = self.engine.ema_weights()
        tag = self.folder.temporary_tag(self.samples_seen)
        self.engine.save(self.folder.checkpoints, tag)
        if self.world.is_main:
            header = WeightsHeader(**self.header, samples_seen=self.samples_seen)
            checkpoints.save_weights(str(self.folder.checkpoints / tag / checkpoints.WEIGHTS), weights, header)
            state = RunState(
                samples_seen=self.samples_seen,
                world_size=self.world.size,
                manifest_digest=header.manifest_digest,
                code_version=header.code_version,
                config=header.config,
            )
            self.folder.publish(self.samples_seen, state, self.train.keep_checkpoints)
        self.engine.barrier()

    def _resume(self, newest: Path) -> None:
        weights, header = checkpoints.load_weights(str(newest))
        self.samples_seen = header.samples_seen
        self.engine.load(newest, weights)


class Log:
    """The figures of a run as JSON lines; what a killed run wrote beyond its last checkpoint is dropped."""

    def __init__(self, path: Path, samples_seen: int, *, quiet: bool) -> None:
        self.quiet, self.path = quiet, path
        if quiet:
            return
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line + "\n" for line in lines if _samples_seen(line) <= samples_seen]
        storage.write_bytes(str(path), "".join(kept).encode())
        self.file = path.open("a", buffering=1)
        self.at, self.seen, self.waited = time.perf_counter(), samples_seen, 0.0

    def write(self, samples_seen: int, step: int, loss: float, engine: Engine, stream: LatentStream) -> dict[str, str]:
        """Add a line; returns what the progress bar shows of it."""
        if self.quiet:
            return {}
        now = time.perf_counter()
        elapsed, wait = now - self.at, stream.wait_seconds - self.waited
        counts = {what: stream.cache.counts[what] for what in ("cache_hits", "downloads", "retries")}
        self.file.write(
            json.dumps(
                {
                    "samples_seen": samples_seen,
                    "step": step,
                    "loss": loss,
                    "gradient_norm": engine.gradient_norm,
                    "samples_per_second": (samples_seen - self.seen) / elapsed,
                    "data_wait": wait / elapsed,
                    **counts,
                }
            )
            + "\n"
        )
        self.at, self.seen, self.waited = now, samples_seen, stream.wait_seconds
        shown = {what: f"{count:,}" for what, count in counts.items() if count}
        return {"loss": f"{loss:.4f}", "data_wait": f"{wait / elapsed:.1%}", **shown}

    def close(self) -> None:
        """Nothing more is written."""
        if not self.quiet:
            self.file.close()


def _samples_seen(line: str) -> float:
    """Of a line of the log; infinite where a kill cut it off."""
    try:
        return json.loads(line)["samples_seen"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def learning_rate_at(samples_seen: int, train: TrainConfig) -> float:
    """The learning rate of the step that begins at `samples_seen`: linear warm-up, then constant or half a cosine."""
    warmup, total = train.warmup_steps * train.global_batch, train.num_steps * train.global_batch
    after = samples_seen + train.global_batch  # a step counts when it is done, so that the first one moves
    if after <= warmup:
        return train.learning_rate * after / warmup
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (samples_seen - warmup) / (total - warmup)))
    return train.learning_rate


def _header(config: ExperimentConfig, manifest: Manifest, model_config: DiTConfig) -> dict[str, Any]:
    return {
        "model": model_config,
        "autoencoder": manifest.autoencoder,
        "image_size": manifest.image_size,
        "crop": manifest.recipe.get("crop"),
        "classes": manifest.classes if "class" in config.conditions else (),
        "labels": manifest.labels if "semantic" in config.conditions else {},
        "manifest_digest": manifest.digest,
        "code_version": factory.code_version(),
        "config": config.model_dump(mode="json"),
    }


def _check_continues(
    config: ExperimentConfig, manifest: Manifest, state: RunState, newest: Path, world: World, allow_changes: bool
) -> None:
    """Refuse to go on with other data, ranks or configuration than the checkpoint's."""
    if state.world_size != world.size:
        raise ConfigError(
            f"{newest}: was written by {state.world_size} ranks, now there are {world.size}; start as many"
        )
    if state.manifest_digest != manifest.digest:
        raise DataError(
            f"{config.data.shards}: other latents than {newest} was trained on; name those, or another folder with run"
        )
    changes = [
        f"{key} ({before}, now {after})"
        for key, before, after in configs.differences(state.config, config.model_dump(mode="json"))
        if key not in FREE_KEYS
    ]
    if config.train.schedule == "cosine" and state.config["train"]["num_steps"] != config.train.num_steps:
        changes.append("train.num_steps (the cosine schedule depends on it)")
    if any(change.startswith("deepspeed.zero_optimization.stage") for change in changes):
        raise ConfigError(f"{newest}: {', '.join(changes)}: a run keeps its ZeRO stage; name another folder with run")
    if changes and not allow_changes:
        raise ConfigError(f"{newest}: was made with another configuration: {', '.join(changes)}; name another folder "
                          "with run, or go on all the same with --allow-changes")  # fmt: skip


def _plan(
    config: ExperimentConfig,
    manifest: Manifest,
    model: DiT,
    world: World,
    settings: dict[str, Any],
    newest: Path | None,
) -> str:
    batch = config.train.global_batch
    stage = settings["zero_optimization"]["stage"]
    origin = f"from {newest.name}" if newest else "from the start"
    skipped = config.data.skip_shards
    return (
        f"{model.num_parameters:,} parameters, {manifest.num_samples:,} samples in {config.data.shards}; "
        f"{f'{len(skipped)} shards left out; ' if skipped else ''}"
        f"{config.train.num_steps:,} steps of {batch} ({config.train.num_steps * batch / manifest.num_samples:.1f} epochs) "
        f"on {world.size} ranks, ZeRO {stage}, {config.train.precision}, {origin} -> {config.run}"
    )
