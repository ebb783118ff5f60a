"""The intermediate states of the first images, and the time that solver and decoder take."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.data.random_draws import image_noise
from pipelines.common import image_files
from pipelines.sampling.sample_job import SampleJob

NUM_IMAGES, NUM_FRAMES = 6, 10
NUM_REPEATS = 3
MIN_CELL_PIXELS = 64  # smaller images are enlarged
TIMING = "timing.json"


class FrameRecorder:
    """A step callback that records the states (B, C, h, w) of NUM_FRAMES equidistant times from 1 to 0.

    The state of a frame is the last one that the solver reached at or before its time.
    """

    def __init__(self, noise: Tensor) -> None:
        self.times = torch.linspace(1, 0, NUM_FRAMES, dtype=torch.float64).tolist()
        self.states = noise.expand(NUM_FRAMES, *noise.shape).clone()  # (frames, B, C, h, w)

    def __call__(self, at: Tensor, state: Tensor, rows: Tensor) -> None:
        for frame, frame_time in enumerate(self.times):
            reached = at >= frame_time - 1e-9
            self.states[frame, rows[reached]] = state[reached]


def save_trajectory(job: SampleJob, kind: str) -> None:
    """Write the way of the first images from noise: as a PNG with a row per image, or as an animated GIF."""
    batch, model = next(job.plan.batches(job.plan.images))[:NUM_IMAGES], job.model
    noise = image_noise([image.seed for image in batch], model.latent_shape)
    recorder = FrameRecorder(torch.from_numpy(noise).to(model.device))
    batch_size = job.plan.config.batch_size
    job.solve(batch, recorder, batch_size)
    frames = np.stack([model.decode(states, batch_size) for states in recorder.states])  # (frames, B, H, W, 3)
    enlarge = max(1, MIN_CELL_PIXELS // model.header.image_size)
    path = storage.join(job.plan.config.out, f"trajectory.{kind}")
    if kind == "png":
        images = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
        image_files.save(image_files.grid(images, columns=NUM_FRAMES, enlarge=enlarge), path)
    else:
        sheets = [image_files.grid(images, columns=len(batch), enlarge=enlarge) for images in frames]
        image_files.save_animation(sheets, path)


def measure_time(job: SampleJob) -> str:
    """Measure the solver and the decoder, for one image and for a batch; write and return the times."""
    device, num_images = job.model.device, min(job.plan.config.batch_size, len(job.plan.images))
    results: dict[str, dict[str, float]] = {}
    for size in sorted({1, num_images}):
        batch = next(job.plan.batches(job.plan.images))[:size]
        latents = torch.from_numpy(image_noise([image.seed for image in batch], job.model.latent_shape)).to(device)
        parts: dict[str, Callable[[], object]] = {
            "solver": partial(job.solve, batch),
            "decoder": partial(job.model.decode, latents),
        }
        for part, step in parts.items():
            seconds = _median_seconds(step, device)
            results[f"{part}, batch {len(batch)}"] = {"seconds": seconds, "images_per_second": len(batch) / seconds}
    storage.write_json(storage.join(job.plan.config.out, TIMING), {"device": str(device), **results})
    return "; ".join(
        f"{name}: {result['seconds']:.3g} s, {result['images_per_second']:.3g} images/s"
        for name, result in results.items()
    )


def _median_seconds(step: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + NUM_REPEATS):  # the first warms up
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))
