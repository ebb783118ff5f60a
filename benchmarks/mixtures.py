"""Measure what mixing gains, on drawn scenes: balanced classes, a last stage on clean data, and old data in fine-tuning.

    python benchmarks/mixtures.py OUT [--uses balance clean-end replay] [--seeds 3] [--dry-run]

balance      2,048 scenes, of each of the 8 shapes half as many as of the one before: with and without `data.balance`
clean-end    3,072 scenes, half of which show another shape than their class says, beside 512 that are right: mixed by
             number, and the same with the last tenth of the samples from the 512 alone
replay       a model of six shapes, trained on to the other two from 200 scenes: with and without a tenth of the old data

Trains configs/demo_quick.yaml, several seeds each, paired: the same initial weights and noise. Then 256 images, of all
classes equally many, are made as the demo makes them. Prints the share that is recognised as its class, and writes
OUT/mixtures.json. Running the command again resumes. --dry-run trains for two steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

import lfm as library
from lfm.synthetic.scenes import CLASS_NAMES, draw_scene, recognise
from lfm.world import World
from pipelines.common import image_files, launcher
from pipelines.common.experiment import config_file
from pipelines.common.progress import Progress
from pipelines.comparison.paired_statistics import difference
from pipelines.data import encode, shard

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo_quick.yaml"
SIZE = 64
SAMPLING: dict[str, Any] = {"num_steps": 20, "solver": "heun", "guidance_scale": 3.0}
NEW = CLASS_NAMES[:2]  # of replay
Changes = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """A use of mixtures: two trainings, which differ in what they read."""

    without: Changes
    within: Changes
    from_old: bool = False


def scenes(folder: Path, counts: Mapping[str, int], seed: int, wrong: bool = False) -> str:
    """Return latents of drawn scenes, so many of each class, made once; `wrong` ones are in the folder of the next class."""
    if not (folder / "latents" / "manifest.json").exists():
        left, index = dict(counts), 0
        with Progress("scenes", sum(counts.values()), "images") as progress:
            while any(left.values()):
                scene = draw_scene(seed, index, SIZE)
                shape = CLASS_NAMES[scene.class_index]
                if left.get(shape):
                    left[shape] -= 1
                    label = CLASS_NAMES[(scene.class_index + 1) % len(CLASS_NAMES)] if wrong else shape
                    image_files.save(scene.image, str(folder / "images" / label / f"{index:06d}.png"), flush=False)
                    progress.advance(1)
                index += 1
        shard.run(shard.ShardConfig(str(folder / "images"), str(folder / "raw"), image_size=SIZE))
        encode.run(encode.EncodeConfig(str(folder / "raw"), str(folder / "latents")), World())
    return str(folder / "latents")


def uses(out: Path, names: list[str], num_samples: int, small: bool) -> dict[str, Use]:
    """Return the uses of these names, whose data are made."""

    def each(number: int, classes: tuple[str, ...] = CLASS_NAMES) -> dict[str, int]:
        return dict.fromkeys(classes, 2 if small else number)

    made: dict[str, Use] = {}
    if "balance" in names:
        counts = {name: 2 if small else 1024 >> number for number, name in enumerate(CLASS_NAMES)}
        shards = scenes(out / "data" / "unbalanced", counts, 1)
        made["balance"] = Use({"data": {"shards": shards}}, {"data": {"shards": shards, "balance": 1.0}})
    if "clean-end" in names:
        noisy = [
            scenes(out / "data" / name, each(192), seed, name == "wrong") for seed, name in ((2, "right"), (3, "wrong"))
        ]
        clean = scenes(out / "data" / "clean", each(64), 4)
        sources = [
            {"shards": shards, "name": name, "weight": weight}
            for shards, name, weight in (*zip(noisy, ("right", "wrong"), (3, 3), strict=True), (clean, "clean", 1))
        ]
        stage = {"samples_seen": num_samples * 9 // 10, "weights": {"right": 0, "wrong": 0}}
        made["clean-end"] = Use(
            {"data": {"shards": None, "sources": sources}},
            {"data": {"shards": None, "sources": sources, "stages": [stage]}},
        )
    if "replay" in names:
        old = scenes(out / "data" / "old", each(512, CLASS_NAMES[2:]), 5)
        new = scenes(out / "data" / "new", each(100, NEW), 6)
        both = [{"shards": new, "name": "new", "weight": 9}, {"shards": old, "name": "old", "weight": 1}]
        made["replay"] = Use({"data": {"shards": new}}, {"data": {"shards": None, "sources": both}}, from_old=True)
        made["old"] = Use({"data": {"shards": old}}, {})
    return made


def train(out: Path, name: str, changes: Changes, seed: int, num_steps: int, source: Path | None = None) -> Path:
    """Train one model as far as it is not trained yet, and return its run folder."""
    run, file = out / "runs" / name / f"seed-{seed}", out / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    train = {"num_steps": num_steps, "warmup_steps": min(num_steps, 20)}
    with file.open("w") as stream:
        YAML(typ="safe", pure=True).dump({"extends": str(CONFIG), "train": train, **changes}, stream)
    if not (run / "weights.safetensors").exists() or library.load(str(run)).header.samples_seen < num_steps * 16:
        arguments = ("--initialize-from", str(source)) if source else ()
        overrides = (f"run={run}", f"train.seed={seed}")
        command = launcher.training_command(str(file), overrides, None, arguments=arguments)
        subprocess.run(command, env=launcher.environment(1), check=True)
    return run


def recognised(run: Path, num: int) -> dict[str, float]:
    """Return the share of images that are recognised, by class; of classes that the model does not have, 0."""
    model = library.load(str(run))
    names = [entry.name for entry in model.header.classes]
    shares = {}
    for name in CLASS_NAMES:
        right = 0
        if name in names:
            classes, seeds = [names.index(name)] * num, [1000 * CLASS_NAMES.index(name) + seed for seed in range(num)]
            images = model.sample(seeds, class_index=classes, **SAMPLING).images
            right = sum(recognise(np.asarray(image)) == CLASS_NAMES.index(name) for image in images)
        shares[name] = right / num
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["balance", "clean-end", "replay"]
    parser.add_argument("out", type=Path)
    parser.add_argument("--uses", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out, small = options.out.absolute(), options.dry_run
    base = config_file.load(str(CONFIG), ("run=unused", "data.shards=unused")).train
    num_steps, num, seeds = (2, 1, 1) if small else (base.num_steps, 32, options.seeds)
    made = uses(out, options.uses, num_steps * base.global_batch, small)
    old = made.pop("old", None)
    results: dict[str, Any] = {}
    for name, use in made.items():
        shares: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
        for seed in range(seeds):
            source = train(out, "old", old.without, seed, num_steps) if use.from_old and old else None
            for label, changes in (("without", use.without), ("with", use.within)):
                steps = max(1, num_steps // 4) if source else num_steps
                run = train(out, f"{name}-{label}", changes, seed, steps, source)
                shares[label].append(recognised(run, num))
        results[name] = shares
        print(table(name, shares), flush=True)
    (out / "mixtures.json").write_text(json.dumps(results, indent=1) + "\n")


def table(name: str, shares: dict[str, list[dict[str, float]]]) -> str:
    """Return the mean shares of a use by class and over all, each with its spread over the seeds, in Markdown."""
    means = {label: [statistics.fmean(run.values()) for run in runs] for label, runs in shares.items()}
    rows = [f"\n| {name} | all | {' | '.join(CLASS_NAMES)} |", "|" + " --- |" * (2 + len(CLASS_NAMES))]
    for label, runs in shares.items():
        cells = [_spread([run[shape] for run in runs]) for shape in CLASS_NAMES]
        p = ""
        if label == "with" and len(runs) > 1:
            test = difference(means["without"], means["with"], paired=True, higher_is_better=True)
            p = f" (p {test.p:.3f})"
        rows.append(f"| {label} | {_spread(means[label])}{p} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
