"""Measure how many generated images are copies of training images, after training on few images and on many.

    python benchmarks/memorisation.py OUT [--num-few 100] [--num-many 3072] [--num-steps N] [--dry-run]

Trains configs/demo.yaml twice on drawn scenes, for equally many steps: on --num-few images and on --num-many. Then
`lfm evaluate --nearest` generates images with each model and compares them with its training images; the threshold is
calibrated by scenes that neither was trained on. It prints a table, and OUT/few and OUT/many hold the sheets of the nearest
images. Running the command again resumes. --dry-run trains on a few scenes for two steps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from lfm.world import World
from pipelines.common.experiment import config_file
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from pipelines.evaluation import evaluate, make_reference
from pipelines.evaluation.evaluation_options import EvaluateConfig, ReferenceConfig

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = CHECKOUT / "configs" / "demo.yaml"
NUM_HELD_BACK, NUM_GENERATED, NUM_SOLVER_STEPS = 512, 256, 20
GLOBAL_BATCH, WARMUP_STEPS = 64, 20  # as in the configuration
SEEDS = {"few": 1, "many": 0, "held-back": 2}  # of the scenes


def scenes(out: Path, name: str, num: int) -> Path:
    """Return latents of drawn scenes, made once; raw shards are in the folder beside them."""
    folder = out / name
    draw_scenes.run(draw_scenes.ScenesConfig(str(folder / "scenes"), num=num, image_size=64, seed=SEEDS[name]))
    shard.run(shard.ShardConfig(str(folder / "scenes" / "images"), str(folder / "raw"), image_size=64))
    encode.run(encode.EncodeConfig(str(folder / "raw"), str(folder / "latents")), World())
    return folder / "latents"


def train(run: Path, latents: Path, num_steps: int, global_batch: int) -> None:
    """Train the configuration on latents in a process of its own."""
    settings = {
        "run": run,
        "data.shards": latents,
        "train.num_steps": num_steps,
        "train.warmup_steps": min(num_steps, WARMUP_STEPS),
        "train.global_batch": global_batch,
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "launch/train.py", "--config", str(CONFIG), *changes]
    subprocess.run(command, check=True, cwd=CHECKOUT)


def reference(held_back: Path) -> Path:
    """Return the reference made of the images beside held-back latents."""
    out = held_back.parent / "reference.safetensors"
    make_reference.run(ReferenceConfig(str(held_back.parent / "raw"), str(out)), World())
    return out


def measure(run: Path, latents: Path, held_back: Path, num: int) -> dict[str, Any]:
    """Generate images, compare them with the training samples, and return the run's row of the report."""
    config = EvaluateConfig(
        (str(run),),
        (str(reference(held_back)),),
        str(run.parent / "report"),
        nearest=str(latents),
        held_back=str(held_back),
        num=num,
        num_steps=NUM_SOLVER_STEPS,
    )
    return evaluate.run(config, World()).report["rows"][0]


def table(rows: dict[int, dict[str, Any]]) -> str:
    """Return the measures as a table in Markdown, a line for each number of training images and each space."""
    lines = [
        "| training images | distance of | memorised | ratio (held back) | ratio below 1/3 | median distance (held back) "
        "| threshold |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, row in rows.items():
        for space in ("features", "latents"):
            values = row["nearest"][space]
            cells = [
                f"{count:,}",
                space,
                f"{values['memorised']:.1%}",
                f"{values['ratio']:.2f} ({values['held_back_ratio']:.2f})",
                f"{values['small_ratio']:.1%}",
                f"{values['nearest']:.3g} ({values['held_back_nearest']:.3g})",
                f"{values['threshold']:.3g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-few", type=int, default=100)
    parser.add_argument("--num-many", type=int, default=3072)
    parser.add_argument("--num-steps", type=int, help="by default those of the configuration")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out, counts = options.out.resolve(), {"few": options.num_few, "many": options.num_many}
    num_steps = options.num_steps or config_file.load(str(CONFIG)).train.num_steps
    num_held_back, num_generated, global_batch = NUM_HELD_BACK, NUM_GENERATED, GLOBAL_BATCH
    if options.dry_run:
        counts, num_steps, num_held_back, num_generated, global_batch = {"few": 4, "many": 8}, 2, 4, 4, 4
    held_back, rows = scenes(out, "held-back", num_held_back), {}
    for name, count in counts.items():
        latents, run = scenes(out, name, count), out / name / "run"
        train(run, latents, num_steps, global_batch)
        rows[count] = measure(run, latents, held_back, num_generated)
    print(table(rows))


if __name__ == "__main__":
    main()
