"""What a sampled image says of itself: the note in its PNG, and the options that make it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lfm import storage
from lfm.errors import ConfigError, printable
from pipelines.common import image_files
from pipelines.common.number_lists import parse_indices
from pipelines.common.sample_jobs.sample_job import PER_IMAGE, SampleJob
from pipelines.common.sample_jobs.sample_options import SampleConfig
from pipelines.common.sample_jobs.sample_plan import PlannedImage


def make_note(job: SampleJob, image: PlannedImage, nfe: int) -> dict[str, Any]:
    """Return the note of one image, as JSON values.

    Keys: `digest` of all that decided the image, `seed`, `nfe` (network evaluations), `class_name` (None without classes),
    `samples_seen` and `data` (digest of the latents) of the weights, and `options`, those of `lfm sample` that make this image
    alone, without `out`.
    """
    index = _class_index(job, image)
    return {
        "digest": job.digest(image),
        "seed": image.seed,
        "nfe": nfe,
        "class_name": None if index is None else job.model.header.classes[index].name,
        "samples_seen": job.model.header.samples_seen,
        "data": job.model.header.manifest_digest,
        "options": _own_options(job, image),
    }


def read_options(path: str) -> tuple[list[str], SampleConfig]:
    """Return what a sampled image says of itself, as lines of text, and the options that make it again.

    Raises:
        ConfigError: the file is not an image of `lfm sample` with such a note.
    """
    note = image_files.note(path)
    try:
        options = SampleConfig(**note["options"], out="OUT")
        lines = [
            f"an image of lfm: seed {int(note['seed'])}, {int(note['nfe'])} network evaluations",
            f"  weights  {options.run}, {int(note['samples_seen']):,} samples seen",
            f"  data     {printable(str(note['data']))}",
            f"  digest   {printable(str(note['digest']))}",
        ]
        if note["class_name"] is not None:
            lines.insert(1, f"  class    {printable(str(note['class_name']))}")
    except (TypeError, KeyError, ValueError) as error:
        if not path.lower().endswith(".png"):
            raise ConfigError(
                f"{path}: does not say how it was made, as PNGs of `lfm sample` do; to see images in shards, name their folder"
            ) from error
        raise ConfigError(
            f"{path}: does not say how it was made: it is no image of `lfm sample`, is a grid, or was made by an earlier "
            "version, whose samples.json beside it says so"
        ) from error
    return lines, options


def _class_index(job: SampleJob, image: PlannedImage) -> int | None:
    classes = job.conditions.class_index
    return None if classes is None else int(classes[image.number % len(classes)])


def _own_options(job: SampleJob, image: PlannedImage) -> dict[str, Any]:
    """Return the options of the folder that are not the defaults, and of those that are distributed over images this one's."""
    config = job.plan.config
    defaults = asdict(SampleConfig(run=config.run, out=config.out))
    options = {
        key: value
        for key, value in asdict(config).items()
        if key in job.recipe and key not in PER_IMAGE and value != defaults[key]
    }
    options |= {"run": config.run, "seeds": str(image.seed), "precision": job.model.precision}
    if image.scale != 1:
        options["guidance_scale"] = repr(image.scale)
    if config.crop is not None:
        options["crop"] = config.crop
    for key in ("image", "mask", "segmentation"):
        if files := getattr(config, key):
            options[key] = (files[image.number % len(files)],)
    if config.shards is not None:
        rows = [image.number] if config.rows is None else parse_indices("rows", config.rows)
        options |= {"shards": config.shards, "rows": str(rows[image.number % len(rows)])}
    index = _class_index(job, image)
    if index is not None and (config.shards is None or config.class_index is not None):
        options["class_index"] = str(index)
    return storage.as_stored({key: options[key] for key in asdict(config) if key in options})
