"""What stands beside samples: a grid of them, and a record of all that made them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lfm import storage
from lfm.data.masks import hide
from lfm.inference.condition_inputs import Conditions
from pipelines.common import factory, image_files

if TYPE_CHECKING:
    from pipelines.sampling.sample_job import SampleJob

GRID, RECORD = "grid.png", "samples.json"
MOST_IN_GRID, WIDEST_GRID = 1024, 20


def grid(job: SampleJob) -> Image.Image:
    """The images, a column for each guidance scale, mask, map or class; masks and maps stand above theirs."""
    conditions, size = job.conditions, job.model.header.image_size
    turns = [
        len(part) for part in (conditions.spatial, conditions.segmentation, conditions.class_index) if part is not None
    ]
    taking_turns = len(job.guidance) if len(job.guidance) > 1 else next(iter(turns), 1)
    columns = taking_turns if 1 < taking_turns <= WIDEST_GRID else None
    shown = []
    for planned in job.images[:MOST_IN_GRID]:
        with storage.open_read(storage.join(job.config.out, planned.file)) as file, Image.open(file) as image:
            shown.append(np.asarray(image))
    above = _shown(conditions)
    if len(job.guidance) == 1 and len(above) in (1, columns):
        columns = columns or math.ceil(math.sqrt(len(shown)))
        white = np.full((size, size, 3), 255, np.uint8)
        shown = [*above, *[white] * (columns - len(above)), *shown]
    return image_files.grid(np.stack(shown), columns=columns, enlarge=max(1, 128 // size))


def record(job: SampleJob, nfe: list[int]) -> dict[str, Any]:
    """All that made the images, for the JSON beside them; `nfe` of each."""
    header, conditions = job.model.header, job.conditions
    known = None
    if conditions.spatial is not None:
        known = "put back" if job.composites else "as the model made them"
    entries = []
    for image in job.images:
        index = (
            None
            if conditions.class_index is None
            else int(conditions.class_index[image.number % len(conditions.class_index)])
        )
        entries.append({
            "file": image.file,
            "seed": image.seed,
            "class_index": index,
            "class_name": None if index is None else header.classes[index].name,
            "condition": job.names[image.number % len(job.names)] if job.names else None,
            "guidance_scale": image.scale,
            "nfe": image.nfe,
        })  # fmt: skip
    return {
        "settings": job.recipe,
        "files": [*(image.file for image in job.images), GRID],
        "nfe": {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)},
        "known_pixels": known,
        "autoencoder": header.autoencoder.model_dump(),
        "trained_by": header.code_version,
        "sampled_by": factory.code_version(),
        "pictures": entries,
    }


def _shown(conditions: Conditions) -> np.ndarray:
    """Masked images or maps, as a person sees them: uint8 (N, H, W, 3)."""
    if conditions.images is not None and conditions.masks is not None:
        return hide(conditions.images, conditions.masks)
    if conditions.segmentation is not None:
        return np.stack([image_files.colours(ids).round().astype(np.uint8) for ids in conditions.segmentation])
    return np.zeros((0, 1, 1, 3), np.uint8)
