"""Compare the two backbones of the paper, DiT and U-Net, at equal CPU time: on drawn scenes, or on photographs.

    python benchmarks/backbones.py OUT [--images TRAIN --test TEST] [--num-steps 500] [--seeds 3] [--dry-run]

Trains configs/demo.yaml for --num-steps steps and configs/demo_unet.yaml for as much CPU time (its steps take longer, in the
ratio of the two files), several seeds each, by `lfm compare`. Of scenes it measures the share of images that are recognised
as their class, of photographs in class folders (TRAIN) the Frechet distance of fd-lite to those of TEST; of both the loss on a
held-back shard. It prints a table and writes OUT/backbones.json. Running the command again resumes. --dry-run trains for two
steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import record
from ruamel.yaml import YAML

from pipelines.common.experiment import config_file
from pipelines.comparison import comparison_report
from pipelines.comparison.compare import run as compare
from pipelines.comparison.comparison_options import CompareConfig
from pipelines.comparison.paired_trainings import plan_trainings, read_log

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BACKBONES = {"dit": CONFIGS / "demo.yaml", "unet": CONFIGS / "demo_unet.yaml"}
NUM_POINTS = 4  # measurements during a training
SAMPLING: dict[str, Any] = {"num": 256, "num_steps": 10, "guidance_scale": 2.0}


def write_config(out: Path, backbone: str, num_steps: int, measured: dict[str, Any]) -> Path:
    """Write the experiment of a backbone, which takes as much CPU time as `num_steps` steps of the DiT; return its path."""
    steps = {name: config_file.load(str(path)).train.num_steps for name, path in BACKBONES.items()}
    num_steps = max(1, round(num_steps * steps[backbone] / steps["dit"]))
    every = max(1, num_steps // NUM_POINTS)
    content = {
        "extends": str(BACKBONES[backbone]),
        "data": {"held_back": 1},
        "train": {"num_steps": num_steps, "validate_every": every, "warmup_steps": min(num_steps, 20)},
        "evaluation": {"every": every, **SAMPLING, **measured},
    }
    path = out / f"{backbone}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    return path


def summary(config: CompareConfig) -> dict[str, Any]:
    """Return for each backbone its number of samples, CPU seconds of training by seed, and final values by seed."""
    trainings = plan_trainings(config)
    report = comparison_report.build(trainings)
    values = {}
    for entry in report["configurations"]:
        seconds = []
        for training in trainings:
            if training.name == entry["name"]:
                seen, total = 0, 0.0
                for line in read_log(training.folder):
                    total += (line["samples_seen"] - seen) * line["cpu_seconds_per_sample"]
                    seen = line["samples_seen"]
                seconds.append(total)
        values[entry["name"]] = {
            "seeds": entry["seeds"],
            "num_samples": entry["num_samples"],
            "cpu_seconds": seconds,
            **{
                metric: {"final": entry[metric]["final"], "difference": entry[metric]["difference"]}
                for metric in report["metrics"]
            },
        }
    return {"metrics": report["metrics"], "backbones": values}


def table(result: dict[str, Any]) -> str:
    """Return the summary as a table in Markdown: mean and spread over the seeds, and p of the test against the DiT."""
    metrics = result["metrics"]
    rows = [
        f"| backbone | images seen | CPU seconds | {' | '.join(metrics)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in metrics)} |",
    ]
    for name, line in result["backbones"].items():
        cells = [name, f"{line['num_samples']:,}", _spread(line["cpu_seconds"], 0)]
        for metric in metrics:
            test = line[metric]["difference"]
            p = f" (p {test['p']:.3f})" if test and test["p"] is not None else ""
            cells.append(_spread(line[metric]["final"], 3) + p)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, help="training photographs in class folders; by default drawn scenes")
    parser.add_argument("--test", type=Path, help="photographs of the reference, with --images")
    parser.add_argument("--num-steps", type=int, default=500, help="steps of the DiT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    if bool(options.images) != bool(options.test):
        parser.error("give --images and --test together, or neither for drawn scenes")
    out = options.out.absolute()
    sizes, overrides = (record.NUM_SCENES, record.NUM_HELD_BACK), []
    if options.dry_run:
        sizes, overrides = (64, 64), ["evaluation.num=2", "train.global_batch=4"]
        options.num_steps, options.seeds = 2, 1
    data = record.photographs(out, options.images) if options.images else record.scenes(out, *sizes)
    measured = {"reference": str(record.reference(out, options.test))} if options.images else {"task_score": "scenes"}
    files = [write_config(out / "configs", backbone, options.num_steps, measured) for backbone in BACKBONES]
    config = CompareConfig(
        tuple(map(str, files)),
        str(out / "runs"),
        seeds=options.seeds,
        overrides=(f"data.shards={data}", *overrides),
        num_gpus=1,
    )
    compare(config)
    result = summary(config)
    (out / "backbones.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
