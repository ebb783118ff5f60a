"""The training loop of one rank: optimizer steps, averages, measurements, log and checkpoints.

Everything is a function of the samples seen, so a run that is killed at any moment and resumed ends as if it had not been
interrupted: bit for bit on as many ranks at the same ZeRO stage, and up to rounding on others.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lfm import weights_file
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import Mixture
from lfm.errors import DataError
from lfm.flow.guidance import Guidance
from lfm.flow.time_samplers import TIME_SAMPLERS, shifted_time
from lfm.inference import trained_model
from lfm.inference.trained_model import TrainedModel
from lfm.models.noise_prediction import as_velocity
from lfm.training.checkpoint_writer import CheckpointWriter
from lfm.training.ema import decay_after, power_decay_after
from lfm.training.engine import Engine
from lfm.training.run_folder import RunFolder
from lfm.training.step_guard import MOST_SKIPPED_IN_A_ROW
from lfm.types import LatentBatch
from lfm.weights_file import WeightsHeader
from pipelines.common import factory
from pipelines.common.experiment.config_schema import EvaluationConfig, ExperimentConfig, TrainConfig
from pipelines.common.progress import Progress
from pipelines.common.reference_features import ReferenceSet
from pipelines.training.measurement.best_weights import BestWeights
from pipelines.training.measurement.ema_sampler import EmaSampler
from pipelines.training.measurement.validation import Validation
from pipelines.training.stop_signals import StopRequest
from pipelines.training.training_log import TrainingLog


class HostCopy:
    """A small tensor on its way from the device to the host, which need not wait for the device in the meantime."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._ready = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def values(self) -> list[float]:
        """Return the values, when the device has computed them."""
        if self._ready:
            self._ready.synchronize()
        return self._tensor.tolist()


class TrainingLoop:
    """One rank's training loop.

    Args:
        config: the experiment.
        mixture: the latents, held-back shards included.
        header: header of the weights to save; its `samples_seen` is replaced.
        engine: the model in training, with the averages that `averages` names.
        folder: run folder.
        reference_set: for the distance during training; None if the experiment measures none.
        on_checkpoint: called on the main rank, in a thread, after each checkpoint.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        mixture: Mixture,
        header: WeightsHeader,
        engine: Engine,
        folder: RunFolder,
        reference_set: ReferenceSet | None = None,
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.train, self.header = config, config.train, header
        self.engine, self.world, self.folder = engine, engine.world, folder
        self.checkpoints = CheckpointWriter(
            engine,
            folder,
            config.train.keep_checkpoints,
            subsets_digest=mixture.subsets_digest,
            on_publish=on_checkpoint,
        )
        self.micro_batch = factory.micro_batch(config, self.world)
        self.training_loss = factory.training_loss(config, header.model)
        self.network = as_velocity(engine, header.prediction, engine.device)
        training_shards, held_back = mixture.split(config.data.held_back)
        options = factory.stream_options(config, header.model)
        cache = factory.cache(config.data.cache, config.data.cache_gigabytes)
        self.stream = LatentStream(training_shards, options, self.world, cache, engine.device)
        self.evaluators: list[Validation | BestWeights] = []
        self.distances: tuple[str, ...] = ()
        if self.train.validate_every or config.evaluation:
            decoder = factory.matching_autoencoder(header.autoencoder, None, self.world, mixture.name)
            sampler = EmaSampler(config, header.model, engine, decoder, self.network)
            if self.train.validate_every:
                self.evaluators.append(Validation(sampler, folder.path, training_shards, held_back))
            if config.evaluation:
                model = TrainedModel(self.network, header, decoder, config.run)
                guidance = _guidance(config.evaluation, model, engine.device)
                self.evaluators.append(BestWeights(sampler, folder.path, training_shards, reference_set, guidance))
            if reference_set:
                self.distances = (reference_set.network.frechet,)
        self.samples_seen, self.total_samples = 0, self.train.num_steps * self.train.global_batch
        self.losses: dict[str, float] = {}  # of the last step, over all ranks: "loss", and each term as "loss_NAME"
        self.stop_requested = False  # set on all ranks once any rank received SIGTERM or SIGINT
        self.skipped_in_a_row = 0  # steps that the guard skipped since the last accepted one
        self._in_flight: deque[tuple[tuple[str, ...], HostCopy]] = deque()  # results that the host has not read yet

    @property
    def num_steps(self) -> int:
        """Number of steps so far; skipped ones are counted, too."""
        return self.samples_seen // self.train.global_batch

    def run(self, checkpoint: Path | None, initial_weights: dict[str, Tensor] | None) -> None:
        """Train to the last step, or until a rank receives SIGTERM or SIGINT.

        Args:
            checkpoint: checkpoint to resume from.
            initial_weights: without a checkpoint, the weights to start from; by default the model's own.

        Raises:
            DataError: training diverged.
            StorageError: a checkpoint cannot be written.
        """
        if checkpoint:
            state = self.folder.read_state(checkpoint, verify=False)
            self.samples_seen = state.samples_seen
            self.engine.load(checkpoint, state.engine, state.samples_seen)
        elif initial_weights:
            self.engine.set_weights(initial_weights)
        flops = self.header.model.flops_per_sample
        backward_and_forward = 3 * flops if flops else None
        log = TrainingLog(
            self.folder.path,
            self.samples_seen,
            self.engine,
            self.stream,
            backward_and_forward,
            self.header.data_history,
        )
        quiet = not self.world.is_main
        bar = Progress("train", self.total_samples, "samples", done=self.samples_seen, quiet=quiet)
        with (
            StopRequest() as stop_request,
            bar,
            closing(log),
            closing(self.checkpoints),
            closing(self.stream.batches(self.samples_seen)) as batches,
        ):
            if factory.compiles_blocks(self.config) and self.samples_seen < self.total_samples:
                self._take_compiling_step(batches, stop_request, log, bar)
            while self.samples_seen < self.total_samples and not self.stop_requested:
                self.take_step(next(batches), stop_request)
                bar.advance(self.train.global_batch, **self._finish_step(log))
            self.checkpoints.finish()

    def _take_compiling_step(
        self, batches: Iterator[LatentBatch], stop_request: StopRequest, log: TrainingLog, bar: Progress
    ) -> None:
        """Take the first step, in which the blocks are compiled, and say so and how long it took."""
        bar.note("compiling the blocks of the network in the first step; model.compile=false turns it off")
        start = time.perf_counter()
        self.take_step(next(batches), stop_request)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        bar.note(f"first step: {time.perf_counter() - start:.0f} s with compiling")
        bar.advance(self.train.global_batch, **self._finish_step(log))

    def take_step(self, batch: LatentBatch, stop_request: StopRequest) -> None:
        """Take one optimizer step, and let all ranks know its losses and whether a rank is to stop."""
        self.engine.set_learning_rate(learning_rate_at(self.samples_seen, self.train))
        # Dropout draws from torch's generator; seeded by the clock, it draws the same after resuming.
        first_sample = self.samples_seen + self.world.slice_of(self.train.global_batch).start
        torch.manual_seed((self.train.seed + first_sample) % 2**63)
        losses: dict[str, list[Tensor]] = defaultdict(list)
        for rows in torch.arange(len(batch.latents), device=batch.latents.device).split(self.micro_batch):
            part = batch.rows(rows)
            times = shifted_time(TIME_SAMPLERS[self.config.flow.time](part.uniform), self.config.flow.time_shift)
            loss, terms = self.training_loss(self.network, part, times)
            self.engine.backward_and_step(loss)
            losses["loss"].append(loss.detach())
            for name, value in terms.items():
                losses[f"loss_{name}"].append(value)
        self.samples_seen += self.train.global_batch
        self.engine.averages["ema"].update(decay_after(self.num_steps, self.train.ema_decay))
        for width in self.train.ema_sigma_rel:
            self.engine.averages[_power_average(width)].update(power_decay_after(self.num_steps, width))
        means = [torch.stack(values).mean() for values in losses.values()]
        flags = [torch.full_like(means[0], flag) for flag in (stop_request.received, *self.checkpoints.flags())]
        sums = self.engine.sum_over_ranks(torch.stack([*means, *flags]))
        skipped_in_a_row = self.engine.guard.skipped_in_a_row.to(sums)
        self._in_flight.append((tuple(losses), HostCopy(torch.cat([sums, skipped_in_a_row[None]]))))

    def _receive_results(self, log: TrainingLog, *, wait: bool) -> None:
        """Take over the results of steps that are finished; those of the newest step only with `wait`.

        The host is then at most one step ahead of the device, which has always work to do.
        """
        while len(self._in_flight) > (0 if wait else 1):
            names, copy = self._in_flight.popleft()
            *sums, num_stops, num_complete, num_failed, skipped_in_a_row = copy.values()
            self.losses = {name: total / self.world.size for name, total in zip(names, sums, strict=True)}
            self.stop_requested = self.stop_requested or num_stops > 0
            self.skipped_in_a_row = int(skipped_in_a_row)
            log.losses.append(self.losses)
            self.checkpoints.advance(int(num_complete), int(num_failed))

    def _finish_step(self, log: TrainingLog) -> dict[str, str]:
        """Do what is due after a step: measure, log, save. Return new figures for the progress bar.

        Raises:
            DataError: training diverged.
            StorageError: a checkpoint cannot be written.
        """
        train, step = self.train, self.num_steps
        is_last = self.samples_seen == self.total_samples
        is_due = is_last or step % train.checkpoint_every == 0
        evaluators = [evaluator for evaluator in self.evaluators if step % evaluator.every == 0]
        self._receive_results(log, wait=bool(is_due or evaluators or step % train.log_every == 0))
        if self.stop_requested:
            is_due = True
            self._receive_results(log, wait=True)
        # Weights that led to skipped steps may be ruined already, and are no checkpoint to resume from.
        saves = is_due and (is_last or not self.skipped_in_a_row)
        if self.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW or (saves and not self.engine.has_learned):
            self.checkpoints.finish()
            raise self._divergence()
        measurements: dict[str, float] = {}
        with log.pause():
            for evaluator in evaluators:
                measurements |= evaluator.measure(self._current_header())
        figures: dict[str, str] = {}
        if measurements or saves or step % train.log_every == 0:
            learning_rate = learning_rate_at(self.samples_seen - train.global_batch, train)
            figures = log.write(self.samples_seen, step, learning_rate, measurements)
        if step * train.ema_snapshots // train.num_steps > (step - 1) * train.ema_snapshots // train.num_steps:
            with log.pause():
                self._save_snapshots()
        if saves:
            with log.pause():
                self.checkpoints.start(self._current_header())
                log.plot(*self.distances)
        return figures

    def _divergence(self) -> DataError:
        newest, num_skipped = self.folder.newest(), self.engine.guard.num_skipped_in_a_row
        resumes = f"resume from {newest.name}" if newest else "start again, since there is no checkpoint yet"
        return DataError(
            f"training diverged at step {self.num_steps:,}: the gradient norms of the last {num_skipped} steps were not "
            f"finite or above {self.train.skip_above:g} times their running mean, and the steps were skipped; lower "
            "train.learning_rate, set train.gradient_clipping or check the latents with `lfm inspect`, and run the same "
            f"command to {resumes}"
        )

    def _current_header(self) -> WeightsHeader:
        return replace(self.header, samples_seen=self.samples_seen)

    def _save_snapshots(self) -> None:
        """Save the power-function averages in float16."""
        for width in self.train.ema_sigma_rel:
            weights = self.engine.average_weights(_power_average(width))
            if self.world.is_main:
                halves = {name: tensor.half() for name, tensor in weights.items()}
                path = self.folder.snapshot(self.samples_seen, width)
                weights_file.save_weights(str(path), halves, self._current_header())


def _guidance(evaluation: EvaluationConfig, model: TrainedModel, device: torch.device) -> Guidance:
    """Return the guidance of the images that are measured during training."""
    weak = None
    if evaluation.autoguidance is not None:
        weak = trained_model.load(evaluation.autoguidance, device=device)
    return model.guidance(evaluation.guidance_scale, autoguidance=weak)


def averages(train: TrainConfig) -> tuple[str, ...]:
    """Return the names of the averages that the engine of an experiment keeps."""
    return ("ema", *map(_power_average, train.ema_sigma_rel))


def learning_rate_at(samples_seen: int, train: TrainConfig) -> float:
    """Return the learning rate of the step that begins at `samples_seen`: a linear warmup, then constant or a cosine."""
    warmup, total = train.warmup_steps * train.global_batch, train.num_steps * train.global_batch
    end = samples_seen + train.global_batch  # so that the learning rate of the first step is not 0
    if end <= warmup:
        return train.learning_rate * end / warmup
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (samples_seen - warmup) / (total - warmup)))
    return train.learning_rate


def _power_average(width: float) -> str:
    """Return the name of the power-function average of a relative width."""
    return f"ema-{width:g}"
