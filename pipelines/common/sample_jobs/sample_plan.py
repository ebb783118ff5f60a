"""The plan of `lfm sample`: its options, parsed and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lfm.errors import ConfigError
from lfm.solvers import SOLVERS, Solving
from pipelines.common.number_lists import parse_indices, parse_numbers
from pipelines.common.sample_jobs.sample_options import SampleConfig

DEFAULT_NUM_IMAGES = 16


@dataclass(frozen=True)
class PlannedImage:
    """One image to make."""

    number: int  # position of its seed among all seeds: selects its class, mask or segmentation
    seed: int
    scale: float  # guidance scale
    file: str  # name in the output folder


@dataclass(frozen=True)
class SamplePlan:
    """The images to make, and the settings of solver and guidance.

    Attributes:
        config: the options, with `seeds` filled in.
        images: one per seed and guidance scale, seeds in the outer loop.
        solving: the solver and its options.
        interval: times between which guidance applies.
    """

    config: SampleConfig
    images: tuple[PlannedImage, ...]
    solving: Solving
    interval: tuple[float, float]

    @property
    def scales(self) -> list[float]:
        """The guidance scales, in the order of the option."""
        return list(dict.fromkeys(image.scale for image in self.images))

    @property
    def num_seeds(self) -> int:
        """The number of seeds."""
        return len(self.images) // len(self.scales)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a network for all images, a batch at a time; of an adaptive solver, their typical number.

        Images that exist already are counted, so that a job that resumes is computed as one that was not interrupted.
        """
        scales = [batch[0].scale for batch in self.batches(self.images)]
        return sum(self.solving.expected_evaluations * (1 if scale == 1 else 2) for scale in scales)

    def batches(self, images: Sequence[PlannedImage]) -> Iterator[list[PlannedImage]]:
        """Split images into batches of at most `batch_size`, each of one guidance scale."""
        size = self.config.batch_size
        for scale in self.scales:
            alike = [image for image in images if image.scale == scale]
            for first in range(0, len(alike), size):
                yield alike[first : first + size]


def make_plan(config: SampleConfig) -> SamplePlan:
    """Parse and check the options of `lfm sample`.

    Raises:
        ConfigError: an option is malformed, or contradicts another.
    """
    seeds = config.seeds
    if seeds is None:
        count = len(parse_indices("rows", config.rows)) if config.rows else DEFAULT_NUM_IMAGES
        seeds = f"0-{count - 1}"
    plan = SamplePlan(
        config=replace(config, seeds=seeds),
        images=plan_images(seeds, config.guidance_scale),
        solving=Solving(
            solver=config.solver,
            num_steps=config.num_steps,
            time_shift=config.time_shift,
            times=None if config.times is None else parse_numbers("times", config.times),
            atol=config.atol,
            rtol=config.rtol,
        ),
        interval=_parse_interval(config.guidance_interval),
    )
    if plan.scales == [1]:
        for option, value in (
            ("guidance_interval", config.guidance_interval),
            ("autoguidance", config.autoguidance),
            ("guidance", None if config.guidance == "null" else config.guidance),
        ):
            if value is not None:
                raise ConfigError(f"`{option}` {value}: has no effect at `guidance_scale` 1; choose another scale")
    if config.trajectory and not SOLVERS[config.solver].reports_steps:
        raise ConfigError(f"`trajectory`: {config.solver} does not show its steps; choose another `solver`")
    return plan


def plan_images(seeds: str, guidance_scale: str) -> tuple[PlannedImage, ...]:
    """Return the images of the options `seeds` and `guidance_scale`.

    Raises:
        ConfigError: an option is malformed or names a number twice.
    """
    scales = parse_numbers("guidance_scale", guidance_scale)
    labels = [f"{scale:g}" for scale in scales]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"`guidance_scale` {guidance_scale}: names a scale twice")
    return tuple(
        PlannedImage(number, seed, scale, f"{seed:06d}-{label}.png" if len(scales) > 1 else f"{seed:06d}.png")
        for number, seed in enumerate(parse_indices("seeds", seeds))
        for scale, label in zip(scales, labels, strict=True)
    )


def _parse_interval(text: str | None) -> tuple[float, float]:
    times = (0.0, 1.0) if text is None else parse_numbers("guidance_interval", text)
    if len(times) != 2 or not 0 <= times[0] < times[1] <= 1:
        raise ConfigError(f"`guidance_interval` {text}: must be two times between 0 and 1, as in 0.2,0.8")
    return times[0], times[1]
