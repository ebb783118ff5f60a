"""Options of the commands that generate synthetic images and run the demo."""

from __future__ import annotations

from typing import Annotated, Literal

from pipelines.common.options import Argument, Count, DryRun, Location, Pixels, Seed, stage_options


@stage_options
class DemoConfig:
    """Options of `lfm demo`."""

    out: str = "demo"
    """Folder for the files of all stages."""
    dry_run: DryRun = False


@stage_options
class ScenesConfig:
    """Options of `lfm scenes`."""

    dest: Annotated[Location, Argument()]
    """Folder for the images, segmentations and masks."""
    num: Count = 4096
    """Number of images."""
    image_size: Pixels = 64
    """Height and width of the images in pixels."""
    seed: Seed = 0
    """Seed of the images."""
    kind: Literal["scenes", "leaves"] = "scenes"
    """Kind of images: scenes with classes, segmentations and masks, or dead leaves, with the statistics of photographs."""
    dry_run: DryRun = False
