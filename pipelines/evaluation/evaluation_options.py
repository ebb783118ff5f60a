"""Options of the commands that measure images and latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.common.options import (
    AbsoluteTolerance,
    Argument,
    CacheFolder,
    Count,
    DryRun,
    Flag,
    Location,
    MovedAutoencoder,
    NumGpus,
    NumSteps,
    Overwrite,
    Pixels,
    Precision,
    PythonOnly,
    RelativeTolerance,
    Section,
    Seed,
    TrustCode,
    stage_options,
)


@stage_options
class ReferenceConfig:
    """Options of `lfm reference`."""

    source: Annotated[Location, Argument()]
    """Raw shards, a folder of images, or statistics in an .npz file."""
    out: Annotated[Location, Argument()]
    """Reference file to write; its name ends with .safetensors."""
    image_size: Pixels | None = None
    """Resize and crop the images of a folder to this size; of an .npz file, the size that its images had."""
    crop: Literal["centre", "pad", "squash"] | None = None
    """How the images of a folder become square, with --image-size.  [default: centre]"""
    network: Annotated[str, Flag(metavar="NAME")] = "fd-lite"
    """Feature network: fd-lite, inception:WEIGHTS.pth, or MODULE.pt2 with --trust-code."""
    trust_code: TrustCode = False
    batch_size: Count = 32
    """Images per forward pass."""
    cache: CacheFolder = None
    overwrite: Overwrite = False
    dry_run: DryRun = False
    num_gpus: NumGpus = None


@stage_options
class EvaluateConfig:
    """Options of `lfm evaluate`."""

    targets: Annotated[tuple[str, ...], Argument()]
    """Runs, checkpoints or weights files; or folders of images, or raw shards."""
    reference: Annotated[tuple[str, ...], Flag(metavar="FILE", required=False)]
    """Reference made by `lfm reference`; repeat it for several feature networks."""
    out: Annotated[str, Flag(metavar="DIR")]
    """Folder for the report and the features."""
    metrics: Annotated[str | None, Flag(metavar="NAMES")] = None
    """Metrics to compute, such as fd,kid,recall.  [default: all that the inputs allow]"""
    pairs: Annotated[str | None, Flag(metavar="PATH")] = None
    """Ground-truth images, paired by key; enables psnr, ssim, lpips, p-ids, u-ids."""
    neighbours: Annotated[str | None, Flag(metavar="PATH")] = None
    """Images of the first reference; the report shows the nearest of them below each image."""
    nearest: Annotated[str | None, Flag(metavar="LATENTS")] = None
    """Latents that the runs were trained on; measures how many images are copies of them."""
    held_back: Annotated[str | None, Flag(metavar="LATENTS")] = None
    """Latents that the runs were not trained on, for --nearest.  [default: the run's data.held_back shards]"""
    network: Annotated[tuple[str, ...], Flag(metavar="NAME")] = ()
    """Feature network of a reference, unless it is fd-lite; may be repeated."""
    lpips: Annotated[str | None, Flag(metavar="FILE")] = None
    """Module of torch.export that maps two images to their distance."""
    segmenter: Annotated[str | None, Flag(metavar="FILE")] = None
    """Module of torch.export that maps an image to scores of labels."""
    trust_code: TrustCode = False
    bound: Annotated[str | None, Flag(metavar="RAW")] = None
    """Compute the paper's bound on held-out images instead of metrics."""
    num: Annotated[Count | None, Section("Generation (for runs)")] = None
    """Number of images of each run.  [default: 50,000]"""
    first_seed: Seed | None = None
    """Seed of the first image; the others follow it.  [default: 0]"""
    guidance_scale: tuple[Annotated[float, Field(ge=-1000, le=1000)], ...] = ()
    """Classifier-free guidance scale; repeat it for a curve.  [default: 1]"""
    autoguidance: Annotated[str | None, Flag(metavar="RUN")] = None
    """Guide away from this weaker model, at its null condition if its classes are others, in place of the null condition."""
    solver: str | None = None
    """ODE solver: euler, midpoint, heun, rk4, ab2, sde, dopri5, bosh3, ...  [default: heun]"""
    num_steps: NumSteps = None
    atol: AbsoluteTolerance = None
    rtol: RelativeTolerance = None
    precision: Precision = None
    batch_size: Count = 32
    """Images per forward pass."""
    autoencoder: MovedAutoencoder = None
    cache: CacheFolder = None
    overwrite: Overwrite = False
    dry_run: DryRun = False
    num_gpus: NumGpus = None


@stage_options
class BoundConfig:
    """Options of `lfm evaluate --bound`."""

    run: Location
    """Run folder, checkpoint or weights file."""
    raw: Location
    """Raw shards, or a folder, of images that the model was not trained on."""
    out: str
    """Folder for the report."""
    num: Count = 1000
    """Number of images."""
    num_steep: Annotated[int, PythonOnly()] = 16
    """Number of images at which Jacobians are evaluated, at every time; each costs 80 network evaluations."""
    seed: Seed = 0
    """Seed of the noise."""
    batch_size: Count = 32
    """Images per forward pass."""
    autoencoder: MovedAutoencoder = None
    cache: CacheFolder = None
    dry_run: DryRun = False


@stage_options
class LikelihoodConfig:
    """Options of `lfm likelihood`."""

    run: Annotated[Location, Argument()]
    """Run folder, checkpoint or weights file."""
    latents: Annotated[Location, Argument()]
    """Folder or URL of latent shards."""
    out: Annotated[str, Flag(metavar="FILE")] = "likelihood.json"
    """JSON file to write."""
    rows: Annotated[str | None, Flag(metavar="NUMBERS")] = None
    """Rows of the latents, such as 0-63.  [default: the first 64]"""
    estimator: Literal["hutchinson", "exact"] = "hutchinson"
    """Estimator of the divergence: hutchinson, or exact (one backward pass per dimension)."""
    solver: str = "dopri5"
    """ODE solver."""
    num_steps: NumSteps = None
    atol: AbsoluteTolerance = None
    rtol: RelativeTolerance = None
    precision: Precision = None
    batch_size: Count = 32
    """Latents per forward pass."""
    autoencoder: MovedAutoencoder = None
    cache: CacheFolder = None
    dry_run: DryRun = False
