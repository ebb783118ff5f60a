"""The models and conditions of a sample plan, and the images that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.errors import ConfigError
from lfm.flow.guidance import Guidance
from lfm.inference import trained_model
from lfm.inference.condition_inputs import Conditions
from lfm.inference.trained_model import TrainedModel
from lfm.solvers.batching import StepCallback, no_callback
from lfm.types import SolverResult
from pipelines.common import factory
from pipelines.common.sample_jobs.read_conditions import read_conditions
from pipelines.common.sample_jobs.sample_plan import PlannedImage, SamplePlan

EVALUATIONS_THAT_PAY = 200  # of the network, for compiling its blocks
# Options that change no image: they are not part of the recipe.
NO_EFFECT = (
    "out",
    "batch_size",
    "compile",
    "trajectory",
    "time",
    "autoencoder",
    "cache",
    "overwrite",
    "dry_run",
    "num_gpus",
)
# Options of later versions: without their key, a recipe means these values.
ADDED_OPTIONS = {"precision": "fp32", "guidance": "null"}
# Options that are distributed over the images: the digest of an image has its own part of each instead.
PER_IMAGE = ("seeds", "class_index", "image", "mask", "segmentation", "crop", "shards", "rows", "guidance_scale")


@dataclass(frozen=True)
class SampleJob:
    """A sample plan with the models and conditions that it needs.

    Attributes:
        plan: the images to make.
        model: the model of the run.
        weak: the weaker model of autoguidance, if any.
        conditions: cycled over the seeds.
        condition_names: file or shard row of each mask or segmentation; empty if there are none.
    """

    plan: SamplePlan
    model: TrainedModel
    weak: TrainedModel | None
    conditions: Conditions
    condition_names: list[str]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that decides the images of the folder, as JSON values."""
        settings = asdict(self.plan.config) | {"precision": self.model.precision}
        settings = {
            key: value
            for key, value in settings.items()
            if key not in NO_EFFECT and (key not in ADDED_OPTIONS or value != ADDED_OPTIONS[key])
        }
        weights = {"samples_seen": self.model.header.samples_seen, "data": self.model.header.manifest_digest}
        if self.weak:
            weights["autoguidance_samples_seen"] = self.weak.header.samples_seen
        return storage.as_stored({"kind": "samples", **settings, **weights})

    def digest(self, image: PlannedImage) -> str:
        """Hash all that decides one image, and nothing else."""
        settings = {key: value for key, value in self.recipe.items() if key not in PER_IMAGE}
        inputs = self.conditions
        condition = [
            None if values is None else np.asarray(values[image.number % len(values)]).tobytes().hex()
            for values in (inputs.class_index, inputs.spatial, inputs.segmentation, inputs.images, inputs.masks)
        ]
        return manifests.digest([settings, image.seed, image.scale, condition])

    def guidance(self, scale: float) -> Guidance:
        """Return the guidance of the images of one scale."""
        way = self.plan.config.guidance
        return self.model.guidance(scale, self.plan.interval, self.weak, way == "internal", way == "sparse")

    @property
    def composites(self) -> bool:
        """Whether the known pixels of inpainting replace those of the result."""
        return self.conditions.masks is not None and self.plan.config.composite

    def solve(
        self, images: Sequence[PlannedImage], on_step: StepCallback = no_callback, batch_size: int | None = None
    ) -> SolverResult:
        """Compute the latents of images of one guidance scale; see `TrainedModel.solve` for the other arguments."""
        seeds = [image.seed for image in images]
        condition = self.conditions.condition([image.number for image in images])
        guidance = self.guidance(images[0].scale)
        return self.model.solve(seeds, condition, self.plan.solving, guidance, on_step, batch_size)

    def make(self, images: Sequence[PlannedImage], on_step: StepCallback = no_callback) -> tuple[np.ndarray, list[int]]:
        """Make images of one guidance scale; `on_step` is called after each step of the solver.

        Returns:
            pixels: uint8 (B, H, W, 3).
            nfe: network evaluations of each image.
        """
        batch_size = self.plan.config.batch_size
        result = self.solve(images, on_step, batch_size)
        pixels = self.model.decode(result.latents, batch_size)
        if self.composites:
            pixels = self.conditions.composite([image.number for image in images], pixels)
        return pixels, result.nfe.tolist()

    def __str__(self) -> str:
        config, size = self.plan.config, self.model.header.image_size
        return (
            f"{len(self.plan.images)} images of {size} x {size} pixels from {config.run} "
            f"({self.model.header.samples_seen:,} samples seen), {self.plan.solving}, {self.model.precision}, "
            f"guidance {config.guidance_scale} -> {config.out}"
        )


def load_job(
    plan: SamplePlan, device: torch.device, load_model: Callable[..., TrainedModel] = trained_model.load
) -> SampleJob:
    """Load the models and conditions of a plan.

    Args:
        plan: the images to make.
        device: where to compute.
        load_model: loads a run with the keyword arguments of `lfm.load`; a caller that makes many jobs passes one that
            keeps models.

    Raises:
        ConfigError, CheckpointError, DataError: an option, run or file does not fit.
    """
    config, weak = plan.config, None
    load = partial(load_model, autoencoder=config.autoencoder, device=device)
    model = load(config.run, precision=config.precision)
    if config.autoguidance:
        weak = load(config.autoguidance, precision=model.precision)
    if config.compile and plan.num_evaluations >= EVALUATIONS_THAT_PAY and factory.can_compile_on_gpu():
        for each in (model, weak):
            if each:
                each.compile_blocks()
    conditions, names = read_conditions(config, model, plan.num_seeds)
    if not config.composite and conditions.spatial is None:
        raise ConfigError("--no-composite: there are no known pixels; leave it out")
    job = SampleJob(plan, model, weak, conditions, names)
    for scale in plan.scales:  # raises now rather than after the first batch
        model.velocity(conditions.condition([0]).to(device), 1, job.guidance(scale))
    return job
