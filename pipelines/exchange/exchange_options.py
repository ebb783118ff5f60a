"""Options of the commands that import, export and publish weights."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipelines.common.options import Argument, Count, DryRun, Flag, Location, MovedAutoencoder, Pixels, stage_options


@stage_options
class ImportConfig:
    """Options of `lfm import`."""

    path: Annotated[Location, Argument()]
    """Checkpoint file to convert."""
    dest: Annotated[Location, Argument()]
    """Run folder for the converted weights."""
    source: Annotated[Literal["lfm", "dit", "sit"], Flag("--from")]
    """Model family of the checkpoint: lfm (DiT or ADM U-Net of the paper, or exported by `lfm export`), dit or sit."""
    autoencoder: Annotated[str, Flag(metavar="PATH_OR_ID")] = "embedded"
    """Path or hub id of the autoencoder of the model's latents, or embedded."""
    num_heads: Count | None = None
    """Number of attention heads, if width and depth are not those of a published model."""
    num_classes: Annotated[int, Field(ge=0)] | None = None
    """Number of classes; 0 makes the model unconditional.  [default: from the class embedding]"""
    image_size: Pixels | None = None
    """Pixels of the model's images, for an ADM U-Net of inpainting or semantic synthesis, whose checkpoint does not tell it."""
    rescaler: Annotated[Location | None, Flag(metavar="FILE")] = None
    """Rescaler of an ADM U-Net of semantic synthesis: the cond_stage_model file that the paper's script saves beside it."""
    dry_run: DryRun = False


@stage_options
class ExportConfig:
    """Options of `lfm export`."""

    run: Annotated[Location, Argument()]
    """Run folder, checkpoint or weights file."""
    dest: Annotated[Location, Argument()]
    """File or folder to write."""
    to: Literal["safetensors", "diffusers"]
    """Format: safetensors (one file) or diffusers (a folder that DiffusionPipeline loads)."""
    merge: bool = False
    """Put the weights of a trained part together with their base; otherwise safetensors holds the part alone."""
    autoencoder: MovedAutoencoder = None
    dry_run: DryRun = False


def _repository(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError("must be USER/NAME, such as me/flowers")
    return name


@stage_options
class PushConfig:
    """Options of `lfm push`."""

    run: Annotated[Location, Argument()]
    """Run folder, checkpoint or weights file."""
    repository: Annotated[str, Argument(), AfterValidator(_repository)]
    """USER/NAME of the model's repository on the Hugging Face Hub, which is created if it does not exist."""
    licence: Annotated[str | None, Flag(metavar="ID")] = None
    """Licence of the weights, such as cc-by-4.0.  [default: that of the configuration, else of the source of the run]"""
    report: Annotated[Location | None, Flag(metavar="DIR")] = None
    """Report of `lfm evaluate` on this model, for the card."""
    private: bool = False
    """Let nobody else see a repository that is created."""
    revision: Annotated[str | None, Flag(metavar="BRANCH")] = None
    """Branch to push to, which must exist.  [default: main]"""
    num_samples: Annotated[int, Field(ge=0, le=64)] = 16
    """Images on the card; of a model whose conditions are images its newest preview is taken. 0 means none."""
    out: Annotated[Location | None, Flag(metavar="DIR")] = None
    """Write the repository's files to this folder, and push nothing."""
    autoencoder: MovedAutoencoder = None
    dry_run: DryRun = False
