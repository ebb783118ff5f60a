"""The record: how many samples and how much time each technique needs for what the paper's recipe reaches.

    python benchmarks/record.py OUT [--latents LATENTS] [--only NAME ...] [--seeds 3] [--long] [--unet] [--tune] [--dry-run]
    python benchmarks/record.py OUT --images TRAIN --test TEST [...]

Trains the paper's recipe, and every entry of `ENTRIES`, which changes it, on drawn scenes with `lfm compare`: on the same
samples, noise and times, several seeds each. LATENTS are latents of scenes, of which the last shard is held back; by default
they are made in OUT as `lfm demo` makes them. --tune trains `TUNING` instead, one seed each: the values among which those of
the recipe were chosen. --long trains three times as long, with `LONG_ENTRIES` and `LONG_TUNING`. --unet trains
`UNET_ENTRIES`, the paper's other backbone. --images trains on photographs in class folders, with `PHOTOGRAPHS_ENTRIES` and
`PHOTOGRAPHS_TUNING`, and measures the distance of fd-lite to those of TEST. All of it resumes.

Each finished entry is written to record.jsonl beside this file (record_long.jsonl and so on), or in OUT with
--results; from all lines there the table of docs/record.md and its plot are made. The target is the mean of the recipe's last
measurements over its seeds. Its ratio of samples is where the mean curve of an entry reaches it; the ratio of CPU seconds
multiplies it by the ratio of the CPU time per sample. --dry-run trains one entry for two steps, and writes into OUT alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ruamel.yaml import YAML

from lfm.world import World
from pipelines.comparison import comparison_report
from pipelines.comparison.compare import run as compare
from pipelines.comparison.comparison_options import CompareConfig
from pipelines.comparison.paired_statistics import difference, reached_at
from pipelines.comparison.paired_trainings import plan_trainings, read_log
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from pipelines.evaluation import make_reference
from pipelines.evaluation.evaluation_options import ReferenceConfig

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
BASE = "paper"
NUM_SCENES, NUM_HELD_BACK = 4096, 512  # the demo's scenes, and as many more for the validation loss
IMAGE_SIZE = 64
METRICS = {"validation_loss": False, "recognised": True, "fd-lite": False}  # whether higher is better

RECIPE: dict[str, Any] = {
    "condition": "class",
    "condition_dropout": 0.1,
    "data": {"held_back": 1},
    "model": {"hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 4},
    "train": {
        "num_steps": 320,
        "global_batch": 64,
        "learning_rate": 4e-3,
        "ema_decay": 0.99,
        "log_every": 20,
        "checkpoint_every": 100_000,
        "validate_every": 80,
    },
    "evaluation": {"task_score": "scenes", "num": 128, "every": 80, "guidance_scale": 2.0, "num_steps": 6},
    "deepspeed": str(CHECKOUT / "configs" / "deepspeed" / "zero1.json"),
}
"""The paper's recipe: DiT as published, uniform times, AdamW with a constant learning rate, EMA; tuned by `TUNING`."""

Changes = dict[str, Any]  # of keys such as "train.learning_rate"

UNET: Changes = {
    "model": {
        "backbone": "unet",
        "model_channels": 32,
        "channel_multipliers": [1, 2, 4],
        "num_blocks": 1,
        "attention_resolutions": [8, 4],
        "head_channels": 32,
    },
    "train.learning_rate": 2e-3,
}
"""The paper's other backbone, as in configs/demo_unet.yaml, at the best learning rate of those tried for the demo."""


def batch_16(num_samples: int, num_measurements: int) -> Changes:
    """Return what a batch of 16 changes in a budget of so many samples."""
    num_steps = num_samples // 16
    every = num_steps // num_measurements
    return {
        "train.global_batch": 16,
        "train.num_steps": num_steps,
        "train.log_every": 80,
        "train.validate_every": every,
        "evaluation.every": every,
    }


ENTRIES: dict[str, Changes] = {
    "logit-normal times": {"flow.time": "logit_normal"},
    "direction loss": {"flow.direction_weight": 1.0},
    "rope, rms, swiglu, qk-norm": {
        "model.position": "rope",
        "model.norm": "rms",
        "model.mlp": "swiglu",
        "model.qk_norm": True,
    },
    "cosine schedule, warmup": {"train.schedule": "cosine", "train.warmup_steps": 20},
    "Muon": {"train.optimizer": "muon"},
    "internal velocity 0.5": {"model.internal_head": True, "flow.internal_weight": 0.5},
    "layer alignment 0.2": {"flow.layer_sync_weight": 0.2, "flow.layer_sync_blocks": [0, 2]},
    "squared ReLU": {"model.mlp": "relu2"},
    "logit-normal, cosine, Muon": {
        "flow.time": "logit_normal",
        "train.schedule": "cosine",
        "train.warmup_steps": 20,
        "train.optimizer": "muon",
    },
    "token dropout 0.5": {"model.token_dropout": 0.5},
}

UNET_ENTRIES: dict[str, Changes] = {"ADM U-Net": UNET, "ADM U-Net, batch 16": {**UNET, **batch_16(20_480, 8)}}

TUNING: dict[str, Changes] = {
    **{f"learning rate {rate:g}": {"train.learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)},
    "EMA 0.95": {"train.ema_decay": 0.95},
    "EMA 0.995": {"train.ema_decay": 0.995},
    "batch 32": {"train.global_batch": 32, "train.num_steps": 640, "train.learning_rate": 2.8e-3},
}


LONG: Changes = {"train.num_steps": 960, "train.validate_every": 240, "evaluation.every": 240}
"""What the longer budget changes of the recipe and of every entry."""

LONG_ENTRIES: dict[str, Changes] = {
    "logit-normal times, Muon": {"flow.time": "logit_normal", "train.optimizer": "muon"},
    "logit-normal times, Muon, internal velocity 0.5": {
        "flow.time": "logit_normal",
        "train.optimizer": "muon",
        "model.internal_head": True,
        "flow.internal_weight": 0.5,
    },
    "logit-normal times, Muon, layer alignment 0.2": {
        "flow.time": "logit_normal",
        "train.optimizer": "muon",
        "flow.layer_sync_weight": 0.2,
        "flow.layer_sync_blocks": [0, 2],
    },
}

LONG_TUNING: dict[str, Changes] = {
    **{f"learning rate {rate:g}": {"train.learning_rate": rate} for rate in (2e-3, 8e-3)},
    "cosine schedule, warmup": {"train.schedule": "cosine", "train.warmup_steps": 20},
}


PHOTOGRAPHS: Changes = {
    "train.global_batch": 32,
    "train.learning_rate": 5.6e-3,
    "train.num_steps": 960,
    "train.log_every": 40,
    "train.validate_every": 240,
    "evaluation": {"num": 256, "every": 240, "guidance_scale": 2.0, "num_steps": 10},
}
"""What photographs change of the recipe and of every entry."""

PHOTOGRAPHS_ENTRIES: dict[str, Changes] = {
    "logit-normal times": ENTRIES["logit-normal times"],
    "Muon": ENTRIES["Muon"],
    "logit-normal times, Muon": LONG_ENTRIES["logit-normal times, Muon"],
    "ADM U-Net": UNET,
    "ADM U-Net, Muon": {**UNET, "train.optimizer": "muon"},
    "direction loss": ENTRIES["direction loss"],
    "rope, rms, swiglu, qk-norm": ENTRIES["rope, rms, swiglu, qk-norm"],
    "internal velocity 0.5": ENTRIES["internal velocity 0.5"],
}

PHOTOGRAPHS_TUNING: dict[str, Changes] = {
    f"batch 64, learning rate {rate:g}": {
        "train.global_batch": 64,
        "train.learning_rate": rate,
        "train.num_steps": 480,
        "train.validate_every": 120,
        "evaluation.every": 120,
    }
    for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
}


@dataclass(frozen=True)
class Record:
    """One table of the record: its name, the entries, the candidates of tuning, and what its budget changes of the recipe."""

    name: str
    entries: dict[str, Changes]
    tuning: dict[str, Changes]
    budget: Changes


RECORDS = {
    record.name: record
    for record in (
        Record("record", ENTRIES, TUNING, {}),
        Record("record_unet", UNET_ENTRIES, TUNING, {}),
        Record("record_long", LONG_ENTRIES, LONG_TUNING, LONG),
        Record("record_photographs", PHOTOGRAPHS_ENTRIES, PHOTOGRAPHS_TUNING, PHOTOGRAPHS),
    )
}


def scenes(folder: Path, num: int, num_held_back: int) -> Path:
    """Return latents of drawn scenes, made once, whose last shard holds `num_held_back` samples."""
    images, raw, latents = folder / "scenes", folder / "raw", folder / "latents"
    draw_scenes.run(draw_scenes.ScenesConfig(str(images), num=num + num_held_back))
    shard.run(shard.ShardConfig(str(images / "images"), str(raw), image_size=64, samples_per_shard=num))
    encode.run(encode.EncodeConfig(str(raw), str(latents)), World())
    return latents


def photographs(folder: Path, images: Path) -> Path:
    """Return latents of a folder of images, made once, whose last shard holds an eighth of the samples."""
    raw, encoded = folder / "raw", folder / "latents"
    num_training = sum(path.is_file() for path in images.rglob("*")) * 7 // 8
    shard.run(shard.ShardConfig(str(images), str(raw), image_size=IMAGE_SIZE, samples_per_shard=num_training))
    encode.run(encode.EncodeConfig(str(raw), str(encoded), flips=True), World())
    return encoded


def reference(folder: Path, test: Path) -> Path:
    """Return the reference of fd-lite made of the test images."""
    out = folder / "test.safetensors"
    make_reference.run(ReferenceConfig(str(test), str(out), image_size=IMAGE_SIZE), World())
    return out


def write_config(folder: Path, name: str, changes: Changes) -> Path:
    """Write the recipe with some changes as FOLDER/NAME.yaml, and return its path."""
    content: dict[str, Any] = json.loads(json.dumps(RECIPE))
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (content.setdefault(section, {}) if section else content)[last] = value
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    return path


def measure(
    out: Path, name: str, changes: Changes, seeds: int, overrides: tuple[str, ...], budget: Changes
) -> dict[str, Any]:
    """Train the recipe and one entry as far as they are not trained yet, and return the entry's line of the record."""
    configs = [write_config(out / "configs", BASE, {"run": "unused", **budget})]
    if name != BASE:
        configs.append(write_config(out / "configs", name, {"run": "unused", **budget, **changes}))
    config = CompareConfig(tuple(map(str, configs)), str(out / "runs"), seeds=seeds, overrides=overrides, num_gpus=1)
    compare(config)
    trainings = [training for training in plan_trainings(config) if training.name == configs[-1].stem]
    report = comparison_report.build(trainings)["configurations"][0]
    lines = [line for training in trainings for line in read_log(training.folder)]
    return {
        "name": name,
        "changes": changes,
        "seeds": report["seeds"],
        "num_samples": report["num_samples"],
        "training_flops": report["training_flops"],
        # The median, since other jobs on the machine slow some intervals down.
        "cpu_seconds_per_sample": statistics.median(line["cpu_seconds_per_sample"] for line in lines),
        "curves": {
            metric: [curve["samples"] for curve in report[metric]["curves"]] for metric in METRICS if metric in report
        },
    }


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the record by name, the newest of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def final(line: dict[str, Any], metric: str) -> list[float]:
    """Return the last measurement of each seed."""
    return [curve[-1][1] for curve in line["curves"][metric]]


def samples_to_target(base: dict[str, Any], line: dict[str, Any], metric: str) -> float | None:
    """Return where the mean curve of an entry reaches the recipe's final mean, as a share of the recipe's samples."""
    curves = np.array(line["curves"][metric])  # (seeds, points, 2)
    mean = [(float(x), float(y)) for x, y in curves.mean(0)]
    target = statistics.fmean(final(base, metric))
    reached = reached_at(mean, target, higher_is_better=METRICS[metric])
    return None if reached is None else reached / base["num_samples"]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the record as a table in Markdown."""
    base = results[BASE]
    loss, quality = base["curves"]  # the validation loss, and what is measured on images
    rows = [
        f"| entry | seeds | validation loss | difference (p) | {quality} | difference (p) | FLOPs per sample "
        "| CPU time per sample | samples to the loss | CPU seconds to the loss "
        f"| samples to the {quality} | CPU seconds to it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in results.values():
        cells = [line["name"], str(len(line["seeds"]))]
        for metric in (loss, quality):
            values = final(line, metric)
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
            count = min(len(values), len(final(base, metric)))
            higher = METRICS[metric]
            test = difference(final(base, metric)[:count], values[:count], paired=True, higher_is_better=higher)
            p = "" if count < 2 else " (< 0.001)" if test.p < 0.0005 else f" ({test.p:.3f})"
            cells.append("" if line is base else f"{test.mean:+.3f}{p}")
        cost = line["cpu_seconds_per_sample"] / base["cpu_seconds_per_sample"]
        flops = line["training_flops"] / line["num_samples"] / (base["training_flops"] / base["num_samples"])
        cells += [f"{flops:.2f}", f"{cost:.2f}"]
        for metric in (loss, quality):
            reached = samples_to_target(base, line, metric)
            cells += ["not reached", ""] if reached is None else [f"{reached:.2f}", f"{reached * cost:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_document(results: dict[str, dict[str, Any]], document: Path, name: str) -> None:
    """Replace the table of this name in the document, and draw its plot NAME.png beside it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text() if document.exists() else f"{begin}\n{end}\n"
    before, found, rest = text.partition(begin)
    assert found, f"{document} has no {begin}"
    document.write_text(f"{before}{begin}\n{table(results)}\n{end}{rest.partition(end)[2]}")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    metrics = list(results[BASE]["curves"])
    panels = figure.subplots(1, len(metrics))
    for panel, metric in zip(panels, metrics, strict=True):
        for number, line in enumerate(results.values()):
            mean = np.array(line["curves"][metric]).mean(0)
            style = {"color": "black", "linewidth": 2.5} if line["name"] == BASE else {"color": f"C{number % 10}"}
            panel.plot(mean[:, 0], mean[:, 1], label=line["name"], **style)
        panel.axhline(statistics.fmean(final(results[BASE], metric)), color="black", linestyle=":", linewidth=1)
        panel.set_xlabel("samples seen")
        panel.set_ylabel(metric)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(document.with_name(f"{name}.png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--images", type=Path, help="training photographs in class folders; by default drawn scenes")
    parser.add_argument("--test", type=Path, help="photographs of the reference, with --images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of entries; by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="train three times as long")
    parser.add_argument("--unet", action="store_true", help="train the paper's other backbone")
    parser.add_argument("--tune", action="store_true", help="train the candidates of the recipe instead, one seed each")
    parser.add_argument("--results", type=Path, help="folder of record.jsonl and record.md; by default those here")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    if bool(options.images) != bool(options.test):
        parser.error("give --images and --test together, or neither for drawn scenes")
    name = "photographs" if options.images else "long" if options.long else "unet" if options.unet else ""
    record = RECORDS[f"record_{name}" if name else "record"]
    out = data_folder = options.out.absolute()
    if record.budget:
        out = out / record.name.removeprefix("record_")
    results, document = HERE / f"{record.name}.jsonl", CHECKOUT / "docs" / "record.md"
    if options.dry_run or options.results or options.tune:
        folder = (options.results or out).absolute()
        results, document = folder / f"{record.name}.jsonl", folder / f"{record.name}.md"
    entries, num, num_held_back = (record.tuning if options.tune else record.entries), NUM_SCENES, NUM_HELD_BACK
    overrides: tuple[str, ...] = ()
    seeds = 1 if options.tune else options.seeds
    if options.dry_run:
        num = num_held_back = 64
        seeds, overrides = 2, ("train.num_steps=2", "train.validate_every=1", "evaluation.every=1", "evaluation.num=2")
        options.only = [next(iter(entries))]
    if set(options.only or ()) - set(entries):
        parser.error(f"entries are {'; '.join(entries)}")
    if options.images:
        latents = options.latents or photographs(out, options.images)
        overrides = (f"evaluation.reference={reference(out, options.test)}", *overrides)
    else:
        latents = options.latents or scenes(data_folder, num, num_held_back)
    overrides = (f"data.shards={latents.absolute()}", *overrides)
    for entry in (BASE, *(options.only or entries)):
        line = measure(out, entry, entries.get(entry, {}), seeds, overrides, record.budget)
        if read_results(results).get(entry) != line:
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        write_document(read_results(results), document, record.name)
    print(table(read_results(results)))


if __name__ == "__main__":
    main()
