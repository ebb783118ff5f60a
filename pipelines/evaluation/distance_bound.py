"""`lfm evaluate RUN --bound RAW`: the paper's bound on the distance of what a run generates to held-back images."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from lfm import storage
from lfm.autoencoder import Autoencoder, to_unit_range
from lfm.data.image_sets import open_images
from lfm.data.random_draws import draw, draw_noise
from lfm.errors import ConfigError
from lfm.flow.null_condition import class_condition
from lfm.flow.path import SIGMA_MIN, path_sample
from lfm.inference import trained_model
from lfm.metrics.bound import Bound, Estimate, estimate, steepness
from lfm.types import Condition, RawSample
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.progress import Progress
from pipelines.common.provenance import code_version
from pipelines.evaluation import feature_files
from pipelines.evaluation.evaluation_options import BoundConfig

REPORT = "bound.json"
PARTS = 10  # of [0, 1], in each of which the velocity is looked at


@dataclass(frozen=True)
class BoundResult:
    """The terms; None after a dry run."""

    plan: str
    bound: Bound | None
    table: str


def run(config: BoundConfig, world: World) -> BoundResult:
    """Estimate the terms on the first `num` images, and write them into bound.json.

    Raises:
        ConfigError: the images are of another size or without the classes that the model takes.
    """
    found = trained_model.load(config.run, autoencoder=config.autoencoder, device=factory.device(world))
    model, header, autoencoder = found.network, found.header, found.autoencoder
    real = open_images(config.raw, factory.cache(config.cache))
    if real.image_size != header.image_size:
        raise ConfigError(
            f"--bound {config.raw}: images of {real.image_size} pixels, {config.run} has {header.image_size}"
        )
    num = min(config.num, sum(real.blocks))
    if num < 2 * PARTS:
        raise ConfigError(f"--bound {config.raw}: {num} images; {2 * PARTS} are the least")
    plan = f"{num:,} images of {config.raw}, Jacobians at {min(config.num_steep, num)} -> {config.out}/{REPORT}"
    if config.dry_run:
        return BoundResult(plan, None, "")
    measured: dict[str, list[Tensor]] = {}
    samples = islice(chain.from_iterable(map(real.read, range(len(real.blocks)))), num)
    terms = Terms(model, header, autoencoder, config.seed)
    with Progress("bound", num, "images") as bar:
        for number, batch in enumerate(feature_files.batched(samples, config.batch_size)):
            start = number * config.batch_size
            for name, values in terms.of(batch, start, max(0, config.num_steep - start)).items():
                measured.setdefault(name, []).append(values.cpu())
            bar.advance(len(batch))
    joined = {name: torch.cat(values) for name, values in measured.items()}
    bound = estimate(
        joined["reconstruction"],
        joined["decoder"],
        [joined[f"error {part}"] for part in range(PARTS)],
        [joined[f"velocity {part}"] for part in range(PARTS)],
    )
    report = {
        "settings": asdict(config) | {"num": num, "samples_seen": header.samples_seen, "data_digest": real.digest},
        "autoencoder": header.autoencoder.model_dump(),
        "trained_by": header.code_version,
        "measured_by": code_version(),
        "terms": asdict(bound),
        "bound": {"paper": _finite(bound.paper), "by_time": _finite(bound.by_time)},
    }
    storage.write_json(storage.join(config.out, REPORT), report)
    return BoundResult(plan, bound, table(bound, 3 * header.image_size**2))


@dataclass(frozen=True)
class Terms:
    """What the bound takes from images, a batch at a time."""

    model: torch.nn.Module
    header: WeightsHeader
    autoencoder: Autoencoder
    seed: int

    def of(self, batch: list[RawSample], start: int, num_steep: int) -> feature_files.Block:
        """Squared errors of every image (B,), and Jacobians at the first `num_steep`; `start` numbers the first."""
        shape = (self.header.model.latent_channels, *[self.header.model.latent_size] * 2)
        images = feature_files.as_batch(batch).to(self.autoencoder.device)
        numbers = torch.arange(start, start + len(batch), device=images.device)
        uniform, (drawn, noise) = draw(self.seed, numbers).uniform, draw_noise(self.seed, numbers, shape)
        posterior = self.autoencoder.encode(images)
        latents = (posterior.mean + posterior.std * drawn - self.autoencoder.shift) * self.autoencoder.scale_factor
        condition, few = self._condition(batch).to(images.device), torch.arange(min(num_steep, len(batch)))
        with torch.no_grad():
            found = {"reconstruction": _squares(self.autoencoder.pixels(latents) - to_unit_range(images))}
        if len(few):
            found["decoder"] = steepness(self.autoencoder.pixels, latents[few])
        sigma_min = self.header.config.get("flow", {}).get("sigma_min", SIGMA_MIN)
        for part in range(PARTS):
            example = path_sample(latents, noise, (part + uniform) / PARTS, sigma_min)
            with torch.no_grad():
                predicted = self.model(example.state, example.time, condition)
            found[f"error {part}"] = _squares(predicted - example.velocity)
            if len(few):
                told, time = condition.rows(few), example.time[few]
                field = functools.partial(self._velocity, time=time, condition=told)
                found[f"velocity {part}"] = steepness(field, example.state[few])
        return found

    def _velocity(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.model(state, time, condition)

    def _condition(self, batch: list[RawSample]) -> Condition:
        if self.header.model.num_classes is None:
            return Condition()
        classes = [sample.class_index for sample in batch if sample.class_index is not None]
        if len(classes) < len(batch):
            raise ConfigError("--bound: the model takes classes, the images have none; shard them from class folders")
        return class_condition(classes, self.header.model.num_classes)


def table(bound: Bound, values: int) -> str:
    """The terms for people; `values` are the pixels times colours of an image."""

    def line(name: str, found: Estimate) -> str:
        return f"{name}: {found.value:.4g} +- {found.standard_error:.2g} ({found.kind})"

    lines = [line("reconstruction, R", bound.reconstruction), line("decoder's Lipschitz constant", bound.decoder)]
    for part, (error, velocity) in enumerate(zip(bound.error, bound.velocity, strict=True)):
        place = f"t from {part / PARTS:.1f} to {(part + 1) / PARTS:.1f}"
        lines.append(f"{place}: {line('error', error)}, {line('Lipschitz constant', velocity)}")
    for name, value in (("the paper's", bound.paper), ("by time", bound.by_time)):
        lines.append(f"bound, {name}: {value:.4g} ({value / math.sqrt(values):.3g} a value, whose range is 2)")
    return "\n".join(lines)


def _squares(values: Tensor) -> Tensor:
    return values.float().square().flatten(1).sum(1)


def _finite(value: float) -> float | None:
    """None where it is infinite, which JSON cannot say."""
    return value if math.isfinite(value) else None
