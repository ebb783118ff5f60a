"""Options of the commands that make and inspect shards and autoencoders."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.common.options import (
    EXECUTION,
    Argument,
    CacheFolder,
    Count,
    DryRun,
    Flag,
    Location,
    NumGpus,
    Overwrite,
    Pixels,
    Positive,
    PythonOnly,
    Section,
    Seed,
    Share,
    stage_options,
)


@stage_options
class ShardConfig:
    """Options of `lfm shard`."""

    source: Annotated[Location, Argument()]
    """Folder, archive or database of images, with classes, segmentations and masks if it has them."""
    dest: Annotated[Location, Argument()]
    """Folder or URL for the raw shards."""
    layout: str = "auto"
    """Layout of the collection in SOURCE; auto detects it."""
    image_size: Pixels = 256
    """Height and width of the images in pixels, after resizing and cropping."""
    split: str | None = None
    """Split of SOURCE, such as train."""
    samples_per_shard: Count = 4096
    """Number of samples in one shard."""
    image_format: Annotated[Literal["webp", "png", "jpg"], Flag("--format")] = "webp"
    """Image format: webp and png are lossless, jpg has quality 95."""
    crop: Literal["centre", "pad", "squash"] = "centre"
    """How images become square: crop the centre (as ADM does), pad or squash."""
    masks: Literal["free-form"] | None = None
    """Generate masks for a source that has none: free-form draws the large holes of MAT."""
    classes: Annotated[Literal["auto", "folders", "inner-folders", "none"], Section("Labels and annotations")] = "auto"
    """Where folders may be classes or something else: folders takes them for classes, inner-folders the innermost
    ones, none leaves classes out."""
    class_order: Literal["name", "number"] = "name"
    """Order of the indices of class folders: of their names as text, or as numbers."""
    labels: Annotated[str | None, Flag(metavar="FILE")] = None
    """Table of file names and labels, CSV, TSV, JSON lines or parquet, in place of the labels of SOURCE."""
    label_column: Annotated[str | None, Flag(metavar="NAME")] = None
    """Column of the table, or key of the JSON, that holds the label."""
    mask_files: Annotated[str | None, Flag(metavar="NAME")] = None
    """Folder, or end of the names, of the masks; none takes no file for a mask."""
    mask_value: Literal["white", "black", "opaque", "transparent"] = "white"
    """Pixels of a mask that are missing."""
    map_files: Annotated[str | None, Flag(metavar="NAME")] = None
    """Folder, or end of the names, of the segmentations; none takes no file for one."""
    palette: Annotated[str | None, Flag(metavar="NAME_OR_FILE")] = None
    """Colours of segmentations: camvid, cityscapes, voc, a file of lines name,r,g,b, or indices."""
    ignore_label: Annotated[int | None, Field(ge=0, le=0xFFFF)] = None
    """Id of the segmentations that stands for no class."""
    sheet: Annotated[str | None, Flag(metavar="FILE")] = None
    """Save a sheet of 16 images with class, mask and map before anything is packed."""
    seed: Annotated[Seed, Section("Options")] = 0
    """Seed of the shuffle into shards and of generated masks."""
    near_duplicates: Literal["keep", "report", "drop"] = "keep"
    """Images that look like an earlier one: keep them, report them, or drop them; the last two read every image twice."""
    workers: Annotated[Count, EXECUTION] = 1
    """Number of processes that decode and write."""
    part: Annotated[str, Flag(metavar="K/N")] = "1/1"
    """Write the shards of part K of N, such as 3/16; each machine takes another part."""
    max_rejected: Share = 0.01
    """Largest share of the images that may be unusable."""
    overwrite: Overwrite = False
    dry_run: DryRun = False


@stage_options
class EncodeConfig:
    """Options of `lfm encode`."""

    raw: Annotated[Location, Argument()]
    """Folder or URL of raw shards."""
    dest: Annotated[Location, Argument()]
    """Folder or URL for the latent shards."""
    autoencoder: Annotated[str, Flag(metavar="PATH_OR_ID")] = "embedded"
    """Path or hub id of an autoencoder that diffusers loads, or embedded."""
    flips: bool = False
    """Also encode the mirror image of each image."""
    batch_size: Count = 32
    """Images per forward pass of the autoencoder."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of the autoencoder; without a GPU, tf32 is the same as fp32."""
    threads: Annotated[Count, EXECUTION] = 4
    """Threads of each process that decode images."""
    cache: CacheFolder = None
    rate: Positive | None = None
    """Images per second of all processes, for the hours that --dry-run tells.  [default: measured here]"""
    overwrite: Overwrite = False
    dry_run: DryRun = False
    num_gpus: NumGpus = None


@stage_options
class InspectConfig:
    """Options of `lfm inspect`."""

    path: Annotated[Location, Argument()]
    """Folder or URL of raw or latent shards, the YAML file of an experiment, or a PNG of `lfm sample`."""
    others: Annotated[tuple[Location, ...], Argument()] = ()
    """Folders or URLs of more latent shards: say what they share with those of PATH."""
    verify: bool = False
    """Compare every shard with its checksum."""
    out: Annotated[str | None, Flag(metavar="FILE")] = None
    """File for the sheet of images.  [default: by the last names of PATH, as in sheet-clothes-latents.png]"""
    num: Annotated[int, Field(ge=1, le=4096)] = 64
    """Number of images on the sheet, or of samples listed by --plan."""
    autoencoder: Annotated[str | None, Flag(metavar="PATH_OR_ID")] = None
    """Path or hub id of the autoencoder of the latents, if it has moved."""
    raw: Annotated[str | None, Flag(metavar="PATH")] = None
    """Compare with the raw shards that were encoded: print PSNR and SSIM, and show the originals on the sheet."""
    interpolations: Annotated[int | None, Field(ge=2, le=4096)] = None
    """Also measure the distance of decoded interpolations of this many latents, by fd-lite."""
    overwrite: Annotated[bool, Section("Options")] = False
    """Replace a file that is no sheet of PATH by the sheet."""
    cache: CacheFolder = None
    plan: Annotated[bool, Section("Training order")] = False
    """Only list the samples that training reads next."""
    at: Annotated[int, Field(ge=0, le=2**62)] = 0
    """Samples seen at the start of the list, as in a checkpoint's name."""
    seed: Seed = 0
    """train.seed of the run."""
    window: Count = 8
    """data.window of the run."""
    skip_shard: Annotated[tuple[str, ...], Flag(metavar="NAME")] = ()
    """One of data.skip_shards of the run; may be repeated."""
    held_back: Annotated[int, Field(ge=0, le=2**31)] = 0
    """data.held_back of the run: these last shards are not trained on."""


@stage_options
class DropConfig:
    """Options of `lfm data drop`."""

    shards: Annotated[Location, Argument()]
    """Folder or URL of raw or latent shards."""
    keys: Annotated[tuple[str, ...], Argument()] = ()
    """Keys of samples to withdraw, of 12 digits."""
    keys_file: Annotated[str | None, Flag(metavar="FILE")] = None
    """Text file with more keys, one a line."""
    where: Annotated[str | None, Flag(metavar="CONDITION")] = None
    """Also withdraw the samples that a condition on their columns holds for, such as source == 'cat/1.jpg'."""
    reason: str = ""
    """Why; kept in the list of withdrawn samples."""
    cache: CacheFolder = None
    dry_run: DryRun = False


@stage_options
class AutoencoderConfig:
    """Options of `lfm autoencoder`."""

    raws: Annotated[tuple[Location, ...], Argument()]
    """Folders or URLs of raw shards; each batch takes the same share of every one."""
    dest: Annotated[Location, Argument()]
    """Local folder for the autoencoder, in the format of diffusers."""
    initialize_from: Annotated[str | None, Flag(metavar="PATH_OR_ID")] = None
    """Path or hub id of an autoencoder to fine-tune, or embedded.  [default: new weights]"""
    num_steps: Count = 20_000
    """Number of optimizer steps."""
    batch_size: Count = 16
    """Images per step."""
    learning_rate: Positive = 1e-3
    """Learning rate of the optimizer."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the KL divergence in the loss."""
    equivariance: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the reconstruction of rotated and smaller images from latents that were rotated and made smaller."""
    ema_decay: Annotated[float, PythonOnly()] = 0.999
    """Decay of the exponential moving average of the weights per step."""
    latent_channels: Count = 4
    """Channels of the latents, for new weights."""
    block_channels: Annotated[tuple[int, ...], PythonOnly()] = (32, 32, 64)
    """Channels of each resolution, for new weights; each resolution after the first has half the size."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of training; bf16 means autocast, and without a GPU, tf32 is the same as fp32."""
    save_every: Annotated[int, PythonOnly()] = 500
    """Steps between checkpoints."""
    seed: Seed = 0
    """Seed of the data order and of the draws from the posterior."""
    cache: CacheFolder = None
    overwrite: Overwrite = False
    dry_run: DryRun = False
