"""Whether images are what their conditions say: maps and holes of the drawn scenes, judged by the recogniser.

    python benchmarks/tasks.py OUT [--num-steps 1000] [--ranks 2]

Two models are trained by launch/train.py on 3,072 scenes of 64 pixels, one on maps and one on classes with holes, by the
demo's configuration; what is there already is kept, and training resumes. Then each makes an image for each of 64 scenes
that it never saw: under the scene's own map, and as a check of the measure held against another scene's; in the hole
that hides the whole shape, under its own class, and under another one. The same network with the weights that it began
with says what an untrained condition gives.
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

CHECKOUT = Path(__file__).parents[1]
SETS = {"train": (3072, 0), "test": (64, 7)}  # scenes and seed
SOLVING: dict[str, Any] = {"num_steps": 20, "solver": "heun"}


def command(*arguments: object) -> None:
    subprocess.run(list(map(str, arguments)), check=True, cwd=CHECKOUT)


def make(out: Path, num_steps: int, ranks: int) -> list[RawSample]:
    """Everything up to the trained models; returns the scenes to test on."""
    lfm = (sys.executable, "-m", "pipelines.cli.main")
    for name, (count, seed) in SETS.items():
        command(*lfm, "scenes", out / name, "--num", count, "--image-size", 64, "--seed", seed)
        command(*lfm, "shard", out / name, out / f"{name}-raw", "--layout", "paired", "--image-size", 64)
    command(*lfm, "encode", out / "train-raw", out / "latents")
    for task in ("semantic", "class+inpaint"):
        settings = {"run": out / task, "condition": task, "data.shards": out / "latents", "train.num_steps": num_steps}
        changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        launcher = (Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks, "launch/train.py")
        command(*launcher, "--config", "configs/demo.yaml", *changes)
    with (out / "test-raw" / "000000.tar").open("rb") as file:
        return list(read_raw(file, str(out)))


def untrained(run: Path) -> TrainedModel:
    """The model of a run with the weights that its training began with."""
    model = library.load(str(run))
    torch.manual_seed(0)
    model.network.load_state_dict(registry.build_network(model.header.model).state_dict())
    return model


def share(made: np.ndarray, classes: np.ndarray) -> float:
    """Of the images, those that the recogniser takes for their class."""
    return float(np.mean([recognise(image) == index for image, index in zip(made, classes, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    out = options.out.resolve()
    scenes = make(out, options.num_steps, options.ranks)
    seeds = range(len(scenes))
    images, masks, maps = (
        np.stack([getattr(scene, part) for scene in scenes]) for part in ("image", "mask", "segmentation")
    )
    classes = np.array([scene.class_index for scene in scenes])

    def agreement(made: np.ndarray, wanted: np.ndarray) -> float:
        return float((np.stack([segment(image) for image in made]) == wanted).mean())

    print(f"pixels that agree with the map: the real images {agreement(images, maps):.1%}")
    for name, model, scale in (
        ("trained", library.load(str(out / "semantic")), 2.5),
        ("untrained", untrained(out / "semantic"), 1.0),
    ):
        made = model.sample(seeds, segmentations=maps, guidance_scale=scale, **SOLVING).images
        other = agreement(made, np.roll(maps, 1, 0))
        print(f"  {name}: {agreement(made, maps):.1%}, with another scene's map {other:.1%}")
    print(
        f"holes with the class that was told: left grey {share(np.where(masks[..., None] == 1, 128, images), classes):.1%}"
    )
    filled = library.load(str(out / "class+inpaint"))
    for name, model, wanted in (
        ("its own class", filled, classes),
        ("another class", filled, (classes + 3) % len(CLASS_NAMES)),
        ("untrained", untrained(out / "class+inpaint"), classes),
    ):
        scale = 1.0 if name == "untrained" else 2.5
        made = model.sample(
            seeds, class_index=wanted.tolist(), images=images, masks=masks, guidance_scale=scale, **SOLVING
        ).images
        known = "unchanged" if (made[masks == 0] == images[masks == 0]).all() else "CHANGED"
        print(f"  {name}: {share(made, wanted):.1%}; known pixels {known}")


if __name__ == "__main__":
    main()
