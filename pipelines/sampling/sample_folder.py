"""The output folder of `lfm sample`: its recipe, and its finished images.

Each PNG holds in its metadata the digest of all that decided it. An image is finished if its digest is the expected one,
so that a run can be resumed, and every rank makes its part without waiting for the others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.errors import ConfigError, DataError
from lfm.world import World
from pipelines.common import image_files, processes
from pipelines.common.sample_jobs.image_note import make_note
from pipelines.common.sample_jobs.sample_job import SampleJob
from pipelines.common.sample_jobs.sample_plan import PlannedImage, plan_images

logger = logging.getLogger(__name__)

OWNED = r"(recipe|samples|timing)\.json|(grid|trajectory)\.(png|gif)"  # besides the images that the recipe names


def claim_folder(job: SampleJob, world: World) -> None:
    """Start or resume in the output folder; ranks other than the main one wait until that is done.

    Raises:
        ConfigError: the folder holds something else, or samples of other settings and `overwrite` is not set.
    """
    config = job.plan.config
    path = storage.join(config.out, manifests.RECIPE)
    if not world.is_main:
        return processes.wait_for_json(path, job.recipe)
    storage.sweep(config.out)
    if not storage.exists(path) and _is_of_samples(config.out):
        logger.warning("%s: is missing; writing it again", path)
        return storage.write_json(path, job.recipe, sealed=True)
    try:
        previous = storage.read_json(path) if storage.exists(path) else {"kind": "samples"}
    except DataError as error:
        if any(name.endswith(".tar") for name in storage.sizes(config.out)):
            raise
        logger.warning("%s; writing it again", error)
        return storage.write_json(path, job.recipe, sealed=True)  # images have digests of their own
    if not isinstance(previous, dict) or previous.get("kind") != "samples":
        raise ConfigError(f"{config.out}: holds something else than samples of lfm; choose another folder")
    overwrite = config.overwrite and previous != job.recipe  # images of equal settings are equal
    if overwrite:
        for name in _previous_images(previous) & storage.sizes(config.out).keys():
            storage.remove(storage.join(config.out, name))
    manifests.claim(config.out, job.recipe, overwrite=overwrite, owned=OWNED)


def _is_of_samples(out: str) -> bool:
    """Return whether a folder has files, all of which `lfm sample` made: an image has a note with its digest."""
    files = storage.sizes(out)
    images = [name for name in files if not re.fullmatch(OWNED, name)]
    notes = [image_files.note(storage.join(out, name)) for name in images]
    return bool(files) and all(isinstance(note, dict) and "digest" in note for note in notes)


def _previous_images(recipe: dict[str, Any]) -> set[str]:
    """Return the files that a recipe names; none if it is not of this version."""
    try:
        return {image.file for image in plan_images(recipe["seeds"], recipe["guidance_scale"])}
    except (ConfigError, KeyError, TypeError, AttributeError):
        return set()


def save_images(job: SampleJob, images: Iterable[PlannedImage], pixels: np.ndarray, nfe: Iterable[int]) -> None:
    """Write images, uint8 (B, H, W, 3), each with a note of how it was made."""
    for image, image_pixels, evaluations in zip(images, pixels, nfe, strict=True):
        path = storage.join(job.plan.config.out, image.file)
        image_files.save(image_pixels, path, note=make_note(job, image, evaluations))


def finished_images(job: SampleJob, images: Iterable[PlannedImage]) -> dict[str, int]:
    """Return the number of network evaluations of each finished image among `images`, by file name."""
    out = job.plan.config.out
    existing, finished = storage.sizes(out), {}
    for image in images:
        if image.file in existing:
            note = image_files.note(storage.join(out, image.file))
            nfe = note.get("nfe") if isinstance(note, dict) and note.get("digest") == job.digest(image) else None
            if isinstance(nfe, int):
                finished[image.file] = nfe
    return finished
