"""`lfm sample`: noise -> latents by a solver with the EMA weights -> images.

An image depends on its seed, condition, solver, guidance and precision alone, so each rank makes its part of the images
independently. The rank that finishes last writes the grid and the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lfm import storage
from lfm.world import World
from pipelines.common import factory, image_files
from pipelines.common.progress import Progress
from pipelines.common.sample_jobs.sample_job import load_job
from pipelines.common.sample_jobs.sample_options import SampleConfig
from pipelines.common.sample_jobs.sample_plan import make_plan
from pipelines.sampling import sample_record, trajectory_and_timing
from pipelines.sampling.sample_folder import claim_folder, finished_images, save_images


@dataclass(frozen=True)
class SampleResult:
    """The result of one rank."""

    plan: str  # one line that describes the job
    grid: str | None = None  # path of the grid; None while other ranks have images to finish
    mean_nfe: float = 0.0  # network evaluations per image
    timing: str = ""  # measured with `time`


def run(config: SampleConfig, world: World) -> SampleResult:
    """Make this rank's part of the images: one per seed and guidance scale; with the last image, the grid.

    Running it again resumes: finished images are kept.

    Raises:
        ConfigError, CheckpointError, DataError: an option, run or file does not fit; nothing has been computed.
        LfmError: the solver failed; no half-written file is visible.
    """
    plan = make_plan(config)
    job = load_job(plan, factory.device(world))
    if config.dry_run:
        return SampleResult(str(job))
    claim_folder(job, world)
    finished = finished_images(job, plan.images)
    own = plan.images[world.slice_of(len(plan.images))]
    todo = [image for image in own if image.file not in finished]
    with Progress("sample", len(own), "images", done=len(own) - len(todo), quiet=not world.is_main) as progress:
        for batch in plan.batches(todo):
            pixels, nfe = job.make(batch)
            save_images(job, batch, pixels, nfe)
            progress.advance(len(batch), nfe=f"{np.mean(nfe):.0f}")
    timing = ""
    if world.is_main:
        if config.trajectory:
            trajectory_and_timing.save_trajectory(job, config.trajectory)
        if config.time:
            timing = trajectory_and_timing.measure_time(job)
    finished |= finished_images(job, [image for image in plan.images if image.file not in finished])
    if len(finished) < len(plan.images):
        return SampleResult(str(job), timing=timing)
    grid = storage.join(config.out, sample_record.GRID)
    image_files.save(sample_record.draw_grid(job), grid)
    storage.write_json(storage.join(config.out, sample_record.RECORD), sample_record.make_record(job, finished))
    return SampleResult(str(job), grid, float(np.mean(list(finished.values()))), timing)
