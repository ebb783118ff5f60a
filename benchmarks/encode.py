"""What the stage `lfm encode` adds to the bare network, and what a loop over single images costs.

    python benchmarks/encode.py RAW [--autoencoder NAME | --sd] [--num 256] [--batch-size 16] [--precision fp32] [--repeats 3]
                                [--dry-run]

Each repeat runs, in turn, in this process and on the same images: (a) the autoencoder's encoder on batches that are ready
in memory; (b) the stage, from raw shards to latent shards; (c) a loop at batch size 1 that writes a .npy per image, as
scripts for this do. --sd takes the architecture of Stable Diffusion's autoencoder (f8c4, 84 million weights) with random
weights. All times are wall time; ratios are within a repeat, and their median and spread is printed. --dry-run takes each
way once, with two images.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lfm import autoencoder as autoencoders
from lfm.autoencoder import Autoencoder, import_diffusers
from lfm.data import manifest as manifests
from lfm.data.manifest import Manifest
from lfm.data.raw_shards import read_raw
from lfm.world import World
from pipelines.common import factory
from pipelines.data.encode import EncodeConfig, run

SD = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


def some_shards(raw: str, num: int, folder: Path) -> tuple[Manifest, np.ndarray]:
    """A data set of the first shards that hold `num` images, and these images: uint8 (N, H, W, 3)."""
    manifest, images = manifests.load(raw, "raw"), []
    shards = [s for i, s in enumerate(manifest.shards) if sum(r.samples for r in manifest.shards[:i]) < num]
    for shard in shards:
        shutil.copy(Path(raw) / shard.name, folder)
        with (folder / shard.name).open("rb") as stream:
            images += [sample.image for sample in read_raw(stream, shard.name)]
    # The index of columns covers all shards, so a part of them goes without.
    part = manifest.model_copy(update={"shards": tuple(shards), "columns": None})
    manifests.publish(str(folder), part)
    return part, np.stack(images)


def network(autoencoder: Autoencoder, images: np.ndarray, batch_size: int) -> None:
    """The bare network on ready batches."""
    for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size):
        autoencoder.encode(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def single(autoencoder: Autoencoder, folder: Path, dest: Path, shards: tuple[str, ...]) -> None:
    """Batch size 1, and a file per image."""
    dest.mkdir()
    for name in shards:
        with (folder / name).open("rb") as stream:
            for sample in read_raw(stream, name):
                posterior = autoencoder.encode(torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None])
                np.save(
                    dest / f"{sample.key}.npy", torch.cat([posterior.mean, posterior.std], 1)[0].half().cpu().numpy()
                )


def timed(work: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw")
    parser.add_argument("--autoencoder", default="embedded")
    parser.add_argument("--sd", action="store_true")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    if options.dry_run:
        options.num, options.batch_size, options.repeats = 2, 2, 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.sd:
            options.autoencoder = str(folder / "sd")
            import_diffusers().AutoencoderKL(**SD).save_pretrained(options.autoencoder)
        (folder / "raw").mkdir()
        part, images = some_shards(options.raw, options.num, folder / "raw")
        autoencoder = factory.autoencoder(options.autoencoder, World(), options.precision)
        network(autoencoder, images[: options.batch_size], options.batch_size)  # warm
        rows: dict[str, list[float]] = {}
        for repeat in range(options.repeats):
            config = EncodeConfig(
                str(folder / "raw"), str(folder / f"{repeat}"), options.autoencoder,
                batch_size=options.batch_size, precision=options.precision,
            )  # fmt: skip
            names = tuple(shard.name for shard in part.shards)
            times = {
                "bare network": timed(network, autoencoder, images, options.batch_size),
                "lfm encode": timed(run, config, World()),
                "one by one": timed(single, autoencoder, folder / "raw", folder / f"npy{repeat}", names),
                "loading": timed(factory.autoencoder, options.autoencoder, World(), options.precision),
            }
            stage = times["lfm encode"] - times["loading"]
            for name, seconds in times.items():
                if name != "loading":
                    rows.setdefault(f"{name}, images/s", []).append(len(images) / seconds)
            rows.setdefault("rate of the stage / bare network", []).append(times["bare network"] / stage)
            rows.setdefault("rate of the stage / one by one", []).append(times["one by one"] / stage)
        if options.precision != "fp32":
            exact = autoencoders.load(options.autoencoder, factory.device(World()))
            batch = torch.from_numpy(images[: options.batch_size]).permute(0, 3, 1, 2)
            error = (autoencoder.encode(batch).mean - exact.encode(batch).mean).square().mean().sqrt()
            rows[f"{options.precision}: error of the mean / its spread"] = [
                float(error / exact.encode(batch).mean.std())
            ]
    print(f"{len(images)} images of {part.image_size} pixels, {options.repeats} repeats: median (least to most)")
    for name, values in rows.items():
        print(f"{name:>44} {statistics.median(values):9.4g} ({min(values):.4g} to {max(values):.4g})")


if __name__ == "__main__":
    main()
