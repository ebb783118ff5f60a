"""`lfm shard`: pictures as people have them -> raw shards of equal bytes for equal input.

The plan (which picture becomes which row of which shard) is a pure function of the source, so every shard is a job of its
own that any process can do, at any time, again.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import ClassRecord, Manifest, Reject, ShardRecord
from lfm.data.shards import FORMATS, key_of, raw_members, write_tar
from lfm.data.sources import LAYOUTS, Source
from lfm.data.transforms import CROPS, Rejected, crop, decode
from lfm.errors import ConfigError, DataError, StorageError
from lfm.types import RawSample, SourceItem
from pipelines.progress import Progress


@dataclass(frozen=True)
class ShardConfig:
    """What `lfm shard` is told."""

    source: str
    dest: str
    layout: str = "folder"
    image_size: int = 256
    split: str | None = None
    samples_per_shard: int = 4096
    image_format: str = "webp"
    crop: str = "centre"
    seed: int = 0
    workers: int = 1
    max_rejected: float = 0.01  # share of the source's pictures
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class ShardResult:
    """The data set that is there now; None after a dry run."""

    plan: str
    manifest: Manifest | None


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    config: ShardConfig
    root: str
    number: int
    items: tuple[SourceItem, ...]
    num_classes: int

    @property
    def name(self) -> str:
        return f"{self.number:06d}.tar"


def run(config: ShardConfig) -> ShardResult:
    """Shard a source; what is already done is kept.

    Raises:
        ConfigError, DataError, StorageError: nothing half-written is visible, and the same command continues.
    """
    _check(config)
    source = LAYOUTS[config.layout](config.source, config.split)
    jobs = plan(config, source)
    recipe = _recipe(config, source)
    summary = (
        f"{len(source.items):,} pictures of {len(source.class_names)} classes in {source.root} -> {len(jobs)} shards of "
        f"{config.image_size} x {config.image_size} pixels in {config.dest}"
    )
    if config.dry_run:
        return ShardResult(summary, None)
    manifests.claim(config.dest, recipe, overwrite=config.overwrite)
    done = manifests.done(config.dest)
    todo = [job for job in jobs if job.name not in done]
    with Progress(
        "shard", len(source.items), "pictures", done=sum(len(job.items) for job in jobs if job.name in done)
    ) as bar:
        rejected = Rejections(config.max_rejected, len(source.items))
        for record in manifests.records(config.dest, [job.name for job in jobs if job.name in done]):
            rejected.add(record.rejects)
        for record in _write_all(todo, config.workers):
            rejected.add(record.rejects)
            bar.advance(record.samples + len(record.rejects), rejected=str(rejected.count))
    manifest = _merge(config, source, recipe, jobs)
    manifests.publish(config.dest, manifest)
    return ShardResult(summary, manifest)


def plan(config: ShardConfig, source: Source) -> list[Job]:
    """The table of shards. Pictures are dealt out at random, so that every shard holds every class."""
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(source.items))
    starts = range(0, len(order), config.samples_per_shard)
    parts = [tuple(source.items[i] for i in order[start : start + config.samples_per_shard]) for start in starts]
    return [Job(config, source.root, n, part, len(source.class_names)) for n, part in enumerate(parts)]


class Rejections:
    """Counts what was rejected, and stops the stage when it is more than allowed."""

    def __init__(self, largest_share: float, total: int) -> None:
        self.allowed, self.largest_share, self.total = int(largest_share * total), largest_share, total
        self.by_reason: Counter[str] = Counter()
        self.first = ""

    @property
    def count(self) -> int:
        return self.by_reason.total()

    def add(self, rejects: tuple[Reject, ...]) -> None:
        """Count more of them.

        Raises:
            DataError: too many; names the reasons and the first source.
        """
        self.by_reason.update(reject.reason for reject in rejects)
        if rejects and not self.first:
            self.first = f"{rejects[0].source} ({rejects[0].detail or rejects[0].reason})"
        if self.count > self.allowed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
            raise DataError(
                f"{self.count} of {self.total} pictures rejected ({reasons}), the first: {self.first}; "
                f"repair or remove them, or allow more than {self.largest_share:.1%} with --max-rejected"
            )


def write_shard(job: Job) -> ShardRecord:
    """Write one shard and then its record."""
    rejects: list[Reject] = []
    counts = [0] * job.num_classes
    path = storage.join(job.config.dest, job.name)
    with storage.writing(path) as temporary:
        samples = _count_classes(_samples(job, rejects), counts)
        write_tar(temporary, (raw_members(sample, job.config.image_format) for sample in samples))
        sums = storage.checksums(temporary)
    written = len(job.items) - len(rejects)
    record = ShardRecord(
        name=job.name, samples=written, **asdict(sums), class_counts=tuple(counts), rejects=tuple(rejects)
    )
    manifests.commit(job.config.dest, record)
    return record


def _count_classes(samples: Iterator[RawSample], counts: list[int]) -> Iterator[RawSample]:
    """The samples as they come, their classes counted on the way."""
    for sample in samples:
        if sample.class_index is not None:
            counts[sample.class_index] += 1
        yield sample


def _samples(job: Job, rejects: list[Reject]) -> Iterator[RawSample]:
    for row, item in enumerate(job.items):
        try:
            image = decode(storage.read_bytes(storage.join(job.root, item.image)))
            pixels = crop(image, job.config.image_size, job.config.crop)
        except (Rejected, StorageError) as error:
            reason = error.reason if isinstance(error, Rejected) else "unreadable"
            rejects.append(Reject(source=item.image, reason=reason, detail=str(error)))
            continue
        metadata = {"source": item.image, "width": image.width, "height": image.height, "crop": job.config.crop}
        yield RawSample(key_of(job.number, row), pixels, item.class_index, metadata=metadata)


def _write_all(jobs: list[Job], workers: int) -> Iterator[ShardRecord]:
    """Records as the shards get done, by as many processes as told."""
    if workers == 1 or len(jobs) <= 1:
        yield from map(write_shard, jobs)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn")
    )  # fsspec must not be forked
    try:
        for future in as_completed([pool.submit(write_shard, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died; run the same command again, it continues where this one stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _merge(config: ShardConfig, source: Source, recipe: dict, jobs: list[Job]) -> Manifest:
    records = manifests.records(config.dest, [job.name for job in jobs])
    if not sum(record.samples for record in records):
        raise DataError(f"{source.root}: not one picture could be used")
    counts = np.sum([record.class_counts for record in records], axis=0)
    classes = tuple(
        ClassRecord(index=index, name=name, count=int(counts[index])) for index, name in enumerate(source.class_names)
    )
    return Manifest(kind="raw", image_size=config.image_size, classes=classes, recipe=recipe, shards=records)


def _recipe(config: ShardConfig, source: Source) -> dict:
    """Everything that decides the shards' bytes."""
    return {
        "kind": "raw",
        "layout": config.layout,
        "split": config.split,
        "image_size": config.image_size,
        "crop": config.crop,
        "image_format": config.image_format,
        "samples_per_shard": config.samples_per_shard,
        "seed": config.seed,
        "pictures": len(source.items),
        "source": manifests.digest([asdict(item) for item in source.items]),
    }


def _check(config: ShardConfig) -> None:
    for flag, value, allowed in (
        ("--layout", config.layout, LAYOUTS),
        ("--format", config.image_format, FORMATS),
        ("--crop", config.crop, CROPS),
    ):
        if value not in allowed:
            raise ConfigError(f"{flag} {value}: unknown; one of {', '.join(allowed)}")
