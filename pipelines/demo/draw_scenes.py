"""`lfm scenes`: synthetic images as folders of files, for the demo and for training the embedded autoencoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lfm import storage
from lfm.synthetic.dead_leaves import draw_leaves
from lfm.synthetic.scenes import CLASS_NAMES, SEGMENT_NAMES, draw_scene
from pipelines.common import image_files
from pipelines.common.processes import map_processes
from pipelines.common.progress import Progress
from pipelines.demo.demo_options import ScenesConfig

IMAGES_WORTH_A_PROCESS = 200  # drawing so many takes as long as starting a process


@dataclass(frozen=True)
class ScenesResult:
    """The plan in words."""

    plan: str


def run(config: ScenesConfig) -> ScenesResult:
    """Draw the images, many of them on all cores; `dest`/images is then a source for `lfm shard`."""
    plan = f"{config.num:,} {config.kind} of {config.image_size} x {config.image_size} pixels -> {config.dest}/images"
    if config.dry_run:
        return ScenesResult(plan)
    with Progress("scenes", config.num, "images") as progress:
        num_processes = min(os.cpu_count() or 1, 1 + config.num // IMAGES_WORTH_A_PROCESS)
        for _ in map_processes(partial(_draw, config), range(config.num), num_processes):
            progress.advance(1)
    if config.kind == "scenes":
        storage.write_bytes(storage.join(config.dest, "labels.txt"), "\n".join(SEGMENT_NAMES).encode())
    return ScenesResult(plan)


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
