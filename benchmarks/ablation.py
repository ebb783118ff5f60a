"""What each option beyond the paper does to the loss: trained on the same latents for the same samples, by the command.

    python benchmarks/ablation.py OUT [--num-steps 300] [--latents FOLDER --held-back FOLDER] [--only NAME ...]
                                      [--reference FILE --num 500] [--dry-run]

Without latents of one's own, drawn scenes are made in OUT by the demo's stages. Every option of OPTIONS, or those named,
is trained by launch/train.py over the same order of samples, and resumes. Then its EMA meets latents that it never saw,
with the same noise and the same uniform times for all: the mean squared error of the velocity, whatever was trained on.
"another seed" is the paper's network with other initial weights and draws: differences that are not larger mean nothing.
With a reference (of `lfm reference`), `lfm evaluate` measures the kernel distance of as many images of each run too.
--dry-run trains one option for two steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from lfm.data import manifest as manifests
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.flow.path import path_sample, squared_error
from lfm.models import registry
from lfm.models.network import VelocityNetwork
from lfm.storage.cache import Cache
from lfm.types import LatentBatch
from lfm.weights_file import load_weights
from lfm.world import World
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes

CHECKOUT = Path(__file__).parents[1]
BATCH, WARMUP_STEPS = 32, 20
SMALL = ["condition=none", "condition_dropout=0", "model.size=null", "model.hidden_size=128", "model.depth=4"]
SMALL += ["model.num_heads=2", "model.patch_size=2", "flow.time=uniform", f"train.global_batch={BATCH}"]
SMALL += ["train.learning_rate=1.0e-3", "train.checkpoint_every=1000000"]
OPTIONS: dict[str, list[str]] = {
    "the paper's": [],
    "another seed": ["train.seed=1"],
    "rope": ["model.position=rope"],
    "qk_norm": ["model.qk_norm=true"],
    "rms": ["model.norm=rms"],
    "swiglu": ["model.mlp=swiglu"],
    "logit_normal": ["flow.time=logit_normal"],
    "time_shift 2": ["flow.time_shift=2"],
    "direction_weight 1": ["flow.direction_weight=1"],
    "coupling_group 16": ["flow.coupling_group=16"],
    "token_dropout 0.5": ["model.token_dropout=0.5"],
}
OPTIONS["modern"] = [change for name in ("rope", "qk_norm", "rms", "swiglu", "logit_normal", "direction_weight 1")
                     for change in OPTIONS[name]]  # fmt: skip


def lfm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pipelines.cli.main", *map(str, arguments)], check=True, cwd=CHECKOUT)


def scenes(folder: Path, num: int, seed: int) -> Path:
    """Latents of drawn scenes, made once."""
    images, raw, latents = folder / "scenes", folder / "raw", folder / "latents"
    draw_scenes.run(draw_scenes.ScenesConfig(str(images), num=num, seed=seed))
    shard.run(shard.ShardConfig(str(images / "images"), str(raw), image_size=64))
    encode.run(encode.EncodeConfig(str(raw), str(latents)), World())
    return latents


def train(run: Path, latents: Path, num_steps: int, changes: list[str]) -> VelocityNetwork:
    """The model whose weights are the run's EMA."""
    length = [f"train.num_steps={num_steps}", f"train.warmup_steps={min(num_steps, WARMUP_STEPS)}"]
    changes = [f"run={run}", f"data.shards={latents}", *length, *SMALL, *changes]
    settings = [part for change in changes for part in ("--set", change)]
    script, config = CHECKOUT / "launch" / "train.py", CHECKOUT / "configs" / "demo.yaml"
    subprocess.run([sys.executable, script, "--config", config, *settings], check=True, stdout=subprocess.DEVNULL)
    tensors, header = load_weights(str(run))
    model = registry.build_network(header.model).eval()
    model.load_state_dict(tensors)
    return model


def fixed_batches(latents: Path, num: int) -> list[LatentBatch]:
    """The same samples, noise and times in every run of this benchmark."""
    manifest = manifests.load(str(latents), "latents")
    stream = LatentStream(
        single_source(str(latents), manifest), StreamOptions(seed=12_345, global_batch=BATCH), World(), Cache()
    )
    with closing(stream.batches(0)) as batches:
        return list(islice(batches, num // BATCH))


@torch.no_grad()
def fixed_loss(model: VelocityNetwork, batches: list[LatentBatch]) -> float:
    losses = []
    for batch in batches:
        sample = path_sample(batch.latents, batch.noise, batch.uniform)
        losses.append(squared_error(model(sample.state, sample.time, batch.condition), sample.velocity))
    return float(torch.cat(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(OPTIONS)}; by default all")
    parser.add_argument("--num-steps", type=int, default=300, help=f"of {BATCH} samples")
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--held-back", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--num", type=int, default=500, help="images of each run, against the reference")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    num_scenes, num_held_back = 4096, 512
    if options.dry_run:
        options.only, options.num_steps, num_scenes, num_held_back = ["the paper's"], 2, BATCH, BATCH
    if set(options.only or ()) - set(OPTIONS) or (options.latents is None) != (options.held_back is None):
        parser.error(f"names are {', '.join(OPTIONS)}; --latents and --held-back belong together")
    out = options.out.absolute()
    latents = options.latents or scenes(out / "train", num=num_scenes, seed=0)
    held_back = options.held_back or scenes(out / "held-back", num=num_held_back, seed=1)
    batches = fixed_batches(held_back, num=num_held_back)
    names = ["the paper's", *(name for name in options.only or OPTIONS if name != "the paper's")]
    losses: dict[str, float] = {}
    folders = {name: out / "runs" / f"{name.replace(' ', '-')}-{options.num_steps}" for name in names}
    print(f"{options.num_steps} steps of {BATCH}; loss at fixed noise of {len(batches) * BATCH} samples never seen")
    print(f"{'':>20} {'loss':>8} {'difference':>11} {'parameters':>11} {'FLOPs/sample':>13}")
    for name in names:
        model = train(folders[name], latents, options.num_steps, OPTIONS[name])
        losses[name] = fixed_loss(model, batches)
        change = losses[name] / losses["the paper's"] - 1
        cost = model.config.flops_per_sample
        print(f"{name:>20} {losses[name]:8.4f} {change:>+11.2%} {model.num_parameters:>11,} {cost:>13.3g}", flush=True)
    (out / f"ablation-{options.num_steps}.json").write_text(json.dumps(losses, indent=1))
    if options.reference:
        measured = ("--reference", options.reference.absolute(), "--metrics", "kid", "--num", options.num)
        lfm("evaluate", *folders.values(), *measured, "--out", out / f"evaluation-{options.num_steps}")


if __name__ == "__main__":
    main()
