"""What a sample of the training stream costs, against copying the same bytes and against other ways of storing them.

    python benchmarks/stream.py [--repeats 5] [--folder SCRATCH] [--url s3://BUCKET/FOLDER] [--dry-run]

50,000 latents of Stable Diffusion's shape, posterior and class: 8 x 32 x 32 float16. Each repeat reads all of them once in
batches of 256, in a process of its own per way, with the page cache warm; CPU time is that of the whole process from the
first opened file on, all threads. `stream` is the host's part of training on a GPU: `LatentStream.batches` up to where a
batch leaves for the device, in the first pass of a process, which computes the checksum of each shard; `stream_unchecked`
leaves that out, as each later pass does; `mixture` is `stream` with three sources. On a CPU the noise is drawn there as well:
that is the last row. With a URL, the shards are copied there, and the time to the first batch, into an empty cache, is set
against a bare download of the same window; then 1 % of their samples are read by ranges, and out of whole shards.
--dry-run reads 1,024 latents once, all ways in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar
from unittest import mock

import fsspec
import numpy as np
import torch
import webdataset

from lfm import storage
from lfm.data.columns.selection import Selection
from lfm.data.latent_shards import latent_layout, latent_members
from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, ShardRecord, load, publish
from lfm.data.stream import shard_file
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import LatentSource, mix, single_source
from lfm.data.tar import sample_key, write_tar
from lfm.storage.cache import Cache
from lfm.types import Condition, LatentBatch, LatentSample
from lfm.world import World

SAMPLES, PER_SHARD, BATCH, SHAPE = 50_000, 4096, 256, (8, 32, 32)
RAW = "latents.bin"


def sample(number: int) -> LatentSample:
    posterior = np.random.default_rng(number).standard_normal(SHAPE, np.float32).astype(np.float16)
    return LatentSample(sample_key(*divmod(number, PER_SHARD)), posterior, class_index=number % 1000)


def write(folder: Path, total: int) -> None:
    """The same samples as shards, as one file of their bytes, and as a .npy file each."""
    records = []
    (folder / "shards").mkdir()
    (folder / "npy").mkdir()
    with (folder / RAW).open("wb") as raw:
        for shard, first in enumerate(range(0, total, PER_SHARD)):
            samples = [sample(number) for number in range(first, min(first + PER_SHARD, total))]
            path = folder / "shards" / f"{shard:06d}.tar"
            write_tar(path, map(latent_members, samples))
            records.append(ShardRecord(name=path.name, samples=len(samples), **vars(storage.checksums(path))))
            for number, one in enumerate(samples, first):
                raw.write(one.posterior.tobytes())
                np.save(folder / "npy" / f"{number}.npy", one.posterior)
    for path in (*(folder / "shards").iterdir(), folder / RAW):  # so that what is cached comes from the disk
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    members, stride = latent_layout(sample(0))
    autoencoder = AutoencoderRecord(
        name="none", content_hash="0", downsample_factor=8, latent_channels=4, scale_factor=0.18215, shift=0
    )
    classes = tuple(ClassRecord(index=index, name=str(index), count=total // 1000) for index in range(1000))
    publish(
        str(folder / "shards"),
        Manifest(kind="latents", image_size=256, classes=classes, recipe={}, autoencoder=autoencoder,
                 members=members, stride=stride, shards=tuple(records)),
    )  # fmt: skip


# --- the ways of reading: each yields the number of samples of a batch ---------------------------------------------


def sequential_copy(folder: Path) -> Iterator[int]:
    """The bytes in the order of the disk: read() into one buffer, and a copy of each batch."""
    buffer = torch.empty(BATCH, *SHAPE, dtype=torch.float16)
    with (folder / RAW).open("rb", buffering=0) as file:
        while count := file.readinto(buffer.numpy().data):
            yield len(buffer[: count // buffer[0].nbytes].clone())


def random_gather(folder: Path) -> Iterator[int]:
    """The bytes in random order, out of one mapped file."""
    latents = torch.from_numpy(np.memmap(folder / RAW, np.float16, mode="c").reshape(-1, *SHAPE))
    for rows in torch.randperm(len(latents)).split(BATCH):
        yield len(torch.index_select(latents, 0, rows))


class HostPart(LatentStream):
    """Ends where the device begins, and reuses memory as torch does with pinned memory that has been copied."""

    spare: ClassVar[list[torch.Tensor]] = []

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        fit = (index for index, one in enumerate(self.spare) if one.shape == shape and one.dtype == dtype)
        index = next(fit, None)
        return torch.empty(shape, dtype=dtype) if index is None else self.spare.pop(index)

    def _to_batch(self, stored: dict[str, torch.Tensor]) -> LatentBatch:
        self.spare.extend(stored[name] for name in self.fields)
        return LatentBatch(stored["number"], stored["latent"], stored["latent"], stored["uniform"], Condition())


class UncheckedCache(Cache):
    """Leaves out the checksum of a local shard, which is computed when a process first opens it."""

    def _crc32_at_first_use(self, path: Path, crc32: int) -> int:
        return crc32


def stream(folder: Path, kind: type[LatentStream] = HostPart, cache: type[Cache] = Cache) -> Iterator[int]:
    shards = str(folder / "shards")
    options = StreamOptions(global_batch=BATCH, conditions=frozenset({"class"}), condition_dropout=0.1)
    manifest = load(shards)
    with closing(kind(single_source(shards, manifest), options, World(), cache()).batches(0)) as batches:
        for batch in islice(batches, manifest.num_samples // BATCH):
            yield len(batch.latents)


def stream_unchecked(folder: Path) -> Iterator[int]:
    return stream(folder, cache=UncheckedCache)


def mixture(folder: Path) -> Iterator[int]:
    """The same shards as three sources."""
    shards = str(folder / "shards")
    whole = load(shards)
    parts = (whole.model_copy(update={"shards": whole.shards[first::3]}) for first in range(3))
    sources = [LatentSource(shards, part, str(number)) for number, part in enumerate(parts) if part.shards]
    options = StreamOptions(global_batch=BATCH, conditions=frozenset({"class"}), condition_dropout=0.1)
    with closing(HostPart(mix(sources, {"class"}), options, World(), Cache()).batches(0)) as batches:
        for batch in islice(batches, whole.num_samples // BATCH):
            yield len(batch.latents)


def stream_on_cpu(folder: Path) -> Iterator[int]:
    return stream(folder, LatentStream)


def npy(folder: Path) -> Iterator[int]:
    """A file for each sample, in random order."""
    total = len(list((folder / "npy").iterdir()))
    for numbers in torch.randperm(total).split(BATCH):
        yield len(np.stack([np.load(folder / "npy" / f"{number}.npy") for number in numbers.tolist()]))


def webdataset_pipeline(folder: Path) -> Iterator[int]:
    """As its documentation has it, in this process."""
    urls = sorted(map(str, (folder / "shards").glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).decode().to_tuple("latent.npy", "cls")
    for latents, _ in samples.batched(BATCH):
        yield len(latents)


WAYS: dict[str, Callable[[Path], Iterator[int]]] = {
    way.__name__: way
    for way in (
        sequential_copy,
        random_gather,
        stream,
        stream_unchecked,
        mixture,
        npy,
        webdataset_pipeline,
        stream_on_cpu,
    )
}


def measured(way: str, folder: Path) -> dict[str, float]:
    """Microseconds of CPU per sample, samples per second, and seconds to the first batch, in this process."""
    torch.set_num_threads(1)
    cpu, wall, count, first = time.process_time(), time.perf_counter(), 0, 0.0
    for got in WAYS[way](folder):
        first = first or time.perf_counter() - wall
        count += got
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": cpu / count * 1e6, "rate": count / wall, "first": first}


def first_from_store(folder: Path, url: str, repeats: int) -> None:
    """Prints what the first batch takes from an object store, and a download of its window by as many requests."""
    options, whole = StreamOptions(global_batch=BATCH), load(str(folder / "shards"))
    # All there is, so that no request is left behind.
    window = whole.model_copy(update={"shards": whole.shards[: options.window]})
    publish(url, window)
    for record in window.shards:
        with storage.writing(storage.join(url, record.name)) as copy:
            shutil.copyfile(folder / "shards" / record.name, copy)
    filesystem, inner = fsspec.core.url_to_fs(url)
    first, bare = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            with closing(
                HostPart(single_source(url, window), options, World(), Cache(Path(scratch))).batches(0)
            ) as batches:
                next(batches)
                first.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(4) as pool:
            began = time.perf_counter()
            files = [(f"{inner}/{record.name}", f"{scratch}/{record.name}") for record in window.shards]
            list(pool.map(filesystem.get_file, *zip(*files, strict=True)))
            bare.append(time.perf_counter() - began)
    ratios = [one / other for one, other in zip(first, bare, strict=True)]
    print(f"first batch from the store {statistics.median(first):.2f} s, bare download {statistics.median(bare):.2f} s")
    print(
        f"first batch / download of its window {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def subset_from_store(url: str, repeats: int) -> None:
    """Prints what a pass over 1 % of the samples in the store fetches and takes, with ranges and with whole shards."""
    window = load(url)
    rows = [np.arange(0, shard.samples, 100, dtype=np.uint16) for shard in window.shards]
    selection = Selection(np.concatenate(rows), np.array([len(part) for part in rows]))
    whole = single_source(url, window)
    mixture = replace(whole, sources=(replace(whole.sources[0], selection=selection),))
    options = StreamOptions(global_batch=len(selection.rows))
    found: dict[int, list[tuple[int, float]]] = {}
    for _ in range(repeats):
        for saving in (shard_file.LEAST_SAVING, 10**9):  # by ranges, and never
            with tempfile.TemporaryDirectory() as scratch, mock.patch.object(shard_file, "LEAST_SAVING", saving):
                began = time.perf_counter()
                HostPart(mixture, options, World(), Cache(Path(scratch))).batch(0)
                fetched = sum(path.stat().st_size for path in Path(scratch).glob("*.tar"))
                found.setdefault(saving, []).append((fetched, time.perf_counter() - began))
    for label, measured_ones in zip(("by ranges", "whole shards"), found.values(), strict=True):
        seconds = statistics.median(seconds for _, seconds in measured_ones)
        print(f"1 % of the samples, {label}: {measured_ones[0][0] / 1e6:.1f} MB in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="scratch space of 3 GB; what is there already is read again")
    parser.add_argument("--url", help="a folder of an object store")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measured(options.measure, options.folder)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "shards" / "manifest.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, 4 * BATCH if options.dry_run else SAMPLES)
        if options.url:
            first_from_store(folder, options.url, options.repeats)
            return subset_from_store(options.url, options.repeats)
        if options.dry_run:
            repeats = [{way: measured(way, folder) for way in WAYS}]
        else:
            command = [sys.executable, __file__, "--folder", str(folder), "--measure"]
            repeats = [
                {
                    way: json.loads(subprocess.run([*command, way], check=True, capture_output=True).stdout)
                    for way in WAYS
                }
                for _ in range(options.repeats + 1)
            ][1:]  # the first one warms the page cache
    for way in WAYS:
        found = {name: statistics.median(repeat[way][name] for repeat in repeats) for name in repeats[0][way]}
        print(f"{way:20} {found['cpu']:7.2f} us  {found['rate']:9,.0f}/s  first batch {found['first']:.3f} s")
    for name, one, other in (
        ("CPU of the stream / sequential copy", ("stream", "cpu"), ("sequential_copy", "cpu")),
        ("CPU of webdataset / stream", ("webdataset_pipeline", "cpu"), ("stream", "cpu")),
        ("rate of the stream / random gather", ("stream", "rate"), ("random_gather", "rate")),
        ("rate of the stream / webdataset", ("stream", "rate"), ("webdataset_pipeline", "rate")),
        ("rate of a mixture of three / stream", ("mixture", "rate"), ("stream", "rate")),
        ("CPU of the stream / without checksums", ("stream", "cpu"), ("stream_unchecked", "cpu")),
        ("CPU of the stream / mixture of three", ("stream", "cpu"), ("mixture", "cpu")),
        ("CPU of one .npy each / stream", ("npy", "cpu"), ("stream", "cpu")),
    ):
        ratios = [repeat[one[0]][one[1]] / repeat[other[0]][other[1]] for repeat in repeats]
        print(f"{name:40} {statistics.median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
