"""`lfm evaluate RUN --bound RAW`: the paper's bound on the distance between generated and held-out images.

All computations are in float32: the Jacobians come from difference quotients, which bfloat16 cannot resolve.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from lfm import storage
from lfm.autoencoder import to_unit_range
from lfm.data.evaluation_images import ImageSet, open_images
from lfm.data.random_draws import draw, draw_noise
from lfm.errors import ConfigError
from lfm.flow.path import SIGMA_MIN, path_sample
from lfm.inference import trained_model
from lfm.inference.trained_model import TrainedModel
from lfm.metrics.bound import Bound, Estimate, estimate, steepness
from lfm.types import Condition, RawSample
from lfm.world import World
from pipelines.common import factory
from pipelines.common.progress import Progress
from pipelines.common.provenance import code_version
from pipelines.evaluation.candidates import check_conditions, conditions_of_samples
from pipelines.evaluation.evaluation_options import BoundConfig
from pipelines.evaluation.feature_files import Block, batched, concatenate, stack_images

REPORT = "bound.json"
NUM_PARTS = 10  # equal parts of [0, 1], for each of which error and Lipschitz constant of the velocity are estimated


@dataclass(frozen=True)
class BoundResult:
    """The bound and a table of its terms; None and empty after a dry run."""

    plan: str
    bound: Bound | None
    table: str


def run(config: BoundConfig, world: World) -> BoundResult:
    """Estimate the terms on the first `num` images, and write bound.json.

    Raises:
        ConfigError, DataError: If there are too few images, or they have another size or lack a condition of the model.
    """
    model = trained_model.load(
        config.run, autoencoder=config.autoencoder, device=factory.device(world), precision="fp32"
    )
    header = model.header
    real = open_images(config.raw, factory.cache(config.cache))
    check_conditions(model, real, "bound")
    num = min(config.num, sum(real.blocks))
    if num < 2 * NUM_PARTS:
        raise ConfigError(f"{config.raw}: {num} images; the bound needs at least {2 * NUM_PARTS}")
    plan = f"{num:,} images of {config.raw}, Jacobians at {min(config.num_steep, num)} -> {config.out}/{REPORT}"
    if config.dry_run:
        return BoundResult(plan, None, "")
    bound = _estimate(config, model, real, num)
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


def _estimate(config: BoundConfig, model: TrainedModel, real: ImageSet, num: int) -> Bound:
    samples = islice(chain.from_iterable(map(real.read, range(len(real.blocks)))), num)

    def measure() -> Iterator[Block]:
        first = 0
        for batch in batched(samples, config.batch_size):
            yield _measure(model, batch, config.seed, first, num_steep=max(0, config.num_steep - first))
            first += len(batch)

    with Progress("bound", num, "images") as progress:
        columns = concatenate(measure(), progress)
    return estimate(
        columns["reconstruction"],
        columns["decoder"],
        [columns[f"error {part}"] for part in range(NUM_PARTS)],
        [columns[f"velocity {part}"] for part in range(NUM_PARTS)],
    )


def _measure(model: TrainedModel, batch: list[RawSample], seed: int, first: int, num_steep: int) -> Block:
    """Return the terms of a batch.

    Args:
        model: The trained model.
        batch: Images.
        seed: Seed of time and noise.
        first: Number of the first image, counted over all batches.
        num_steep: Number of images at which Jacobians are evaluated.

    Returns:
        `reconstruction` and `error PART`: squared errors of every image (B,). `decoder` and `velocity PART`: largest
        singular values of Jacobians at the first `num_steep` images.
    """
    header, autoencoder = model.header, model.autoencoder
    images = stack_images(batch).to(autoencoder.device)
    numbers = torch.arange(first, first + len(batch), device=images.device)
    uniform, (posterior_noise, noise) = draw(seed, numbers).uniform, draw_noise(seed, numbers, model.latent_shape)
    posterior = autoencoder.encode(images)
    latents = (posterior.mean + posterior.std * posterior_noise - autoencoder.shift) * autoencoder.scale_factor
    condition = conditions_of_samples(model, batch).condition(range(len(batch))).to(images.device)
    steep = torch.arange(min(num_steep, len(batch)))
    with torch.no_grad():
        terms = {"reconstruction": _squared_norm(autoencoder.pixels(latents) - to_unit_range(images))}
    if len(steep):
        terms["decoder"] = steepness(autoencoder.pixels, latents[steep])
    sigma_min = header.config.get("flow", {}).get("sigma_min", SIGMA_MIN)
    for part in range(NUM_PARTS):
        example = path_sample(latents, noise, (part + uniform) / NUM_PARTS, sigma_min)
        with torch.no_grad():
            predicted = model.network(example.state, example.time, condition)
        terms[f"error {part}"] = _squared_norm(predicted - example.velocity)
        if len(steep):
            velocity = functools.partial(
                _velocity, model.network, time=example.time[steep], condition=condition.rows(steep)
            )
            terms[f"velocity {part}"] = steepness(velocity, example.state[steep])
    return terms


def _velocity(network: torch.nn.Module, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
    return network(state, time, condition)


def table(bound: Bound, num_values: int) -> str:
    """Return a table of the terms; an image has `num_values` values (pixels times channels)."""

    def line(name: str, term: Estimate) -> str:
        return f"{name}: {term.value:.4g} +- {term.standard_error:.2g} ({term.kind})"

    lines = [line("reconstruction, R", bound.reconstruction), line("decoder's Lipschitz constant", bound.decoder)]
    for part, (error, velocity) in enumerate(zip(bound.error, bound.velocity, strict=True)):
        times = f"t from {part / NUM_PARTS:.1f} to {(part + 1) / NUM_PARTS:.1f}"
        lines.append(f"{times}: {line('error', error)}, {line('Lipschitz constant', velocity)}")
    for name, value in (("the paper's", bound.paper), ("by time", bound.by_time)):
        lines.append(f"bound, {name}: {value:.4g} ({value / math.sqrt(num_values):.3g} per value, whose range is 2)")
    return "\n".join(lines)


def _squared_norm(values: Tensor) -> Tensor:
    return values.float().square().flatten(1).sum(1)


def _finite(value: float) -> float | None:
    """Return None for infinity, which JSON cannot represent."""
    return value if math.isfinite(value) else None
