"""Measure how well images agree with their conditions, on drawn scenes whose shapes a recogniser identifies.

    python benchmarks/tasks.py OUT [--backbone dit|unet] [--num-steps N] [--num-scenes 3072] [--ranks 2] [--dry-run]

Four models of a backbone are trained by launch/train.py on scenes of 64 pixels, with configs/demo.yaml or demo_unet.yaml:
without condition, on classes, on classes and masks, and on segmentations. Their steps take equal CPU time for both backbones.
Running the command again resumes. Each model then generates 64 images: unconditional ones, in which any shape counts; under
a class; in a hole that hides the whole shape of a held-out scene, under the shape's class and under another one; and under the
scene's own segmentation, compared with it and, as a control, with that of another scene. Networks with initial weights give the
values of no training. --dry-run trains on a few scenes for two steps.
"""

from __future__ import annotations

import argparse
import resource
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
from pipelines.common.experiment import config_file
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes

CHECKOUT = Path(__file__).parents[1]
NUM_TEST_SCENES = 64
DRY_RUN: dict[str, Any] = {"num_steps": 2, "num_scenes": 8, "num_test_scenes": 2, "ranks": 1}
SOLVING: dict[str, Any] = {"num_steps": 20, "solver": "heun"}
SCALE = 2.5  # guidance scale of the trained models
WARMUP_STEPS, GLOBAL_BATCH = 20, 64  # as in the demo's configuration
CONFIGS = {"dit": "configs/demo.yaml", "unet": "configs/demo_unet.yaml"}
TASKS = ("none", "class", "class+inpaint", "semantic")


def command(*arguments: object) -> None:
    """Run a command in the checkout, and raise if it fails."""
    subprocess.run(list(map(str, arguments)), check=True, cwd=CHECKOUT)


def train_models(
    out: Path, backbone: str, num_steps: int, num_scenes: int, num_test_scenes: int, ranks: int
) -> list[RawSample]:
    """Draw and encode the scenes, train a model for each task into `out`/`backbone`/TASK, and return the test scenes."""
    for name, count, seed in (("train", num_scenes, 0), ("test", num_test_scenes, 7)):
        draw_scenes.run(draw_scenes.ScenesConfig(str(out / name), num=count, image_size=64, seed=seed))
        shard.run(shard.ShardConfig(str(out / name), str(out / f"{name}-raw"), layout="paired", image_size=64))
    encode.run(encode.EncodeConfig(str(out / "train-raw"), str(out / "latents")), World())
    for task in TASKS:
        settings = {
            "run": out / backbone / task,
            "condition": task,
            "condition_dropout": 0.0 if task == "none" else 0.1,
            "data.shards": out / "latents",
            "train.num_steps": num_steps,
            "train.warmup_steps": min(num_steps, WARMUP_STEPS),
            "train.global_batch": min(num_scenes, GLOBAL_BATCH),
        }
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        deepspeed = (Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks)
        launcher = (sys.executable,) if ranks == 1 else deepspeed
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command(*launcher, "launch/train.py", "--config", CONFIGS[backbone], *changes)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{backbone}, {task}: {num_steps:,} steps, {seconds:.0f} s of CPU time", flush=True)
    with (out / "test-raw" / "000000.tar").open("rb") as file:
        return list(read_raw(file, str(out)))


def untrained(run: Path) -> TrainedModel:
    """Return the model of a run with initial weights."""
    model = library.load(str(run))
    torch.manual_seed(0)
    model.network.load_state_dict(registry.build_network(model.header.model).state_dict())
    return model


def recognised_images(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return for each image whether its class is the one that the recogniser identifies."""
    return np.array([recognise(image) == index for image, index in zip(images, classes, strict=True)])


def agreement(images: np.ndarray, segmentations: np.ndarray) -> np.ndarray:
    """Return for each image the share of pixels whose recognised label is that of its segmentation."""
    return (np.stack([segment(image) for image in images]) == segmentations).mean((1, 2))


def percent(shares: np.ndarray) -> str:
    """Return the mean over images, with its standard error."""
    return f"{shares.mean():.1%} +- {shares.std() / len(shares) ** 0.5:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", choices=CONFIGS, default="dit")
    parser.add_argument("--num-steps", type=int, help="by default those of the configuration")
    parser.add_argument("--num-scenes", type=int, default=3072)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out, run = options.out.resolve(), options.out.resolve() / options.backbone
    num_steps = options.num_steps or config_file.load(str(CHECKOUT / CONFIGS[options.backbone])).train.num_steps
    sizes = {"num_steps": num_steps, "num_scenes": options.num_scenes, "ranks": options.ranks}
    sizes["num_test_scenes"] = NUM_TEST_SCENES
    if options.dry_run:
        sizes = DRY_RUN
        SOLVING["num_steps"] = 2
    scenes = train_models(out, options.backbone, **sizes)
    measure_classes(run, scenes)
    measure_masks(run / "class+inpaint", scenes)
    measure_segmentations(run / "semantic", scenes)


def measure_classes(run: Path, scenes: list[RawSample]) -> None:
    """Print in how many images any shape, and the shape of the class, is recognised."""
    seeds = range(len(scenes))
    classes = np.array([scene.class_index for scene in scenes])
    for name, model in (("trained", library.load(str(run / "none"))), ("untrained", untrained(run / "none"))):
        images = model.sample(seeds, **SOLVING).images
        shares = np.array([recognise(image) is not None for image in images])
        print(f"unconditional images in which a shape is recognised, {name}: {percent(shares)}")
    model = library.load(str(run / "class"))
    images = model.sample(seeds, class_index=classes.tolist(), guidance_scale=SCALE, **SOLVING).images
    print(f"images in which their class is recognised: {percent(recognised_images(images, classes))}", flush=True)


def measure_segmentations(run: Path, scenes: list[RawSample]) -> None:
    """Print the share of pixels that agree with the segmentation under which an image was generated."""
    images, segmentations = (np.stack([getattr(scene, part) for scene in scenes]) for part in ("image", "segmentation"))
    print(f"pixels that agree with the segmentation: of the test images {percent(agreement(images, segmentations))}")
    for name, model, scale in (("trained", library.load(str(run)), SCALE), ("untrained", untrained(run), 1.0)):
        seeds = range(len(scenes))
        samples = model.sample(seeds, segmentations=segmentations, guidance_scale=scale, **SOLVING).images
        other = percent(agreement(samples, np.roll(segmentations, 1, 0)))
        own = percent(agreement(samples, segmentations))
        print(f"  {name}: {own}, with another scene's segmentation {other}", flush=True)


def measure_masks(run: Path, scenes: list[RawSample]) -> None:
    """Print the share of filled holes whose class is recognised, and whether known pixels are unchanged."""
    images, masks = (np.stack([getattr(scene, part) for scene in scenes]) for part in ("image", "mask"))
    classes = np.array([scene.class_index for scene in scenes])
    grey = np.where(masks[..., None] == 1, 128, images)
    print(f"holes in which the class is recognised: filled with grey {percent(recognised_images(grey, classes))}")
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
        print(f"  {name}: {percent(recognised_images(samples, filled_classes))}; known pixels {known}", flush=True)


if __name__ == "__main__":
    main()
