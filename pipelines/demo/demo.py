"""`lfm demo`: the whole pipeline on synthetic scenes, by the commands that a user would type.

Each stage is a separate process, as in real use, and resumes; so the demo resumes, too. At the end, the recogniser of the
scenes reports in how many images it sees the requested class.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lfm import storage
from lfm.errors import LfmError
from lfm.synthetic.scenes import recognise
from pipelines.common import launcher
from pipelines.common.experiment import shipped_experiments
from pipelines.common.progress import Progress
from pipelines.demo.demo_options import DemoConfig

NUM_SCENES = 4096
NUM_IMAGES = 64
IMAGE_SIZE = 64


@dataclass(frozen=True)
class DemoResult:
    """The commands, a report in words, and the share of images that are recognised as their class."""

    plan: str
    report: str = ""
    recognised: float = 0.0


def run(config: DemoConfig) -> DemoResult:
    """Run every stage into `out`.

    Raises:
        LfmError: a stage failed, after printing its own message.
    """
    stages = commands(Path(config.out))
    plan = "\n".join(" ".join(command) for command in stages.values())
    if config.dry_run:
        return DemoResult(plan)
    lines = [""]
    for name, command in stages.items():
        print(f"\n$ {' '.join(command)}", flush=True)
        began = time.monotonic()
        if subprocess.run(command, env=launcher.environment(_num_ranks() if name == "train" else 1)).returncode:
            raise LfmError(f"demo: the stage {name} failed, see its message above; run the same command to resume")
        lines.append(f"{name:>8} {Progress.format_interval(time.monotonic() - began):>8}")
    samples = Path(config.out) / "samples"
    share = recognised_share(samples)
    lines.append(f"{share:.0%} of {NUM_IMAGES} images are recognised as the requested class")
    lines.append(f"the images: {samples / 'grid.png'}")
    return DemoResult(plan, "\n".join(lines), share)


def commands(out: Path) -> dict[str, list[str]]:
    """Return the command of each stage, in order."""
    experiment = shipped_experiments.find("demo_quick")
    lfm = str(Path(sys.executable).parent / "lfm")
    scenes, raw, latents, training, samples = (
        str(out / name) for name in ("scenes", "raw", "latents", "run", "samples")
    )
    size = str(IMAGE_SIZE)
    overrides = (f"run={training}", f"data.shards={latents}")
    quality = ["--guidance-scale", "3", "--num-steps", "20"]
    return {
        "scenes": [lfm, "scenes", scenes, "--num", str(NUM_SCENES), "--image-size", size],
        "shard": [lfm, "shard", f"{scenes}/images", raw, "--image-size", size],
        "encode": [lfm, "encode", raw, latents],
        "train": launcher.training_command(experiment, overrides, _num_ranks()),
        "sample": [lfm, "sample", training, "--out", samples, "--seeds", f"0-{NUM_IMAGES - 1}", *quality],
    }


def recognised_share(samples: Path) -> float:
    """The share of the images of a sample folder in which the recogniser sees the requested class."""
    images = storage.read_json(str(samples / "samples.json"))["pictures"]
    correct = [recognise(np.asarray(Image.open(samples / image["file"]))) == image["class_index"] for image in images]
    return float(np.mean(correct))


def _num_ranks() -> int:
    """A power of two, so that it divides the global batch."""
    import torch

    devices = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    return 1 << (devices.bit_length() - 1)
