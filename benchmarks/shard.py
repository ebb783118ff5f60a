"""What packing costs on top of decoding and resizing, and what a second worker brings.

    python benchmarks/shard.py FOLDER_OF_JPEGS [--repeats 5] [--dry-run]

Each repeat runs, in turn, in this process and on the same files: (a) decode and resize alone, the limit; (b) that and the
encoding of the stored images, in WebP or JPEG; (c) `lfm shard` with one worker; (d) webdataset's ShardWriter doing the
same work; then `lfm shard` with 1 and 2 workers in processes of their own. All times are wall time; ratios are within a
repeat, and the median and the spread of them is printed. --dry-run takes each way once, with two images.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import webdataset

from lfm.data.raw_shards import raw_members
from lfm.data.tar import sample_key
from lfm.data.transforms import crop, decode
from lfm.types import RawSample
from pipelines.data.shard import ShardConfig, run

SIZE = 256


def prepared(paths: list[Path], image_format: str | None) -> list[dict]:
    """The members of every image, or only its pixels where no format is given."""
    members = []
    for row, path in enumerate(paths):
        pixels = crop(decode(path.read_bytes()), SIZE)
        if image_format:
            members.append(
                raw_members(RawSample(sample_key(0, row), pixels, 0, metadata={"source": path.name}), image_format)
            )
    return members


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shard_writer(paths: list[Path], folder: Path) -> None:
    """The same images by webdataset's own writer."""
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=100, verbose=0) as writer:
        for path in paths:
            for members in prepared([path], "webp"):
                writer.write(members)


def stage(images: Path, dest: Path, image_format: Literal["webp", "jpg"]) -> None:
    """`lfm shard` in this process."""
    run(ShardConfig(str(images), str(dest), "folder", SIZE, samples_per_shard=100, image_format=image_format))


def command(images: Path, dest: Path, workers: int) -> None:
    """`lfm shard` as a user types it."""
    arguments = [
        str(images),
        str(dest),
        "--image-size",
        str(SIZE),
        "--samples-per-shard",
        "50",
        "--workers",
        str(workers),
    ]
    subprocess.run([sys.executable, "-m", "pipelines.cli.main", "shard", *arguments], check=True, capture_output=True)


def repeat(paths: list[Path], times: int, folder: Path) -> dict[str, float]:
    """Images per second of every way of doing the work."""
    (folder / "writer").mkdir()
    few, many = folder / "few", folder / "many"
    for images, count in ((few, 1), (many, times)):
        images.mkdir()
        for number, path in enumerate(paths * count):
            shutil.copy(path, images / f"{number:06d}.jpg")
    work: dict[str, Callable[[], object]] = {
        "decode and resize": lambda: prepared(paths, None),
        "and encode as webp": lambda: prepared(paths, "webp"),
        "and encode as jpg": lambda: prepared(paths, "jpg"),
        "lfm shard, webp": lambda: stage(few, folder / "webp", "webp"),
        "lfm shard, jpg": lambda: stage(few, folder / "jpg", "jpg"),
        "ShardWriter, webp": lambda: shard_writer(paths, folder / "writer"),
        "command, 1 worker": lambda: command(many, folder / "one", 1),
        "command, 2 workers": lambda: command(many, folder / "two", 2),
    }
    return {name: len(paths) * (times if name.startswith("command") else 1) / timed(do) for name, do in work.items()}


RATIOS = {  # how much longer the first takes than the second
    "lfm shard / the same without packing, webp": ("lfm shard, webp", "and encode as webp"),
    "lfm shard / the same without packing, jpg": ("lfm shard, jpg", "and encode as jpg"),
    "lfm shard / ShardWriter": ("lfm shard, webp", "ShardWriter, webp"),
    "1 worker / 2 workers, start-up included": ("command, 1 worker", "command, 2 workers"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=int, default=8, help="how often the commands get every image")
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    paths = sorted(path for path in options.source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if options.dry_run:
        paths, options.repeats, options.times = paths[:2], 1, 1
    rates: list[dict[str, float]] = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rates.append(repeat(paths, options.times, Path(folder)))
    print(f"{len(paths)} images, {options.repeats} repeats: median (least to most)")
    for name in rates[0]:
        show(name, [rate[name] for rate in rates], "images/s")
    for name, (first, second) in RATIOS.items():
        show(name, [rate[second] / rate[first] for rate in rates], "")


def show(name: str, values: list[float], unit: str) -> None:
    print(f"{name:>44} {statistics.median(values):8.3f} ({min(values):.3f} to {max(values):.3f}) {unit}")


if __name__ == "__main__":
    main()
