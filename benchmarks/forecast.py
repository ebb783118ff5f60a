"""What `--dry-run` forecasts, against what is measured: memory, disk space and time of training and of encoding, on a CPU.

    python benchmarks/forecast.py [--out forecast.json] [--cases NAME ...] [--stages 1 2 3] [--dry-run]

Each network of `CASES` is trained for five steps, with two checkpoints, by two ranks of one thread under each ZeRO stage, on
latents of 16 x 16. Memory is the peak of the main rank; disk space that of the run folder at the end; time is CPU time of the
main rank, so that other jobs on the machine matter little, and its forecast is the mean of one right before and one right after
the training. --dry-run takes the smallest size at one stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lfm.data import manifest as manifests
from lfm.models import registry
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.data import encode, shard
from pipelines.data.encode_images import ImageEncoder
from pipelines.demo import draw_scenes
from pipelines.training import forecast
from pipelines.training.forecast import PlannedTraining
from pipelines.training.training_loop import averages

HERE = Path(__file__).parents[1]
CPU = torch.device("cpu")
NUM_RANKS, NUM_STEPS, CHECKPOINT_EVERY = 2, 5, 3
LIMITS = {"memory": 0.15, "disk": 0.05, "time": 0.2}  # largest error that is allowed


@dataclass(frozen=True)
class Case:
    """A network, and the samples of one forward pass."""

    model: str
    micro_batch: int


CASES = {
    "DiT, width 384": Case("{hidden_size: 384, depth: 12, num_heads: 6}", 16),
    "DiT, width 512": Case("{hidden_size: 512, depth: 12, num_heads: 8}", 16),
    "DiT, width 768": Case("{hidden_size: 768, depth: 12, num_heads: 12}", 8),
    "U-Net, 128 channels": Case(
        "{backbone: unet, model_channels: 128, channel_multipliers: [1, 2, 3], attention_resolutions: [8, 4]}", 8
    ),
}
SMALLEST = {"DiT, width 64": Case("{hidden_size: 64, depth: 2, num_heads: 2}", 2)}

# Prints the peak memory of encoding in bytes, and the CPU time of doing it a second time.
ENCODE = """
import re, sys, time
from lfm.world import World
from pipelines.data.encode import EncodeConfig, run
if __name__ == "__main__":
    for dest in (sys.argv[2] + "-before", sys.argv[2]):
        start = time.process_time()
        run(EncodeConfig(sys.argv[1], dest, batch_size=int(sys.argv[3])), World())
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print(int(peak) * 1024, time.process_time() - start)
"""


@dataclass(frozen=True)
class Comparison:
    """A forecast and what was measured."""

    name: str
    quantity: str  # key of LIMITS
    forecast: float  # bytes, or seconds
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the forecast."""
        return self.forecast / self.measured - 1

    def row(self) -> str:
        scale, unit = (1, "s") if self.quantity == "time" else (1e9, "GB")
        numbers = f"{self.forecast / scale:.4g} {unit} | {self.measured / scale:.4g} {unit} | {self.error:+.1%}"
        return f"| {self.name} | {self.quantity} | {numbers} |"


def experiment(folder: Path, case: Case, stage: int) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(
        f"run: {folder / 'run'}\ncondition: class\ndata: {{shards: {folder / 'latents'}}}\nmodel: {case.model}\n"
        f"train: {{num_steps: {NUM_STEPS}, global_batch: {case.micro_batch * NUM_RANKS}, gradient_clipping: 1.0, "
        f"log_every: 1, checkpoint_every: {CHECKPOINT_EVERY}}}\n"
        f"deepspeed: {HERE / 'configs' / 'deepspeed' / f'zero{stage}.json'}\n"
    )
    return path


def planned(path: Path) -> PlannedTraining:
    """Return what `--dry-run` would make its forecast of."""
    config = factory.with_precision(config_file.load(str(path)), CPU)
    mixture = factory.load_mixture(config)
    network = registry.build_network(factory.model_config(config, mixture.manifest))
    settings = factory.deepspeed_settings(config, World(size=NUM_RANKS))
    return PlannedTraining(config, settings, mixture, network, len(averages(config.train)), NUM_RANKS, on_gpu=False)


def train(path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
    command = [sys.executable, str(HERE / "launch" / "train.py"), "--config", str(path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    errors = [process.communicate()[1] for process in ranks]
    assert not any(process.returncode for process in ranks), errors[0][-2000:]


def compare_training(folder: Path, name: str, case: Case, stage: int) -> list[Comparison]:
    name = f"{name}, ZeRO {stage}"
    path = experiment(folder, case, stage)
    plan = planned(path)
    num_samples = NUM_STEPS * case.micro_batch * NUM_RANKS
    memory, disk = sum(forecast.memory(plan).device.values()), sum(forecast.disk(plan).values())

    def seconds() -> float:
        return num_samples / forecast.measured_rate(plan, CPU, time.process_time)

    before = seconds()
    train(path)
    expected = (before + seconds()) / 2
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = statistics.median(line["cpu_seconds_per_sample"] for line in lines) * num_samples
    written = [path for path in run.rglob("*") if path.is_file()]
    comparisons = [
        Comparison(name, "memory", memory, lines[-1]["peak_memory_bytes"]),
        Comparison(name, "disk", disk, sum(path.stat().st_size for path in written)),
        Comparison(name, "time", expected, measured),
    ]
    shutil.rmtree(run)
    return comparisons


def compare_encoding(folder: Path, batch_size: int) -> list[Comparison]:
    name = f"encoding {batch_size} images at once"
    config = encode.EncodeConfig(str(folder / "raw"), str(folder / f"encoded-{batch_size}"), batch_size=batch_size)
    raw = manifests.load(config.raw, "raw")
    encoder = ImageEncoder(factory.autoencoder(config.autoencoder, World(), config.precision), config.flips)
    memory, disk = sum(encode.memory(config, raw, encoder).values()), encode.disk_bytes(raw, encoder)

    def seconds() -> float:
        return raw.num_samples / encode.measured_rate(config, raw, encoder, time.process_time)

    before = seconds()
    command = [sys.executable, "-c", ENCODE, config.raw, config.dest, str(batch_size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    expected = (before + seconds()) / 2
    peak, measured = map(float, done.stdout.split()[-2:])
    return [
        Comparison(name, "memory", memory, peak),
        Comparison(name, "disk", disk, sum(path.stat().st_size for path in Path(config.dest).glob("*.tar"))),
        Comparison(name, "time", expected, measured),
    ]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model or platform.machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("forecast.json"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    num_images, batches = 512, [32, 256]
    if options.dry_run:
        cases, options.stages, num_images, batches = SMALLEST, [1], 64, [8]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    comparisons: list[Comparison] = []

    def add(more: list[Comparison]) -> None:
        comparisons.extend(more)
        print("\n".join(each.row() for each in more), flush=True)
        rows = [{**asdict(each), "error": each.error} for each in comparisons]
        options.out.write_text(json.dumps({"machine": machine(), "comparisons": rows}, indent=1) + "\n")

    print(f"{machine()}\n| | | forecast | measured | error |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_scenes.run(draw_scenes.ScenesConfig(str(folder / "scenes"), num=num_images, image_size=64))
        shard.run(shard.ShardConfig(str(folder / "scenes" / "images"), str(folder / "raw"), image_size=64))
        for batch_size in batches:
            add(compare_encoding(folder, batch_size))
        encode.run(encode.EncodeConfig(str(folder / "raw"), str(folder / "latents")), World())
        for label, case in cases.items():
            for stage in options.stages:
                add(compare_training(folder, label, case, stage))
    for quantity, limit in LIMITS.items():
        errors = [each for each in comparisons if each.quantity == quantity]
        worst = max(errors, key=lambda each: abs(each.error))
        within = sum(abs(each.error) <= limit for each in errors)
        print(
            f"{quantity}: {within} of {len(errors)} within {limit:.0%}; the worst is {worst.name}, {worst.error:+.1%}"
        )


if __name__ == "__main__":
    main()
