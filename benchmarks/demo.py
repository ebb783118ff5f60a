"""Compare what `lfm demo` trains with the paper's DiT on the same scenes: share recognised, and CPU time of the training.

    python benchmarks/demo.py OUT [--seeds 3] [--dry-run]

Trains configs/demo.yaml, the DiT, and configs/demo_quick.yaml, several seeds each, by `lfm compare`. Four times during each
training, 256 images of the EMA weights are made as the demo makes its images. It prints a table. Running the command again
resumes. --dry-run trains for two steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import backbones
import record
from ruamel.yaml import YAML

from pipelines.common.experiment import config_file
from pipelines.comparison.compare import run as compare
from pipelines.comparison.comparison_options import CompareConfig

NAMES = ("demo", "demo_quick")
NUM_POINTS = 4  # measurements during a training
SAMPLING: dict[str, Any] = {"num": 256, "num_steps": 20, "guidance_scale": 3.0, "task_score": "scenes"}


def write_config(out: Path, name: str, small: bool) -> Path:
    """Write the experiment of this name, with measurements, and return its path."""
    file = backbones.CONFIGS / f"{name}.yaml"
    num_steps = 2 if small else config_file.load(str(file)).train.num_steps
    every = max(1, num_steps // NUM_POINTS)
    content = {
        "extends": str(file),
        "data": {"held_back": 1},
        "train": {"num_steps": num_steps, "validate_every": every, "warmup_steps": min(num_steps, 20)},
        "evaluation": {**SAMPLING, "every": every} | ({"num": 2, "num_steps": 1} if small else {}),
    }
    path = out / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        YAML(typ="safe", pure=True).dump(content, stream)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out, small = options.out.absolute(), options.dry_run
    latents = record.scenes(out, *((64, 64) if small else (record.NUM_SCENES, record.NUM_HELD_BACK)))
    files = [str(write_config(out / "configs", name, small)) for name in NAMES]
    overrides = (f"data.shards={latents}", *(("train.global_batch=4",) if small else ()))
    config = CompareConfig(
        tuple(files), str(out / "runs"), seeds=1 if small else options.seeds, overrides=overrides, num_gpus=1
    )
    compare(config)
    print(backbones.table(backbones.summary(config)))


if __name__ == "__main__":
    main()
