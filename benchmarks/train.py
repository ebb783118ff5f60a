"""What training costs beside its matrix products, against the same work without DeepSpeed and without cached latents.

    python benchmarks/train.py [--backbone dit|unet] [--size S] [--rounds 5] [--batch 8] [--no-encoding] [--stages]
        [--dry-run]

Drawn scenes of 128 pixels are encoded to latents of 32 x 32, as of 256-pixel images. First our steps run alone, for the
data wait; then every round takes one step of each way in turn, in this process: (a) the matrix products alone, at the
rate of a large product; (b) images encoded in the loop, as without cached latents, which takes most of the time and is left
out with --no-encoding; (c) a plain PyTorch loop on the same latents; (d) the convolutions, linear layers and attention
products of the network alone, forwards and backwards, in their own shapes. CPU time, so that other jobs matter little;
ratios are within a round. On a GPU wall time is taken. --stages: the peak memory of each of 2 ranks under each ZeRO stage,
by `launch/train.py`. --dry-run takes each way once, in the smallest size.
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
from torch import Tensor, nn

from lfm.autoencoder import import_diffusers
from lfm.flow.path import path_sample, squared_error
from lfm.models import registry
from lfm.models.attention import SelfAttention
from lfm.training.engine import Engine
from lfm.training.run_folder import RunFolder
from lfm.training.step_guard import StepGuard
from lfm.types import LatentBatch
from lfm.weights_file import WeightsHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.common.provenance import code_version
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from pipelines.training.stop_signals import StopRequest
from pipelines.training.training_loop import TrainingLoop

HERE = Path(__file__).parents[1]
ALONE = World()
STEPS_ALONE = 6
# The `model:` section of each backbone, and its smallest size.
MODELS = {
    "dit": ("{{size: {size}}}", "{hidden_size: 32, depth: 1, num_heads: 2}"),
    "unet": (  # a quarter of the width of the paper's
        "{{backbone: unet, model_channels: 64}}",
        "{backbone: unet, model_channels: 16, channel_multipliers: [1, 2], attention_resolutions: [4], head_channels: 16}",
    ),
}


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


class Products:
    """The convolutions, linear layers and attention products of a network, on inputs of the shapes that they have in it."""

    def __init__(self, network: nn.Module, forward: Callable[[], Tensor]) -> None:
        self.layers: list[tuple[nn.Module, Tensor, Tensor]] = []  # layer, input and gradient of the output
        self.attentions: list[tuple[Tensor, Tensor, Tensor]] = []  # query, key and value
        kinds = (nn.Conv2d, nn.Linear, SelfAttention)
        hooks = [
            module.register_forward_hook(self._remember) for module in network.modules() if isinstance(module, kinds)
        ]
        forward()
        for hook in hooks:
            hook.remove()

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = inputs[0].detach().clone().requires_grad_()
        if not isinstance(module, SelfAttention):
            self.layers.append((module, tokens, torch.ones_like(output)))
            return
        heads = (
            tokens.detach().unflatten(-1, (module.num_heads, -1)).transpose(1, 2).contiguous()
        )  # (B, heads, tokens, d)
        query, key, value = (heads.clone().requires_grad_() for _ in range(3))
        self.attentions.append((query, key, value))

    def run(self) -> None:
        """Compute each product forwards and backwards."""
        for layer, inputs, gradient in self.layers:
            torch.autograd.grad(layer(inputs), [inputs, *layer.parameters()], gradient)
        for query, key, value in self.attentions:
            mixed = query @ key.transpose(-2, -1) @ value
            torch.autograd.grad(mixed, [query, key, value], value.detach())


class Ways:
    """The ways of taking one step."""

    def __init__(self, folder: Path, model: str, batch: int, pixels: int) -> None:
        self.config = config_file.load(str(experiment(folder, model, batch)))
        mixture = factory.load_mixture(self.config)
        manifest = mixture.manifest
        self.model = factory.model_config(self.config, manifest)
        settings = factory.deepspeed_settings(self.config, ALONE)
        self.engine = Engine(registry.build_network(self.model), settings, ALONE, ("ema",), StepGuard(20.0))
        self.device, self.stop_request = self.engine.device, StopRequest()
        assert manifest.autoencoder is not None
        header = WeightsHeader(
            self.model, manifest.autoencoder, manifest.image_size, manifest.classes, 0, manifest.digest, code_version()
        )
        self.training = TrainingLoop(self.config, mixture, header, self.engine, RunFolder(self.config.run))
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

        batch_of_data = next(self.batches)
        self.products = Products(self.plain_model, lambda: self.plain_velocity(batch_of_data)[1])
        self.factor = torch.ones(*[8192 if self.device.type == "cuda" else 1024] * 2, device=self.device)
        self.limit_flops = 10 * 2 * len(self.factor) ** 3

    def limit(self) -> None:
        """Large matrix products, of `limit_flops` operations."""
        for _ in range(10):
            self.factor @ self.factor

    def ours(self) -> None:
        self.training.take_step(next(self.batches), self.stop_request)

    def alone(self) -> None:
        """The convolutions and matrix products of the network alone."""
        self.products.run()

    def plain_velocity(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """Return the target and the plain network's velocity."""
        example = path_sample(batch.latents, batch.noise, batch.uniform)
        return example.velocity, self.plain_model(example.state, example.time, batch.condition)

    def plain(self) -> None:
        """The same step by a plain loop: clipping, AdamW and EMA included."""
        target, velocity = self.plain_velocity(next(self.batches))
        squared_error(velocity, target).mean().backward()
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
    parser.add_argument("--backbone", choices=MODELS, default="dit")
    parser.add_argument("--size", default="S", help="of the DiT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-encoding", action="store_true", help="leave out (b)")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    normal, smallest = MODELS[options.backbone]
    image_size, pixels, steps_alone, model = 128, 256, STEPS_ALONE, normal.format(size=options.size)
    if options.dry_run:
        image_size, pixels, steps_alone, model = 32, 64, 1, smallest
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
            names = ["limit", "alone", "ours", "plain"] + ([] if options.no_encoding else ["in_loop"])
            rounds.append({each: timed(getattr(ways, each), ways.device) for each in names})
            rounds[-1]["limit"] *= 3 * (ways.model.flops_per_sample or 0) * options.batch / ways.limit_flops
        ways.batches.close()
        ways.engine.close()
    name = f"DiT-{options.size}/2" if options.backbone == "dit" else f"{options.backbone} {model}"
    print(f"{name}, batch {options.batch}, {options.rounds} rounds: median (least to most)")
    print(f"{'data wait, our steps alone':>50} {wait:8.3%}")
    for label, one, other in (
        ("(a) model FLOP utilisation: limit / ours", "limit", "ours"),
        ("(b) encoding in the loop / ours", "in_loop", "ours"),
        ("(c) ours / plain PyTorch", "ours", "plain"),
        ("(d) ours / convolutions and products alone", "ours", "alone"),
    ):
        if not {one, other} <= rounds[0].keys():
            continue
        ratios = [each[one] / each[other] for each in rounds]
        print(f"{label:>50} {statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{'seconds of our step':>50} {statistics.median(each['ours'] for each in rounds):8.3f}")


if __name__ == "__main__":
    main()
