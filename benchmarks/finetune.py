"""Compare training from scratch with fine-tuning: images until new shapes are recognised, and until a loss is reached.

    python benchmarks/finetune.py OUT [--targets classes inpaint semantic size] [--seeds 3] [--tune] [--settings] [--dry-run]
    python benchmarks/finetune.py OUT --targets photographs --images TRAIN --test TEST [...]

Source: the recipe of benchmarks/record.py with its longer budget, on drawn scenes of six shapes at 64 pixels. Targets:

    classes    the other two shapes, from 100 images each: samples until 90 % of generated images are recognised
    inpaint    masks as a condition beside the class, on the scenes of the source
    semantic   segmentations as a condition beside the class, on the scenes of the source
    size       the six shapes at 128 pixels

For the last three: samples until the validation loss is that of training from scratch at its end. And on photographs in class
folders, of which the source has all classes but two:

    photographs    the other two classes, from 50 images each: samples until the distance of fd-lite to the photographs of TEST
                   is that of training from scratch at its end; then also KID, and the share of images that are copies

Each method is trained with several seeds, on the same samples, noise and times, from the source of the same seed. Learning
rates are those of `RATES`, chosen among `TUNING` with a seed of its own (--tune). --settings compares `SETTINGS` for the two
shapes instead. Prints a table for each target, and writes OUT/finetune.json (OUT/settings.json). Running the command again
resumes. --dry-run trains for two steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from safetensors import safe_open

from lfm import weights_file
from lfm.synthetic.scenes import CLASS_NAMES, SEGMENT_NAMES, draw_scene
from lfm.world import World
from pipelines.common import image_files, launcher
from pipelines.common.experiment import config_file
from pipelines.common.progress import Progress
from pipelines.comparison.paired_statistics import difference, reached_at
from pipelines.comparison.paired_trainings import Training, read_log
from pipelines.data import encode, shard
from pipelines.evaluation import evaluate, make_reference
from pipelines.evaluation.evaluation_options import EvaluateConfig, ReferenceConfig

NEW_CLASSES = CLASS_NAMES[:2]  # the first indices, which the recogniser knows them by
SOURCE_CLASSES = CLASS_NAMES[2:]
COST = "cost.json"  # in a run folder: the peak memory of its process
TUNING_SEED = 100


@dataclass(frozen=True)
class Method:
    """A way to train: from which weights, and what of them."""

    name: str
    trainable: tuple[str, ...] | None  # None: from scratch
    arguments: tuple[str, ...] = ()
    guided_by_source: bool = False  # whether its images are guided away from the source's null condition


METHODS = (
    Method("scratch", None),
    Method("full", ("all",)),
    Method("full, guided by the source", ("all",), guided_by_source=True),
    Method("full, null row", ("all",), ("--new-classes", "null")),
    Method("LoRA", ("adapters", "conditions")),
    Method("DiffFit", ("scales", "norms_and_biases", "conditions")),
)
TUNING: dict[str, tuple[float, ...]] = {
    "scratch": (1.4e-3, 2.8e-3, 5.6e-3, 1.12e-2),
    "full": (5e-4, 1e-3, 2e-3, 4e-3),
    "LoRA": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "DiffFit": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
RATES = {
    "scratch": 5.6e-3,
    "full": 2e-3,
    "full, guided by the source": 2e-3,
    "full, null row": 2e-3,
    "LoRA": 8e-3,
    "DiffFit": 1.6e-2,
}

SETTINGS: dict[str, dict[str, Any]] = {  # of full fine-tuning; the first is that of the targets
    "as for the targets": {},
    "warmup of 20 steps": {"train.warmup_steps": 20},
    "warmup of 100 steps": {"train.warmup_steps": 100},
    "gradients clipped to 1": {"train.gradient_clipping": 1.0},
    "cosine schedule": {"train.schedule": "cosine", "train.warmup_steps": 20},
    "EMA of at most 0.95": {"train.ema_decay": 0.95},
    "condition dropout 0.05": {"condition_dropout": 0.05},
    "condition dropout 0.2": {"condition_dropout": 0.2},
}


@dataclass(frozen=True)
class Target:
    """What a method is trained for."""

    condition: str
    classes: tuple[str, ...]
    num: tuple[int, int]  # images, and those held back
    image_size: int
    num_steps: tuple[int, int]  # from scratch, and from the source
    every: tuple[int, int]  # steps between measurements
    methods: tuple[str, ...] = ("scratch", "full")
    source: str = "source"  # a name of `SOURCES`
    metric: str = "validation_loss"


ALL_METHODS = tuple(method.name for method in METHODS)
CLOTHES = ("pants", "shoes")
CLOTHES_METHODS = ("scratch", "full", "full, guided by the source")
TARGETS = {
    "classes": Target("class", NEW_CLASSES, (200, 128), 64, (1440, 480), (60, 30), ALL_METHODS, metric="recognised"),
    "inpaint": Target("class+inpaint", SOURCE_CLASSES, (3072, 256), 64, (640, 640), (80, 40)),
    "semantic": Target("class+semantic", SOURCE_CLASSES, (3072, 256), 64, (640, 640), (80, 40)),
    "size": Target("class", SOURCE_CLASSES, (3072, 256), 128, (240, 240), (40, 20)),
    "photographs": Target(
        "class", CLOTHES, (100, 100), 64, (960, 480), (120, 60), CLOTHES_METHODS, "clothes", "fd-lite"
    ),
}
SOURCES = {
    "source": Target("class", SOURCE_CLASSES, (3072, 256), 64, (960, 960), (240, 240)),
    "clothes": Target("class", (), (2102, 300), 64, (960, 960), (240, 240), source="clothes", metric="fd-lite"),
}
BATCH, SOURCE_BATCH, SOURCE_RATE = 32, 64, 4e-3
SHARE = 0.9  # recognised
SAMPLING: dict[str, Any] = {"num_steps": 10, "guidance_scale": 2.0}  # of photographs


def scenes(folder: Path, target: Target, num: tuple[int, int], seed: int) -> Path:
    """Return latents of drawn scenes of some shapes, made once, whose last shard holds the `num[1]` samples held back."""
    raw, encoded = folder / "raw", folder / "latents"
    if not (encoded / "manifest.json").exists():
        images = folder / "scenes"
        _draw(images, target, sum(num), seed)
        (images / "labels.txt").write_text("\n".join(SEGMENT_NAMES))
        shard.run(
            shard.ShardConfig(
                str(images), str(raw), layout="paired", image_size=target.image_size, samples_per_shard=num[0]
            )
        )
        encode.run(encode.EncodeConfig(str(raw), str(encoded)), World())
    return encoded


def _draw(images: Path, target: Target, num: int, seed: int) -> None:
    """Save the first `num` scenes of the target's classes, of each class equally many but for one."""
    wanted = {name: (num + place) // len(target.classes) for place, name in enumerate(target.classes)}
    with Progress("scenes", num, "images") as progress:
        index = 0
        while any(wanted.values()):
            scene = draw_scene(seed, index, target.image_size)
            shape = CLASS_NAMES[scene.class_index]
            if wanted.get(shape):
                wanted[shape] -= 1
                name = f"{shape}/{index:06d}.png"
                image_files.save(scene.image, str(images / "images" / name), flush=False)
                image_files.save(scene.segmentation, str(images / "segmentations" / name), flush=False)
                image_files.save(scene.mask * 255, str(images / "masks" / name), flush=False)
                progress.advance(1)
            index += 1


def photographs(folder: Path, target: Target, images: Path, num: tuple[int, int]) -> Path:
    """Return latents of photographs, made once, whose last shard holds the `num[1]` samples held back.

    Of the target's classes equally many are taken, the first by name; of the source all that are not of the target's.
    """
    chosen, encoded = folder / "images", folder / "latents"
    if not (encoded / "manifest.json").exists():
        classes = target.classes or sorted({path.name for path in images.iterdir()} - {*CLOTHES})
        for name in classes:
            files = sorted((images / name).iterdir())
            (chosen / name).mkdir(parents=True, exist_ok=True)
            for file in files[: sum(num) // len(classes)] if target.classes else files:
                shutil.copyfile(file, chosen / name / file.name)
        raw = folder / "raw"
        shard.run(shard.ShardConfig(str(chosen), str(raw), image_size=target.image_size, samples_per_shard=num[0]))
        encode.run(encode.EncodeConfig(str(raw), str(encoded), flips=True), World())
    return encoded


def reference(folder: Path, target: Target, test: Path) -> Path:
    """Return the reference of the test photographs of the target's classes, or of all but those of the target."""
    chosen, out = folder / "test", folder / "test.safetensors"
    for name in target.classes or sorted({path.name for path in test.iterdir()} - {*CLOTHES}):
        shutil.copytree(test / name, chosen / name, dirs_exist_ok=True)
    make_reference.run(ReferenceConfig(str(chosen), str(out), image_size=target.image_size), World())
    return out


def run_folder(out: Path, name: str, method: Method, rate: float, seed: int) -> Path:
    """Return the run folder of one training."""
    return out / "runs" / name / f"{method.name.replace(', ', '-').replace(' ', '-')}-{rate:g}" / f"seed-{seed}"


def plan(
    out: Path,
    name: str,
    target: Target,
    method: Method,
    rate: float,
    seed: int,
    small: bool,
    setting: str = "",
) -> Training:
    """Return one training, whose configuration is written into `out`; `setting` is a name of `SETTINGS`."""
    from_source = method.trainable is not None
    num_steps, every = target.num_steps[from_source], target.every[from_source]
    is_source = name in SOURCES
    changes: dict[str, Any] = {
        "condition": target.condition,
        "data": {"shards": str(out / "data" / name / "latents"), "held_back": 1},
        "train.num_steps": 2 if small else num_steps,
        "train.global_batch": 4 if small else SOURCE_BATCH if is_source else BATCH,
        "train.learning_rate": rate,
        "train.validate_every": 1 if small else every,
        "train.log_every": 1 if small else 20,
        "train.trainable": list(method.trainable or ("all",)),
    }
    num, every = (2, 1) if small else (128, every)
    if target.metric == "recognised":
        changes |= {"evaluation.every": every, "evaluation.num": num}
    elif target.metric == "fd-lite":
        test = str(out / "data" / name / "test.safetensors")
        changes["evaluation"] = {"reference": test, "every": every, "num": 2 * num, **SAMPLING}
    else:
        changes["evaluation"] = None
    changes |= SETTINGS.get(setting, {})
    if small and "train.warmup_steps" in changes:
        changes["train.warmup_steps"] = 1
    folder = run_folder(out, name if not setting else f"{name}-{setting.replace(' ', '-')}", method, rate, seed)
    file = record.write_config(
        out / "configs" / name, f"{method.name} {rate:g} {setting}".strip(), {"run": "unused", **changes}
    )
    overrides: tuple[str, ...] = (f"run={folder}", f"train.seed={seed}")
    if method.guided_by_source:
        overrides += (f"evaluation.autoguidance={run_folder(out, target.source, METHODS[0], SOURCE_RATE, seed)}",)
    return Training(method.name, seed, str(file), config_file.load(str(file), overrides), overrides)


def train(training: Training, arguments: Sequence[str]) -> None:
    """Train what is not yet trained, and note the peak memory of its process in bytes."""
    if training.is_complete:
        return
    command = launcher.training_command(training.file, training.overrides, None, arguments=arguments)
    training.folder.mkdir(parents=True, exist_ok=True)
    with (training.folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, env=launcher.environment(1), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{training.folder}: the training failed; see output.txt there")
    (training.folder / COST).write_text(json.dumps({"peak_bytes": usage.ru_maxrss * 1024}))


def curve(training: Training, metric: str) -> list[tuple[float, float]]:
    """Return a metric over the samples seen."""
    lines = read_log(training.folder)
    return [(float(line["samples_seen"]), float(line[metric])) for line in lines if line.get(metric) is not None]


def num_tensor_elements(training: Training) -> int:
    """Return the number of parameters in the run's weights: all of a network, or the part that was trained."""
    with safe_open(str(training.folder / weights_file.WEIGHTS), "np") as file:
        names = list(file.keys())
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def summary(trainings: Sequence[Training], metric: str, target: float) -> dict[str, Any]:
    """Return what the seeds of one method measured; `reached` are samples, None where a seed did not reach the target."""
    curves = [curve(training, metric) for training in trainings]
    higher = metric == "recognised"
    lines = [line for training in trainings for line in read_log(training.folder)]
    return {
        "seeds": [training.seed for training in trainings],
        "learning_rate": trainings[0].config.train.learning_rate,
        "num_samples": trainings[0].num_samples,
        "curves": curves,
        "final": [points[-1][1] for points in curves],
        "reached": [reached_at(points, target, higher_is_better=higher) for points in curves],
        "parameters": num_tensor_elements(trainings[0]),
        "weights_bytes": (trainings[0].folder / weights_file.WEIGHTS).stat().st_size,
        "peak_bytes": [json.loads((training.folder / COST).read_text())["peak_bytes"] for training in trainings],
        "cpu_seconds_per_sample": statistics.median(line["cpu_seconds_per_sample"] for line in lines),
    }


def table(result: dict[str, Any]) -> str:
    """Return one target's results as a table in Markdown."""
    metric, methods = result["metric"], result["methods"]
    base = next(iter(methods))  # training from scratch, or the first setting
    first = methods[base]
    goal = f"{SHARE:.0%}" if metric == "recognised" else f"{result['target']:.3g}"
    further = [key for key in ("kid", "memorised") if key in first]
    columns = ["method", "parameters", "rate", "samples", metric, *further, f"samples to {goal}", f"of {base}"]
    columns += ["CPU seconds to it", "memory"]
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for name, line in methods.items():
        p = ""
        if name != base and len(line["final"]) > 1 and line["num_samples"] == first["num_samples"]:
            test = difference(first["final"], line["final"], paired=True, higher_is_better=metric == "recognised")
            p = f" (p {test.p:.3f})"
        reached, share, seconds = "not reached", "", ""
        found = [value for value in line["reached"] if value is not None]
        if found:
            reached = _spread(found, 0)
            if len(found) < len(line["reached"]):
                reached += f" in {len(found)} of {len(line['reached'])}"
            seconds = f"{statistics.fmean(found) * line['cpu_seconds_per_sample']:.0f}"
            # Where training from scratch does not reach it, its whole budget is a lower bound.
            whole = [value or first["num_samples"] for value in first["reached"]]
            bound = "under " if None in first["reached"] else ""
            share = f"{bound}{statistics.fmean(found) / statistics.fmean(whole):.2f}"
        cells = [
            name,
            f"{line['parameters']:,}",
            f"{line['learning_rate']:g}",
            f"{line['num_samples']:,}",
            _spread(line["final"], 3) + p,
            *(_spread(line[key], 3) for key in further),
            reached,
            share,
            seconds,
            f"{max(line['peak_bytes']) / 1e6:.0f} MB",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


def tune(out: Path, target: Target, small: bool) -> None:
    """Print what each candidate rate of each method reaches on the two shapes, with a seed of its own."""
    base = source(out, "source", TUNING_SEED, small)
    methods = {method.name: method for method in METHODS}
    for name, rates in TUNING.items():
        for rate in rates:
            training = plan(out, "classes", target, methods[name], rate, TUNING_SEED, small)
            train(training, arguments(methods[name], base))
            values = [f"{value:.3f}" for _, value in curve(training, "recognised")]
            loss = curve(training, "validation_loss")[-1][1]
            print(f"{name}, learning rate {rate:g}: loss {loss:.3f}; recognised {', '.join(values)}", flush=True)


def source(out: Path, name: str, seed: int, small: bool) -> Path:
    """Return the run of a source and a seed, trained once."""
    training = plan(out, name, SOURCES[name], METHODS[0], SOURCE_RATE, seed, small)
    train(training, ())
    return training.folder


def arguments(method: Method, base: Path) -> tuple[str, ...]:
    """Return the arguments of the training command that start it from the source."""
    return () if method.trainable is None else ("--initialize-from", str(base), *method.arguments)


def copies(out: Path, name: str, training: Training, small: bool) -> dict[str, float]:
    """Return KID of the trained weights, and the share of their images that are copies of training images."""
    guided = training.config.evaluation and training.config.evaluation.autoguidance
    data, encoded = out / "data" / name, str(out / "data" / name / "latents")
    config = EvaluateConfig(
        (str(training.folder),),
        (str(data / "test.safetensors"),),
        str(training.folder / "report"),
        nearest=encoded,
        num=4 if small else 500,
        guidance_scale=(SAMPLING["guidance_scale"],),
        num_steps=SAMPLING["num_steps"],
        autoguidance=guided or None,
    )
    row = evaluate.run(config, World()).report["rows"][0]
    return {"kid": row["metrics"]["kid"], "memorised": row["nearest"]["features"]["memorised"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS)[:4])
    parser.add_argument("--images", type=Path, help="training photographs in class folders")
    parser.add_argument("--test", type=Path, help="photographs of the reference, in class folders")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--tune", action="store_true", help="compare learning rates on the two shapes instead, one seed"
    )
    parser.add_argument(
        "--settings", action="store_true", help="compare settings of fine-tuning on the two shapes instead"
    )
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out, small = options.out.absolute(), options.dry_run
    names = ["classes"] if options.tune or options.settings else options.targets
    if small:
        options.seeds = 1
    data = {name: TARGETS[name] for name in names}
    data |= {target.source: SOURCES[target.source] for target in data.values()}
    for name, target in data.items():
        folder, num = out / "data" / name, (12, 6) if small else target.num
        if target.metric == "fd-lite":
            if not options.images or not options.test:
                parser.error("--targets photographs: give --images and --test, too")
            photographs(folder, target, options.images, num)
            reference(folder, target, options.test)
        else:
            scenes(folder, target, num, seed=["source", *TARGETS].index(name))
    if options.tune:
        tune(out, TARGETS["classes"], small)
        return
    results = {}
    if options.settings:
        results = {"settings": compare_settings(out, TARGETS["classes"], options.seeds, small)}
        print(table(results["settings"]))
        (out / "settings.json").write_text(json.dumps(results, indent=1) + "\n")
        return
    for name in names:
        results[name] = measure(out, name, TARGETS[name], options.seeds, small)
        print(f"\n{name}\n\n{table(results[name])}", flush=True)
    (out / "finetune.json").write_text(json.dumps(results, indent=1) + "\n")


def compare_settings(out: Path, target: Target, seeds: int, small: bool) -> dict[str, Any]:
    """Train `SETTINGS` as far as they are not trained, and return what they measured."""
    method = next(method for method in METHODS if method.name == "full")
    methods = {}
    for setting in SETTINGS:
        trainings = []
        for seed in range(seeds):
            base = source(out, target.source, seed, small)
            trainings.append(plan(out, "classes", target, method, RATES["full"], seed, small, setting))
            train(trainings[-1], arguments(method, base))
        methods[setting] = summary(trainings, target.metric, SHARE)
    return {"metric": target.metric, "target": SHARE, "methods": methods}


def measure(out: Path, name: str, target: Target, seeds: int, small: bool) -> dict[str, Any]:
    """Train the methods of a target as far as they are not trained, and return what they measured."""
    groups: dict[str, list[Training]] = {}
    for seed in range(seeds):
        base = source(out, target.source, seed, small)
        for method in METHODS:
            if method.name in target.methods:
                training = plan(out, name, target, method, RATES[method.name], seed, small)
                train(training, arguments(method, base))
                groups.setdefault(method.name, []).append(training)
    metric, goal = target.metric, SHARE
    if metric != "recognised":
        goal = statistics.fmean(curve(training, metric)[-1][1] for training in groups["scratch"])
    methods = {method: summary(trainings, metric, goal) for method, trainings in groups.items()}
    if metric == "fd-lite":
        for label, trainings in groups.items():
            rows = [copies(out, name, training, small) for training in trainings]
            methods[label] |= {key: [row[key] for row in rows] for key in rows[0]}
    return {"metric": metric, "target": goal, "methods": methods}


if __name__ == "__main__":
    main()
