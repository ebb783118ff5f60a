"""`lfm sample`: noise -> latents by a solver over the EMA weights -> images.

An image depends on its seed, its condition, the solver and the guidance alone, so every process makes its part by itself.
Each says in its metadata what it was made of: one that is there and was made of the same is kept, by the same command
again, and whoever finds all of them there writes the grid and the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lfm import storage
from lfm.world import World
from pipelines.common import image_files
from pipelines.common.progress import Progress
from pipelines.sampling import sample_record, trajectory_and_timing
from pipelines.sampling.sample_job import SampleConfig, SampleJob


@dataclass(frozen=True)
class SampleResult:
    """Where the images are, and what they cost; the grid is None while other ranks have images to finish."""

    plan: str
    grid: str | None = None
    mean_nfe: float = 0.0
    timing: str = ""


def run(config: SampleConfig, world: World) -> SampleResult:
    """Make this rank's part of an image per seed and guidance scale, and with the last of them a grid.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is computed.
        LfmError: nothing half-written is visible, and the same command continues.
    """
    job = SampleJob(config, world)
    if config.dry_run:
        return SampleResult(job.plan)
    job.claim(world)
    mine = job.images[world.slice_of(len(job.images))]
    todo = [image for image in mine if image.nfe is None]
    with Progress("sample", len(mine), "images", done=len(mine) - len(todo), quiet=not world.is_main) as bar:
        for batch in job.batches(todo):
            bar.advance(len(batch), nfe=f"{job.make(batch):.0f}")
    timing = ""
    if world.is_main:
        if config.trajectory:
            trajectory_and_timing.trajectory(job, config.trajectory)
        if config.time:
            timing = trajectory_and_timing.timing(job)
    job.look()
    nfe = [image.nfe for image in job.images if image.nfe is not None]
    if len(nfe) < len(job.images):
        return SampleResult(job.plan, timing=timing)
    grid = storage.join(config.out, sample_record.GRID)
    image_files.save(sample_record.grid(job), grid)
    storage.write_json(storage.join(config.out, sample_record.RECORD), sample_record.record(job, nfe))
    return SampleResult(job.plan, grid, float(np.mean(nfe)), timing)
