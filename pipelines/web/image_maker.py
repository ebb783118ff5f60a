"""Make the images that the page asks for, by the code and thus bit for bit as `lfm sample` does.

Each class is a column of the grid: its images are those of `lfm sample RUN --class CLASS --seeds SEEDS`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from lfm import weights_file
from lfm.errors import ConfigError
from lfm.inference import trained_model
from lfm.inference.trained_model import TrainedModel
from lfm.solvers import SOLVERS
from pipelines.common import image_files
from pipelines.common.options import problem
from pipelines.common.sample_jobs.image_note import make_note
from pipelines.common.sample_jobs.sample_job import SampleJob, load_job
from pipelines.common.sample_jobs.sample_options import SampleConfig
from pipelines.common.sample_jobs.sample_plan import PlannedImage, SamplePlan, make_plan
from pipelines.common.sample_jobs.trajectory_frames import (
    NUM_FRAMES,
    FrameRecorder,
    decode_frames,
    enlargement,
    record_frames,
)

MOST_IMAGES = 256
INPUTS = ("image", "mask", "segmentation")
ARCHIVE, RECORD, TRAJECTORY = "images.zip", "record.json", "trajectory.png"


@dataclass(frozen=True)
class PageRequest:
    """What the page asks for; see the options of `lfm sample` of the same names.

    Attributes:
        classes: the columns of the grid; None for a model without classes.
        image: to inpaint, uint8 (H, W, 3) at the model's size.
        mask: uint8 (H, W), 1 = missing.
        segmentation: uint8 or uint16 (H, W), class ids.
        num_steps: of a fixed-step solver; ignored for an adaptive one.
        precision: None is that of the training.
        trajectory: whether to draw the intermediate states of the first images.
    """

    run: str
    seeds: str
    classes: tuple[int, ...] | None = None
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    segmentation: np.ndarray | None = None
    composite: bool = True
    guidance_scale: float = 1.0
    solver: str = "heun"
    num_steps: int = 25
    precision: str | None = None
    trajectory: bool = False


@dataclass(frozen=True)
class PageImages:
    """Finished images: a file and a caption each, row by row, a row per seed and a column per class.

    Attributes:
        num_columns: columns of the grid; None for a model without classes.
        trajectory: file of the intermediate states, or None.
        archive: zip of all images, the inputs drawn on the page, and the record of how the images were made.
        summary: one line.
    """

    images: tuple[tuple[str, str], ...]
    num_columns: int | None
    trajectory: str | None
    archive: str
    summary: str


class ImageMaker:
    """Makes images, and keeps the model of the last request.

    Args:
        device: where to compute.
        batch_size: images per forward pass.
        autoencoder: path or hub id of the autoencoder, if it has moved since training.
    """

    def __init__(self, device: torch.device, batch_size: int = 32, autoencoder: str | None = None) -> None:
        self.device, self.batch_size, self.autoencoder = device, batch_size, autoencoder
        self._kept: tuple[Any, TrainedModel] | None = None

    def load(self, run: str, **options: Any) -> TrainedModel:
        """Load a model as `lfm.load` does, unless it is that of the last request and its run has not been trained further."""
        header = weights_file.load_header(run)
        key = (run, header.samples_seen, header.manifest_digest, options)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next model needs the memory
            self._kept = key, trained_model.load(run, **options)
        return self._kept[1]

    def prepare(self, run: str) -> None:
        """Load a model as a request without settings of its own needs it, so that the first one begins at once."""
        self.load(run, precision=None, autoencoder=self.autoencoder, device=self.device)

    def make(self, request: PageRequest, folder: Path, on_progress: Callable[[float], None]) -> PageImages:
        """Make the images of a request in an empty folder.

        Args:
            request: what to make.
            folder: for images, inputs and archive.
            on_progress: called after each step of the solver with the finished share; what it raises ends the work.

        Raises:
            ConfigError, CheckpointError: the request or the run does not fit.
            LfmError: the solver failed.
        """
        plan = _make_plan(request, folder, self.batch_size, self.autoencoder)
        job = load_job(plan, self.device, self.load)
        described, recorder, num_evaluations = _with_inputs_beside(job), None, 0
        for finished, batch in _batches(job):
            own_recorder = None
            if request.trajectory and recorder is None:
                own_recorder = recorder = record_frames(job.model, batch)
            step = _Step(finished, len(batch), len(plan.images), on_progress, own_recorder)
            pixels, nfe = job.make(batch, step)
            for image, image_pixels, evaluations in zip(batch, pixels, nfe, strict=True):
                note = make_note(described, image, evaluations)
                image_files.save(image_pixels, folder / image.file, flush=False, note=note)
            num_evaluations += sum(nfe)
        if recorder is not None:
            _save_trajectory(job, recorder, folder / TRAJECTORY)
        return _page_images(job, folder, num_evaluations / len(plan.images))


@dataclass(frozen=True)
class _Step:
    """A step callback that reports the finished share of all images, and passes the step on to a recorder."""

    finished: int  # images of earlier batches
    size: int  # of this batch
    total: int
    on_progress: Callable[[float], None]
    recorder: FrameRecorder | None

    def __call__(self, at: Tensor, state: Tensor, rows: Tensor) -> None:
        if self.recorder is not None:
            self.recorder(at, state, rows)
        self.on_progress((self.finished + self.size * (1 - float(at.max()))) / self.total)


def _make_plan(request: PageRequest, folder: Path, batch_size: int, autoencoder: str | None) -> SamplePlan:
    """Return the plan of a request, after writing the inputs that were drawn to `folder`."""
    scales = {"mask": 255}  # a mask's holes are white in its file
    paths = {}
    for name in INPUTS:
        if (array := getattr(request, name)) is not None:
            paths[name] = (str(folder / f"{name}.png"),)
            Image.fromarray(array * scales.get(name, 1)).save(folder / f"{name}.png")
    is_adaptive = request.solver in SOLVERS and SOLVERS[request.solver].is_adaptive
    options: dict[str, Any] = paths | {
        "seeds": request.seeds,
        "class_index": None if request.classes is None else ",".join(map(str, request.classes)),
        "composite": request.composite,
        "guidance_scale": repr(request.guidance_scale),
        "solver": request.solver,
        "num_steps": None if is_adaptive else request.num_steps,
        "precision": request.precision,
        "batch_size": batch_size,
        "trajectory": "png" if request.trajectory else None,
        "autoencoder": autoencoder,
        "compile": False,  # it takes longer than the images of a page, and would change their last bits
    }
    try:
        plan = make_plan(SampleConfig(run=request.run, out=str(folder), **options))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"`{first['loc'][0]}` {first['input']}: {problem(first)}") from error
    if request.classes == ():
        raise ConfigError("`class_index`: choose at least one class")
    images = _in_every_class(plan.images, request.classes)
    if len(images) > MOST_IMAGES:
        raise ConfigError(f"{len(images):,} images: the page makes at most {MOST_IMAGES} at once; use `lfm sample`")
    return replace(plan, images=images)


def _in_every_class(images: Sequence[PlannedImage], classes: Sequence[int] | None) -> tuple[PlannedImage, ...]:
    """Return an image of every class for each seed; its number is the position of its class."""
    if classes is None:
        return tuple(images)
    return tuple(
        replace(image, number=column, file=image.file.replace(".png", f"-class{index}.png"))
        for image in images
        for column, index in enumerate(classes)
    )


def _batches(job: SampleJob) -> Iterator[tuple[int, list[PlannedImage]]]:
    """Yield the number of earlier images, and a batch.

    Where batches are not filled up, kernels may round differently for each size, so a batch is one that `lfm sample` would
    make of one class.
    """
    columns = [list(job.plan.images)]
    if job.conditions.class_index is not None and not job.model.fills_batches:
        numbers = range(len(job.conditions.class_index))
        columns = [[image for image in job.plan.images if image.number == number] for number in numbers]
    finished = 0
    for column in columns:
        for batch in job.plan.batches(column):
            yield finished, batch
            finished += len(batch)


def _with_inputs_beside(job: SampleJob) -> SampleJob:
    """Return the job with the names of its inputs as they are in the archive, for notes that say how to repeat it."""
    config = job.plan.config
    names: dict[str, Any] = {name: tuple(Path(path).name for path in getattr(config, name)) for name in INPUTS}
    return replace(job, plan=replace(job.plan, config=replace(config, **names)))


def _save_trajectory(job: SampleJob, recorder: FrameRecorder, path: Path) -> None:
    frames = decode_frames(job.model, recorder, job.plan.config.batch_size)
    images = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    sheet = image_files.grid(images, columns=NUM_FRAMES, enlarge=enlargement(job.model))
    image_files.save(sheet, path, flush=False)


def _page_images(job: SampleJob, folder: Path, mean_nfe: float) -> PageImages:
    """Write the record and the archive, and describe what is in the folder."""
    classes, captions = job.conditions.class_index, {}
    for image in job.plan.images:
        name = "" if classes is None else f", {job.model.header.classes[int(classes[image.number])].name}"
        captions[image.file] = f"seed {image.seed}{name}"
    record = [{"file": name, **image_files.note(str(folder / name))} for name in captions]
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    names = sorted(path.name for path in folder.iterdir())
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:  # PNGs are compressed already
        for name in names:
            archive.write(folder / name, name)
    header = job.model.header
    return PageImages(
        images=tuple((str(folder / name), caption) for name, caption in captions.items()),
        num_columns=None if classes is None else len(classes),
        trajectory=str(folder / TRAJECTORY) if TRAJECTORY in names else None,
        archive=str(folder / ARCHIVE),
        summary=f"{len(captions)} images of {header.image_size} x {header.image_size} pixels, {job.plan.solving}, "
        f"{job.model.precision}, {mean_nfe:.0f} network evaluations per image",
    )
