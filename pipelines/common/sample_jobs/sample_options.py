"""Options of `lfm sample`.

Each is part of the record of an image; one that changes no image is named in `NO_EFFECT` of `sample_job`, and one that is
added later in its `ADDED_OPTIONS`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pipelines.common.options import (
    Argument,
    CacheFolder,
    Count,
    DryRun,
    Flag,
    Location,
    MovedAutoencoder,
    NumGpus,
    Overwrite,
    Positive,
    Precision,
    Section,
    stage_options,
)


@stage_options
class SampleConfig:
    """Options of `lfm sample`."""

    run: Annotated[Location, Argument()]
    """Run folder, checkpoint or weights file."""
    out: Annotated[str, Flag(metavar="DIR")]
    """Folder for the images."""
    seeds: Annotated[str | None, Flag(metavar="NUMBERS")] = None
    """Seeds, such as 0-15: one image per seed; classes, masks and maps are cycled over the seeds.  [default: one seed
    per row of --rows, else 0-15]"""
    class_index: Annotated[str | None, Section("Conditions"), Flag("--class", "--class-index", metavar="CLASSES")] = (
        None
    )
    """Classes by index or name, such as 3, 0-9 or star,circle.  [default: all classes]"""
    image: Annotated[tuple[str, ...], Flag(metavar="FILE")] = ()
    """Image to inpaint; repeat it once per mask."""
    mask: Annotated[tuple[str, ...], Flag(metavar="FILE")] = ()
    """Mask of the image; white marks the pixels to fill."""
    segmentation: Annotated[tuple[str, ...], Flag(metavar="FILE")] = ()
    """Map of class ids to generate an image for; may be repeated."""
    crop: Literal["centre", "pad", "squash"] | None = None
    """Bring images, masks and maps to the model's size, as `lfm shard` does.  [default: they must have that size]"""
    shards: Annotated[str | None, Flag(metavar="PATH")] = None
    """Raw or latent shards to take masks, maps and classes from."""
    rows: Annotated[str | None, Flag(metavar="NUMBERS")] = None
    """Rows of the shards, such as 0-3.  [default: as many as seeds]"""
    composite: bool = True
    """Replace the known pixels of the result with those of the image.  [default: composite]"""
    guidance_scale: Annotated[str, Section("Guidance"), Flag(metavar="SCALES")] = "1"
    """Classifier-free guidance scale; 1 means none, and several such as 1,1.5,2 make a sheet."""
    guidance_interval: Annotated[str | None, Flag(metavar="FROM,TO")] = None
    """Times between which to apply guidance, such as 0.2,0.8.  [default: 0,1]"""
    autoguidance: Annotated[str | None, Flag(metavar="RUN")] = None
    """Guide away from this weaker model instead of the null condition."""
    guidance: Literal["null", "internal", "sparse"] = "null"
    """Guide away from the null condition, at no extra cost from the early blocks of a model with model.internal_head, or from
    the velocity with dropped tokens of a model with model.token_dropout."""
    solver: Annotated[str, Section("Solver")] = "heun"
    """ODE or SDE solver: euler, midpoint, heun, rk4, ab2, sde, dopri5, bosh3, ..."""
    num_steps: Count | None = None
    """Number of steps of a fixed-step solver.  [default: 25]"""
    time_shift: Positive | None = None
    """Shift of the time grid; above 1, more steps are near noise.  [default: 1]"""
    times: Annotated[str | None, Flag(metavar="TIMES")] = None
    """Time grid in place of --num-steps and --time-shift, such as 1,0.8,0.5,0."""
    atol: Positive | None = None
    """Absolute tolerance of an adaptive solver.  [default: 1e-5]"""
    rtol: Positive | None = None
    """Relative tolerance of an adaptive solver.  [default: 1e-5]"""
    precision: Annotated[Precision, Section("Options")] = None
    batch_size: Count = 32
    """Images per forward pass; on a GPU the last batch is filled up, so that an image depends on this number alone."""
    compile: bool = True
    """On a GPU, compile the network's blocks if it is evaluated 200 times or more.  [default: compile]"""
    trajectory: Literal["png", "gif"] | None = None
    """Also save the intermediate states of the first images."""
    time: bool = False
    """Also measure the time of the solver and of the decoder."""
    autoencoder: MovedAutoencoder = None
    cache: CacheFolder = None
    overwrite: Overwrite = False
    dry_run: DryRun = False
    num_gpus: NumGpus = None
