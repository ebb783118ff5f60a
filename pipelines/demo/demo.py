"""`lfm demo`: the whole job on drawn scenes, by the commands that a user would type.

Each stage is a process of its own, as in real work, and resumes; so does the demo. At the end the data set's recogniser
says of how many images it sees the class that was asked for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import pipelines
from lfm import storage
from lfm.errors import ConfigError, LfmError
from lfm.synthetic.scenes import recognise
from pipelines.common.progress import Progress
from pipelines.demo.demo_options import DemoConfig

CHECKOUT = Path(pipelines.__file__).parents[1]
NUM_SCENES = 4096
NUM_IMAGES = 64
IMAGE_SIZE = 64


@dataclass(frozen=True)
class DemoResult:
    """What was done, for people, and the share of images that are recognised as their class."""

    plan: str
    report: str = ""
    recognised: float = 0.0


def run(config: DemoConfig) -> DemoResult:
    """Run every stage into `out`.

    Raises:
        ConfigError: the launch file or the configuration is not there.
        LfmError: a stage failed; its own message stands above.
    """
    stages = commands(Path(config.out))
    plan = "\n".join(" ".join(command) for command in stages.values())
    if config.dry_run:
        return DemoResult(plan)
    lines = []
    for name, command in stages.items():
        print(f"\n$ {' '.join(command)}", flush=True)
        began = time.monotonic()
        if subprocess.run(command, env=_environment(_num_ranks() if name == "train" else 1)).returncode:
            raise LfmError(f"demo: the stage `{name}` failed, see above; the same command goes on from there")
        lines.append(f"{name:>8} {Progress.format_interval(time.monotonic() - began):>8}")
    samples = Path(config.out) / "samples"
    share = recognised_share(samples)
    lines.append(f"{share:.0%} of {NUM_IMAGES} images are recognised as the class that was asked for")
    return DemoResult(plan, "\n".join(["", *lines, f"the images: {samples / 'grid.png'}"]), share)


def commands(out: Path) -> dict[str, list[str]]:
    """The command of each stage, in order."""
    script, config = CHECKOUT / "launch" / "train.py", CHECKOUT / "configs" / "demo.yaml"
    for path in (script, config):
        if not path.exists():
            raise ConfigError(
                f"{path}: not found; the demo runs from a checkout of the repository, installed with pip -e"
            )
    programs = Path(sys.executable).parent
    lfm = str(programs / "lfm")
    ranks = _num_ranks()
    return {
        "scenes": [lfm, "scenes", str(out / "scenes"), "--num", str(NUM_SCENES), "--image-size", str(IMAGE_SIZE)],
        "shard": [lfm, "shard", str(out / "scenes" / "images"), str(out / "raw"), "--image-size", str(IMAGE_SIZE)],
        "encode": [lfm, "encode", str(out / "raw"), str(out / "latents")],
        "train": [
            *(str(programs / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(_free_port())),
            *("--log_level", "error", str(script)),
            *("--config", str(config), "--set", f"run={out / 'run'}", "--set", f"data.shards={out / 'latents'}"),
        ],
        "sample": [
            *(lfm, "sample", str(out / "run"), "--out", str(out / "samples"), "--seeds", f"0-{NUM_IMAGES - 1}"),
            *("--guidance-scale", "3", "--num-steps", "20"),
        ],
    }


def recognised_share(samples: Path) -> float:
    """The share of the images of a sample folder in which the recogniser sees the class that was asked for."""
    record = storage.read_json(str(samples / "samples.json"))
    seen = [recognise(np.asarray(Image.open(samples / image["file"]))) for image in record["pictures"]]
    return float(np.mean([a == b["class_index"] for a, b in zip(seen, record["pictures"], strict=True)]))


def _num_ranks() -> int:
    """A power of two, so that the batch can be shared out."""
    import torch

    most = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    return 1 << (most.bit_length() - 1)


def _environment(processes: int) -> dict[str, str]:
    """Each process has its part of the cores, and does not spin while another could work."""
    import torch

    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",
        **os.environ,
    }


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
