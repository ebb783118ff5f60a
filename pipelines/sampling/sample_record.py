"""The grid of all samples, and the JSON record of how they were made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data.masks import hide
from lfm.inference.condition_inputs import Conditions
from pipelines.common import image_files
from pipelines.common.provenance import code_version
from pipelines.common.sample_jobs.sample_job import SampleJob
from pipelines.common.sample_jobs.sample_plan import PlannedImage

GRID, RECORD = "grid.png", "samples.json"
MAX_GRID_IMAGES, MAX_GRID_COLUMNS = 1024, 20
MIN_CELL_PIXELS = 128  # smaller images are enlarged


def draw_grid(job: SampleJob) -> Image.Image:
    """Draw the images, with a column for each guidance scale, else for each mask, segmentation or class.

    Masked images and segmentations are shown above the images made from them.
    """
    size, columns = job.model.header.image_size, _num_columns(job)
    images = []
    for planned in job.plan.images[:MAX_GRID_IMAGES]:
        with storage.open_read(storage.join(job.plan.config.out, planned.file)) as file, Image.open(file) as image:
            images.append(np.asarray(image))
    inputs = _draw_inputs(job.conditions)
    if len(job.plan.scales) == 1 and len(inputs) in (1, columns):
        columns = columns or math.ceil(math.sqrt(len(images)))
        blank = np.full((size, size, 3), 255, np.uint8)
        images = [*inputs, *[blank] * (columns - len(inputs)), *images]
    return image_files.grid(np.stack(images), columns=columns, enlarge=max(1, MIN_CELL_PIXELS // size))


def _num_columns(job: SampleJob) -> int | None:
    """Return the number of columns of the grid; None for a nearly square grid."""
    inputs = job.conditions
    count = len(job.plan.scales)
    if count == 1:
        parts = (inputs.spatial, inputs.segmentation, inputs.class_index)
        count = next((len(part) for part in parts if part is not None), 1)
    return count if 1 < count <= MAX_GRID_COLUMNS else None


def _draw_inputs(conditions: Conditions) -> np.ndarray:
    """Draw masked images or segmentations, uint8 (N, H, W, 3); N is 0 if there are neither."""
    if conditions.images is not None and conditions.masks is not None:
        return hide(conditions.images, conditions.masks)
    if conditions.segmentation is not None:
        return np.stack([image_files.colours(ids).round().astype(np.uint8) for ids in conditions.segmentation])
    return np.zeros((0, 1, 1, 3), np.uint8)


def make_record(job: SampleJob, finished: dict[str, int]) -> dict[str, Any]:
    """Return the record of all that made the images, as JSON values.

    Args:
        job: the job, all images of which are finished.
        finished: number of network evaluations by file name.
    """
    header, nfe = job.model.header, list(finished.values())
    known_pixels = None
    if job.conditions.spatial is not None:
        known_pixels = "put back" if job.composites else "as the model made them"
    return {
        "settings": job.recipe,
        "precision": job.model.precision,
        "files": [*(image.file for image in job.plan.images), GRID],
        "nfe": {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)},
        "known_pixels": known_pixels,
        "autoencoder": header.autoencoder.model_dump(),
        "trained_by": header.code_version,
        "sampled_by": code_version(),
        "pictures": [_image_record(job, image, finished[image.file]) for image in job.plan.images],
    }


def _image_record(job: SampleJob, image: PlannedImage, nfe: int) -> dict[str, Any]:
    classes, names = job.conditions.class_index, job.condition_names
    index = None if classes is None else int(classes[image.number % len(classes)])
    return {
        "file": image.file,
        "seed": image.seed,
        "class_index": index,
        "class_name": None if index is None else job.model.header.classes[index].name,
        "condition": names[image.number % len(names)] if names else None,
        "guidance_scale": image.scale,
        "nfe": nfe,
    }
