"""The intermediate states of the first images, and the time that solver and decoder take."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from lfm import storage
from lfm.data.random_draws import image_noise
from pipelines.common import image_files
from pipelines.common.sample_jobs.sample_job import SampleJob
from pipelines.common.sample_jobs.trajectory_frames import (
    NUM_FRAMES,
    NUM_IMAGES,
    decode_frames,
    enlargement,
    record_frames,
)

NUM_REPEATS = 3
TIMING = "timing.json"


def save_trajectory(job: SampleJob, kind: str) -> None:
    """Write the way of the first images from noise: as a PNG with a row per image, or as an animated GIF."""
    batch, batch_size = next(job.plan.batches(job.plan.images))[:NUM_IMAGES], job.plan.config.batch_size
    recorder = record_frames(job.model, batch)
    job.solve(batch, recorder, batch_size)
    frames, enlarge = decode_frames(job.model, recorder, batch_size), enlargement(job.model)  # (frames, B, H, W, 3)
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
