"""Measure how well images agree with their conditions, on drawn scenes whose shapes a recogniser identifies.

    python benchmarks/tasks.py OUT [--num-steps 1000] [--num-scenes 3072] [--ranks 2] [--dry-run]

Two models are trained by launch/train.py on scenes of 64 pixels with the demo's configuration: one on segmentations, one on
classes and masks. Running the command again resumes. Each model then generates an image for each of 64 held-out scenes: under
the scene's own segmentation, compared with it and, as a control, with that of another scene; and in a hole that hides the
whole shape, under the shape's class and under another one. Networks with initial weights give the values of no training.
--dry-run trains on a few scenes for two steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lfm as library
from lfm.data.raw_shards import read_raw
from lfm.inference.trained_model import TrainedModel
from lfm.models import registry
from lfm.synthetic.scenes import CLASS_NAMES, recognise, segment
from lfm.types import RawSample
from lfm.world import World
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes

CHECKOUT = Path(__file__).parents[1]
NUM_TEST_SCENES = 64
DRY_RUN: dict[str, Any] = {"num_steps": 2, "num_scenes": 8, "num_test_scenes": 2, "ranks": 1}
SOLVING: dict[str, Any] = {"num_steps": 20, "solver": "heun"}
SCALE = 2.5  # guidance scale of the trained models
WARMUP_STEPS, GLOBAL_BATCH = 20, 64  # as in the demo's configuration


def command(*arguments: object) -> None:
    """Run a command in the checkout, and raise if it fails."""
    subprocess.run(list(map(str, arguments)), check=True, cwd=CHECKOUT)


def train_models(out: Path, num_steps: int, num_scenes: int, num_test_scenes: int, ranks: int) -> list[RawSample]:
    """Draw and encode the scenes and train both models; return the test scenes."""
    for name, count, seed in (("train", num_scenes, 0), ("test", num_test_scenes, 7)):
        draw_scenes.run(draw_scenes.ScenesConfig(str(out / name), num=count, image_size=64, seed=seed))
        shard.run(shard.ShardConfig(str(out / name), str(out / f"{name}-raw"), layout="paired", image_size=64))
    encode.run(encode.EncodeConfig(str(out / "train-raw"), str(out / "latents")), World())
    for task in ("semantic", "class+inpaint"):
        settings = {
            "run": out / task,
            "condition": task,
            "data.shards": out / "latents",
            "train.num_steps": num_steps,
            "train.warmup_steps": min(num_steps, WARMUP_STEPS),
            "train.global_batch": min(num_scenes, GLOBAL_BATCH),
        }
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        deepspeed = (Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks)
        launcher = (sys.executable,) if ranks == 1 else deepspeed
        command(*launcher, "launch/train.py", "--config", "configs/demo.yaml", *changes)
    with (out / "test-raw" / "000000.tar").open("rb") as file:
        return list(read_raw(file, str(out)))


def untrained(run: Path) -> TrainedModel:
    """Return the model of a run with initial weights."""
    model = library.load(str(run))
    torch.manual_seed(0)
    model.network.load_state_dict(registry.build_network(model.header.model).state_dict())
    return model


def recognised_share(images: np.ndarray, classes: np.ndarray) -> float:
    """Return the share of images whose class the recogniser identifies."""
    return float(np.mean([recognise(image) == index for image, index in zip(images, classes, strict=True)]))


def agreement(images: np.ndarray, segmentations: np.ndarray) -> float:
    """Return the share of pixels whose recognised label is that of the segmentations."""
    return float((np.stack([segment(image) for image in images]) == segmentations).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--num-scenes", type=int, default=3072)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out = options.out.resolve()
    sizes = {"num_steps": options.num_steps, "num_scenes": options.num_scenes, "ranks": options.ranks}
    sizes["num_test_scenes"] = NUM_TEST_SCENES
    if options.dry_run:
        sizes = DRY_RUN
        SOLVING["num_steps"] = 2
    scenes = train_models(out, **sizes)
    measure_segmentations(out / "semantic", scenes)
    measure_masks(out / "class+inpaint", scenes)


def measure_segmentations(run: Path, scenes: list[RawSample]) -> None:
    """Print the share of pixels that agree with the segmentation under which an image was generated."""
    images, segmentations = (np.stack([getattr(scene, part) for scene in scenes]) for part in ("image", "segmentation"))
    print(f"pixels that agree with the segmentation: of the test images {agreement(images, segmentations):.1%}")
    for name, model, scale in (("trained", library.load(str(run)), SCALE), ("untrained", untrained(run), 1.0)):
        seeds = range(len(scenes))
        samples = model.sample(seeds, segmentations=segmentations, guidance_scale=scale, **SOLVING).images
        other = agreement(samples, np.roll(segmentations, 1, 0))
        print(f"  {name}: {agreement(samples, segmentations):.1%}, with another scene's segmentation {other:.1%}")


def measure_masks(run: Path, scenes: list[RawSample]) -> None:
    """Print the share of filled holes whose class is recognised, and whether known pixels are unchanged."""
    images, masks = (np.stack([getattr(scene, part) for scene in scenes]) for part in ("image", "mask"))
    classes = np.array([scene.class_index for scene in scenes])
    grey = np.where(masks[..., None] == 1, 128, images)
    print(f"holes in which the class is recognised: filled with grey {recognised_share(grey, classes):.1%}")
    model = library.load(str(run))
    for name, filler, filled_classes, scale in (
        ("its own class", model, classes, SCALE),
        ("another class", model, (classes + 3) % len(CLASS_NAMES), SCALE),
        ("untrained", untrained(run), classes, 1.0),
    ):
        samples = filler.sample(
            range(len(scenes)),
            class_index=filled_classes.tolist(),
            images=images,
            masks=masks,
            guidance_scale=scale,
            **SOLVING,
        ).images
        known = "unchanged" if (samples[masks == 0] == images[masks == 0]).all() else "CHANGED"
        print(f"  {name}: {recognised_share(samples, filled_classes):.1%}; known pixels {known}")


if __name__ == "__main__":
    main()
