"""What a training will take, told by `--dry-run`: memory of a rank, disk space and hours.

Memory and disk space follow from the shapes of the tensors. The hours need a rate: a given one, or that of the run so far, if
it is resumed on as many ranks, or that of some passes of the network on this device (`measured_rate`):

    seconds of a step = passes * seconds of a forward and a backward pass + seconds of an update of T / N parameters
                        + on a CPU, EXCHANGE_SECONDS * bytes of the weights * 2 (N - 1) / N

Communication between GPUs, measurements during the training and the time of checkpoints are not counted in it.
"""

from __future__ import annotations

import heapq
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm import adapters, storage
from lfm.data.stream.mixture import Mixture
from lfm.models import registry
from lfm.models.config import ModelConfig
from lfm.models.network import VelocityNetwork
from lfm.precision import float32_arithmetic, weights_dtype
from lfm.training.engine import BYTES_PER_PARAMETER
from lfm.training.loss_terms import TrainingLoss
from lfm.training.memory_forecast import RankMemory, TrainedNetwork, activation_bytes, example_batch, rank_memory
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment.config_schema import ExperimentConfig
from pipelines.common.forecasts import free_bytes, gigabytes, kept_by_malloc, listed, median_seconds
from pipelines.training.training_log import LOG, matmul_rate

# Measured on a CPU: the peak of a process that trains a network of 30,000 parameters.
PROCESS_BYTES = 508_000_000
# By ZeRO stage: what gradients and weights cost that the ranks of one machine exchange over gloo, for each byte of the weights;
# measured with two ranks on two cores of an AMD EPYC. It is a part of a step that matters for small batches only.
EXCHANGE_SECONDS = {1: 2.4e-9, 2: 2.4e-9, 3: 7.4e-9}
LOG_LINES = 100  # of a run whose rate is taken
PASS_SECONDS = 1.0
MOST_UPDATED = 2**22  # parameters that are updated to measure it
CHECKPOINTING = "activation_checkpointing"  # field of the configuration of a network that can recompute its activations


@dataclass(frozen=True)
class PlannedTraining:
    """A training that is about to begin.

    Args:
        config: the experiment, with its precision.
        settings: DeepSpeed's configuration.
        mixture: the latents.
        network: the network, with frozen parameters if a part is trained.
        num_averages: number of averages of the weights.
        num_ranks: number of ranks.
        on_gpu: whether the ranks compute on GPUs.
    """

    config: ExperimentConfig
    settings: Mapping[str, Any]
    mixture: Mixture
    network: VelocityNetwork
    num_averages: int
    num_ranks: int
    on_gpu: bool

    @property
    def num_trained(self) -> int:
        """Number of parameters that are not frozen."""
        return sum(value.numel() for value in self.network.parameters() if value.requires_grad)


def memory(training: PlannedTraining, activations: int | None = None) -> RankMemory:
    """Return the memory of the largest rank by part.

    Args:
        training: the training.
        activations: bytes of the activations; by default computed.
    """
    config, network = training.config, training.network
    matrices = network.hidden_matrices() if config.train.optimizer == "muon" else {}
    parameters = dict(network.named_parameters())
    trained = TrainedNetwork(
        num_parameters=network.num_parameters,
        num_trained=training.num_trained,
        num_averages=training.num_averages,
        dtype=weights_dtype(config.train.precision or "fp32"),
        num_with_momentum=sum(parameters[name].numel() for name in matrices),
    )
    if activations is None:
        activations = activations_of(training, network.config)
    parts = rank_memory(trained, training.settings, training.num_ranks, activations, on_gpu=training.on_gpu)
    if training.on_gpu:
        return parts
    process = {"process": PROCESS_BYTES, "latents": _window_bytes(training)}
    return replace(parts, device=process | parts.device | kept_by_malloc(activations))


def activations_of(training: PlannedTraining, model: ModelConfig) -> int:
    """Return the bytes of the activations of a network of another configuration in this training."""
    config = training.config

    def build() -> VelocityNetwork:
        network = registry.build_network(model)
        if "all" not in config.train.trainable:
            adapters.add_adapters(network, config.train.trainable, config.train.adapter_rank)
            adapters.freeze_others(network, config.train.trainable)
        return network

    dtype = weights_dtype(config.train.precision or "fp32")
    micro_batch = factory.micro_batch(config, World(size=training.num_ranks))
    return activation_bytes(build, model, factory.training_loss(config, model), micro_batch, dtype)


def _window_bytes(training: PlannedTraining) -> int:
    """Return the bytes of the latents that the stream maps: two windows of the largest shards of each source."""
    num_open = 2 * training.config.data.window
    return sum(
        sum(heapq.nlargest(num_open, (shard.bytes for shard in source.manifest.shards)))
        for source in training.mixture.sources
    )


def checkpoint_bytes(num_trained: int, num_averages: int) -> int:
    """Return the size of a checkpoint: masters, moments and averages, and the weights once more."""
    return (BYTES_PER_PARAMETER + 4 * num_averages + 4) * num_trained


def disk(training: PlannedTraining) -> dict[str, int]:
    """Return the bytes of the run folder at the end by part; one more checkpoint exists while it is written."""
    train, evaluation = training.config.train, training.config.evaluation
    num_checkpoints = min(train.keep_checkpoints, -(-train.num_steps // train.checkpoint_every))
    num_snapshots = len(train.ema_sigma_rel) * min(train.ema_snapshots, train.num_steps)
    return {
        "checkpoints": num_checkpoints * checkpoint_bytes(training.num_trained, training.num_averages),
        "weights": 4 * training.num_trained,
        "best weights": 4 * training.num_trained if evaluation and evaluation.reference else 0,
        "snapshots": 2 * num_snapshots * training.num_trained,  # in float16
    }


def describe_disk(training: PlannedTraining, folder: Path) -> list[str]:
    """Return the disk space of the run folder, and of the copies of remote latents, in lines."""
    one = checkpoint_bytes(training.num_trained, training.num_averages)
    lines = [
        f"disk of the run, forecast: {listed(disk(training))}, and {gigabytes(one)} while a checkpoint is written; "
        f"{gigabytes(free_bytes(folder))} are free"
    ]
    copied = sum(
        shard.bytes
        for source in training.mixture.sources
        if not storage.is_local(source.folder)
        for shard in source.manifest.shards
    )
    if copied:
        limit = training.config.data.cache_gigabytes
        lines.append(f"disk of the cache: {gigabytes(min(copied, limit * 1e9 if limit else copied))} of latents")
    return [f"  {line}" for line in lines]


def logged_rate(folder: Path) -> float | None:
    """Return the samples per second of the last lines of a run's log, pauses included; None if there are none."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:] if path.exists() else []
    rates = []
    for line in lines:
        try:
            rates.append(float(json.loads(line)["goodput"]))
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut off
    return statistics.harmonic_mean(rates) if rates and min(rates) > 0 else None


def measured_rate(
    training: PlannedTraining, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the samples per second over all ranks, from passes and updates of the network on this device.

    The network is moved to the device and to the precision of the training. On a CPU each rank has its part of the cores.

    Args:
        training: the training.
        device: device of one rank.
        clock: returns the seconds.
    """
    train, num_ranks = training.config.train, training.num_ranks
    precision = train.precision or "fp32"
    network = training.network.to(device, weights_dtype(precision))
    loss = factory.training_loss(training.config, network.config)
    micro_batch = factory.micro_batch(training.config, World(size=num_ranks))
    with _threads_of_a_rank(device, num_ranks), float32_arithmetic(precision, device):
        num_samples = min(micro_batch, _samples_per_pass(network, device))
        a_pass = _seconds_of_pass(network, loss, num_samples, device, clock)
        update = _seconds_of_update(-(-training.num_trained // num_ranks), training.num_averages, device, clock)
    exchange = 0.0
    if device.type == "cpu":
        num_bytes = network.num_parameters * weights_dtype(precision).itemsize * 2 * (num_ranks - 1) / num_ranks
        exchange = EXCHANGE_SECONDS[training.settings["zero_optimization"]["stage"]] * num_bytes
    samples_per_rank = train.global_batch // num_ranks
    return train.global_batch / (a_pass / num_samples * samples_per_rank + update + exchange)


def _samples_per_pass(network: VelocityNetwork, device: torch.device) -> int:
    """Return how many samples pass forwards and backwards in about `PASS_SECONDS` at the rate of matrix products."""
    flops = network.config.flops_per_sample
    if not flops:
        return 1
    return max(1, int(PASS_SECONDS * matmul_rate(device, next(network.parameters()).dtype) / (3 * flops)))


def _seconds_of_pass(
    network: VelocityNetwork, loss: TrainingLoss, num_samples: int, device: torch.device, clock: Callable[[], float]
) -> float:
    """Return the median time of a forward and a backward pass."""
    batch = example_batch(network.config, num_samples, device)

    def take_pass() -> None:
        loss(network, batch, batch.uniform)[0].backward()
        for parameter in network.parameters():
            parameter.grad = None

    return median_seconds(take_pass, device, clock)


def _seconds_of_update(size: int, num_averages: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the time in which one rank updates masters, moments and averages of `size` parameters."""
    part = min(size, MOST_UPDATED)
    master = torch.zeros(part, device=device, requires_grad=True)
    averages = [torch.zeros_like(master) for _ in range(num_averages)]
    gradient: Tensor = torch.full_like(master, 0.1)
    optimizer = torch.optim.AdamW([master], fused=True)

    @torch.no_grad()
    def update() -> None:
        copy = gradient.clone()  # into the bucket, and out of it
        master.grad = copy.clone().mul_(1 / copy.norm())
        optimizer.step()
        for average in averages:
            average.lerp_(master, 0.1)

    return median_seconds(update, device, clock) * size / part


@contextmanager
def _threads_of_a_rank(device: torch.device, num_ranks: int) -> Iterator[None]:
    """Compute with as many threads as the launcher gives to one of several ranks on this machine's CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_hours(training: PlannedTraining, samples_seen: int, rate: float, origin: str) -> str:
    """Return the hours of the steps that remain in a line.

    Args:
        training: the training.
        samples_seen: number of samples at which it starts or resumes.
        rate: samples per second over all ranks.
        origin: of the rate, in words.
    """
    train = training.config.train
    num_samples = train.num_steps * train.global_batch - samples_seen
    hours = num_samples / rate / 3600
    return f"  time, forecast: {hours:,.3g} h for {num_samples:,} samples at {rate:,.3g} samples/s ({origin})"


def describe_memory(training: PlannedTraining) -> list[str]:
    """Return the memory of the largest rank in lines, with and without activation checkpointing."""
    model = training.network.config
    activations = activations_of(training, model)
    parts = memory(training, activations)
    place = "GPU memory" if training.on_gpu else "memory"
    rank = "the rank" if training.num_ranks == 1 else f"the largest of {training.num_ranks} ranks"
    lines = [f"{place} of {rank}, forecast: {listed(parts.device)}"]
    if parts.host:
        lines.append(f"memory of its process beside libraries and latents: {listed(parts.host)}")
    if any(field.name == CHECKPOINTING for field in fields(model)):
        used = getattr(model, CHECKPOINTING)
        changes: dict[str, Any] = {CHECKPOINTING: 0 if used else 1}
        other = activations_of(training, replace(model, **changes))
        lines.append(
            f"activations: {gigabytes(activations)} as configured, {gigabytes(other)} with model.{CHECKPOINTING} "
            f"{0 if used else 1}"
        )
    return [f"  {line}" for line in lines]
