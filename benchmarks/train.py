"""What training costs beside its matrix products, against the same work without DeepSpeed and without cached latents.

    python benchmarks/train.py [--size S] [--rounds 5] [--batch 8] [--stages] [--dry-run]

Drawn scenes of 128 pixels are encoded to latents of 32 x 32, as of 256-pixel images. First our steps run alone, for the
data wait; then every round takes one step of each way in turn, in this process: (a) the matrix products alone, at the
rate of a large product; (b) images encoded in the loop, as without cached latents; (c) a plain PyTorch loop on the same
latents. CPU time, so that other jobs matter little; ratios are within a round. On a GPU wall time is taken. --stages: the
peak memory of each of 2 ranks under each ZeRO stage, by `launch/train.py`. --dry-run takes each way once, in
the smallest size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lfm.autoencoder import import_diffusers
from lfm.data import manifest as manifests
from lfm.flow.path import path_sample, squared_error
from lfm.models import registry
from lfm.training.engine import Engine
from lfm.training.run_folder import RunFolder
from lfm.training.step_guard import StepGuard
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import config_schema as configs
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from pipelines.training.stop_signals import StopRequest
from pipelines.training.training_loop import TrainingLoop

HERE = Path(__file__).parents[1]
ALONE = World()
STEPS_ALONE = 6


def make_latents(folder: Path, image_size: int) -> Path:
    """Latents of drawn scenes, with flips, by the embedded autoencoder."""
    draw_scenes.run(draw_scenes.ScenesConfig(str(folder / "scenes"), num=64, image_size=image_size))
    shard.run(shard.ShardConfig(str(folder / "scenes" / "images"), str(folder / "raw"), image_size=image_size))
    encode.run(encode.EncodeConfig(str(folder / "raw"), str(folder / "latents"), flips=True), ALONE)
    return folder / "latents"


def experiment(folder: Path, model: str, batch: int) -> Path:
    path = folder / "benchmark.yaml"
    path.write_text(
        f"run: {folder / 'run'}\ncondition: class\ndata: {{shards: {folder / 'latents'}}}\nmodel: {model}\n"
        f"train: {{num_steps: 4, global_batch: {batch}, gradient_clipping: 1.0, log_every: 1}}\n"
        f"deepspeed: {HERE / 'configs' / 'deepspeed' / 'zero1.json'}\n"
    )
    return path


class Ways:
    """The ways of taking one step."""

    def __init__(self, folder: Path, model: str, batch: int, pixels: int) -> None:
        self.config = configs.load(str(experiment(folder, model, batch)))
        manifest = manifests.load(self.config.data.shards, "latents")
        self.model = factory.model_config(self.config, manifest)
        settings = factory.deepspeed_settings(self.config, ALONE)
        self.engine = Engine(registry.build_network(self.model), settings, ALONE, ("ema",), StepGuard(20.0))
        self.device, self.stop_request = self.engine.device, StopRequest()
        assert manifest.autoencoder is not None
        header = WeightsHeader(
            self.model, manifest.autoencoder, manifest.image_size, manifest.classes, 0, manifest.digest, code_version()
        )
        self.training = TrainingLoop(self.config, manifest, header, self.engine, RunFolder(self.config.run))
        self.batches = self.training.stream.batches(0)
        self.plain_model = registry.build_network(self.model).to(self.device)
        self.plain_ema = [parameter.detach().clone() for parameter in self.plain_model.parameters()]
        self.optimizer = torch.optim.AdamW(self.plain_model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        # The usual autoencoder of 8 times smaller latents; its time does not depend on its weights.
        stages = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        kl = import_diffusers().AutoencoderKL(
            down_block_types=stages[0], up_block_types=stages[1], block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=4,
        )  # fmt: skip
        self.encoder = kl.to(self.device).encode
        self.images = torch.rand(batch, 3, pixels, pixels, device=self.device) * 2 - 1

        self.factor = torch.ones(*[8192 if self.device.type == "cuda" else 1024] * 2, device=self.device)
        self.limit_flops = 10 * 2 * len(self.factor) ** 3

    def limit(self) -> None:
        """Large matrix products, of `limit_flops` operations."""
        for _ in range(10):
            self.factor @ self.factor

    def ours(self) -> None:
        self.training.take_step(next(self.batches), self.stop_request)

    def plain(self) -> None:
        """The same step by a plain loop: clipping, AdamW and EMA included."""
        batch = next(self.batches)
        example = path_sample(batch.latents, batch.noise, batch.uniform)
        loss = squared_error(self.plain_model(example.state, example.time, batch.condition), example.velocity).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plain_model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.plain_ema, list(self.plain_model.parameters()), 1e-4)

    def in_loop(self) -> None:
        """Our step, with the images encoded in it."""
        with torch.no_grad():
            self.encoder(self.images)
        self.ours()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(work: Callable[[], None], device: torch.device) -> float:
    began = clock(device)
    work()
    return clock(device) - began


def peaks(folder: Path, stage: int) -> list[float]:
    """Peak memory of the main rank of 2, in GB, over what a process without a model holds."""
    settings = ("--set", f"deepspeed={HERE / 'configs' / 'deepspeed' / f'zero{stage}.json'}")
    command = [sys.executable, HERE / "launch" / "train.py", "--config", folder / "benchmark.yaml", *settings]
    run = folder / f"zero{stage}"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + stage), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*map(str, command), "--set", f"run={run}"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert not any(code for code in [process.wait() for process in ranks])
    return [json.loads(line)["peak_memory_bytes"] / 1e9 for line in (run / "log.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="S")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    image_size, pixels, steps_alone, model = 128, 256, STEPS_ALONE, f"{{size: {options.size}}}"
    if options.dry_run:
        image_size, pixels, steps_alone, model = 16, 32, 1, "{hidden_size: 32, depth: 1, num_heads: 2}"
        options.batch, options.rounds = 2, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_latents(folder, image_size)
        if options.stages:
            experiment(folder, model, options.batch)
            for stage in (1, 2, 3):
                print(f"ZeRO {stage}, 2 ranks: peak {max(peaks(folder, stage)):.2f} GB")
            return
        ways = Ways(folder, model, options.batch, pixels)
        ways.ours()
        ways.plain()
        waited, began = ways.training.stream.wait_seconds, time.perf_counter()
        for _ in range(steps_alone):
            ways.ours()
        wait = (ways.training.stream.wait_seconds - waited) / (time.perf_counter() - began)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(
                {each: timed(getattr(ways, each), ways.device) for each in ("limit", "ours", "plain", "in_loop")}
            )
            rounds[-1]["limit"] *= 3 * (ways.model.flops_per_sample or 0) * options.batch / ways.limit_flops
        ways.batches.close()
        ways.engine.close()
    print(f"DiT-{options.size}/2, batch {options.batch}, {options.rounds} rounds: median (least to most)")
    print(f"{'data wait, our steps alone':>50} {wait:8.3%}")
    for label, one, other in (
        ("(a) model FLOP utilisation: limit / ours", "limit", "ours"),
        ("(b) encoding in the loop / ours", "in_loop", "ours"),
        ("(c) ours / plain PyTorch", "ours", "plain"),
    ):
        ratios = [each[one] / each[other] for each in rounds]
        print(f"{label:>50} {statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{'seconds of our step':>50} {statistics.median(each['ours'] for each in rounds):8.3f}")


if __name__ == "__main__":
    main()
