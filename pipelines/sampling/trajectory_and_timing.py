"""What is seen of the solver at work: the way of some images from noise, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.data.random_draws import image_noise
from pipelines.common import image_files

if TYPE_CHECKING:
    from pipelines.sampling.sample_job import SampleJob

NUM_IMAGES, NUM_FRAMES = 6, 10
REPEATS = 3
TIMING = "timing.json"


class Frames:
    """A watch of a solver that keeps, for each of NUM_FRAMES times, the last state of each row that is not past it."""

    def __init__(self, noise: Tensor) -> None:
        self.times = torch.linspace(1, 0, NUM_FRAMES, dtype=torch.float64).tolist()
        self.states = noise[None].repeat(NUM_FRAMES, *[1] * noise.ndim)  # (frames, B, C, h, w)

    def __call__(self, at: Tensor, state: Tensor, rows: Tensor) -> None:
        for number, wanted in enumerate(self.times):
            early = at >= wanted - 1e-9
            self.states[number, rows[early]] = state[early]


def trajectory(job: SampleJob, kind: str) -> None:
    """Write the first images' way from noise: a row of a PNG for each, or a film of all."""
    batch = next(job.batches(job.images))[:NUM_IMAGES]
    seeds, model = [image.seed for image in batch], job.model
    frames = Frames(torch.from_numpy(image_noise(seeds, model.latent_shape)).to(model.device))
    condition = job.conditions.condition([image.number for image in batch])
    model.solve(seeds, condition, job.solving, job.guidance[batch[0].scale], on_step=frames)
    images = np.stack([model.decode(states) for states in frames.states])  # (frames, B, H, W, 3)
    enlarge = max(1, 64 // model.header.image_size)
    path = storage.join(job.config.out, f"trajectory.{kind}")
    if kind == "png":
        strip = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
        image_files.save(image_files.grid(strip, columns=NUM_FRAMES, enlarge=enlarge), path)
    else:
        image_files.save_film([image_files.grid(frame, columns=len(batch), enlarge=enlarge) for frame in images], path)


def timing(job: SampleJob) -> str:
    """Measure solver and decoder apart, after a warm-up, for one image and for a batch; writes and says it."""
    found, lines = {}, []
    sizes = {1, min(job.config.batch_size, len(job.images))}
    for size in sorted(sizes):
        batch = next(job.batches(job.images))[:size]
        condition = job.conditions.condition([image.number for image in batch])
        seeds, guidance = [image.seed for image in batch], job.guidance[batch[0].scale]
        latents = torch.from_numpy(image_noise(seeds, job.model.latent_shape)).to(job.model.device)
        steps: dict[str, Callable[[], object]] = {
            "solver": partial(job.model.solve, seeds, condition, job.solving, guidance),
            "decoder": partial(job.model.decode, latents),
        }
        for part, step in steps.items():
            seconds = _median_seconds(step, job.model.device)
            found[f"{part}, batch {len(batch)}"] = {"seconds": seconds, "images_per_second": len(batch) / seconds}
            lines.append(f"{part}, batch {len(batch)}: {seconds:.3g} s, {len(batch) / seconds:.3g} images/s")
    storage.write_json(storage.join(job.config.out, TIMING), {"device": str(job.model.device), **found})
    return "; ".join(lines)


def _median_seconds(step: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + REPEATS):  # the first is the warm-up
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))
