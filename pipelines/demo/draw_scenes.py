"""`lfm scenes`: synthetic images as folders of files, for the demo and for training the embedded autoencoder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from lfm import storage
from lfm.errors import ConfigError
from lfm.synthetic.dead_leaves import draw_leaves
from lfm.synthetic.scenes import CLASS_NAMES, SEGMENT_NAMES, draw_scene
from pipelines.common import image_files
from pipelines.common.processes import map_processes
from pipelines.common.progress import Progress
from pipelines.demo.demo_options import ScenesConfig

OWN_NAMES = {"images", "segmentations", "masks", "labels.txt"}
IMAGES_WORTH_A_PROCESS = 200  # drawing so many takes as long as starting a process


@dataclass(frozen=True)
class ScenesResult:
    """The plan in words."""

    plan: str


def run(config: ScenesConfig) -> ScenesResult:
    """Draw the images, many of them on all cores; `dest`/images is then a source for `lfm shard`.

    Raises:
        ConfigError: the folder holds images of other settings, or other files.
    """
    plan = f"{config.num:,} {config.kind} of {config.image_size} x {config.image_size} pixels -> {config.dest}/images"
    if config.dry_run:
        return ScenesResult(plan)
    _require_own(config)
    with Progress("scenes", config.num, "images") as progress:
        num_processes = min(os.cpu_count() or 1, 1 + config.num // IMAGES_WORTH_A_PROCESS)
        for _ in map_processes(partial(_draw, config), range(config.num), num_processes):
            progress.advance(1)
    if config.kind == "scenes":
        storage.write_bytes(storage.join(config.dest, "labels.txt"), "\n".join(SEGMENT_NAMES).encode())
    return ScenesResult(plan)


def _require_own(config: ScenesConfig) -> None:
    """Refuse a folder with anything but images of the same settings, such as those that an interrupted command has drawn."""
    if not storage.exists(config.dest):
        return
    names = storage.find(config.dest)
    images = [name for name in names if name.startswith("images/")]
    numbers = [int(Path(name).stem) for name in images if Path(name).stem.isdigit()]
    is_own = len(numbers) == len(images) and not {name.split("/")[0] for name in names} - OWN_NAMES
    if images and is_own:
        drawn = KINDS[config.kind](config, numbers[0]).get(images[0])
        with Image.open(io.BytesIO(storage.read_bytes(storage.join(config.dest, images[0])))) as image:
            is_own = max(numbers) < config.num and drawn is not None and np.array_equal(np.asarray(image), drawn)
    if not is_own:
        raise ConfigError(f"{config.dest}: holds images of other settings, or other files; choose another folder")


def _draw(config: ScenesConfig, index: int) -> None:
    for name, pixels in KINDS[config.kind](config, index).items():
        image_files.save(pixels, storage.join(config.dest, name), flush=False)


def _scene_files(config: ScenesConfig, index: int) -> dict[str, np.ndarray]:
    """The image in the folder of its class, and its segmentation and mask under the same name in folders beside."""
    scene = draw_scene(config.seed, index, config.image_size)
    name = f"{CLASS_NAMES[scene.class_index]}/{index:06d}.png"
    return {
        f"images/{name}": scene.image,
        f"segmentations/{name}": scene.segmentation,
        f"masks/{name}": scene.mask * 255,
    }


def _leaves_files(config: ScenesConfig, index: int) -> dict[str, np.ndarray]:
    return {f"images/leaves/{index:06d}.png": draw_leaves(config.seed, index, config.image_size)}


# The files of one image by name, for each kind of images.
KINDS: dict[str, Callable[[ScenesConfig, int], dict[str, np.ndarray]]] = {
    "scenes": _scene_files,
    "leaves": _leaves_files,
}
