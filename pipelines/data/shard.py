"""`lfm shard`: images as people have them -> raw shards of equal bytes for equal input.

The plan (which image becomes which row of which shard) is a pure function of the source, so every shard is a job of its
own that any process can do, at any time, again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.latent_shards import FORMATS, key_of, raw_members, write_tar
from lfm.data.manifest import ClassRecord, Manifest, Reject, ShardRecord
from lfm.data.masks import MASKS
from lfm.data.sources.layouts import LAYOUTS, read
from lfm.data.sources.source import Source
from lfm.data.transforms import CROPS, Rejected, binary, crop, crop_ids
from lfm.errors import ConfigError, DataError
from lfm.types import RawSample, SourceItem
from pipelines.common.processes import SPAWN, begin_worker
from pipelines.common.progress import Progress
from pipelines.data.data_options import ShardConfig


@dataclass(frozen=True)
class ShardResult:
    """The data set that is there now; None after a dry run, and while other parts are not done."""

    plan: str
    manifest: Manifest | None


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    config: ShardConfig
    number: int
    source: Source  # with this shard's items alone
    fields: frozenset[str]  # what every sample must have: those of the whole source

    @property
    def name(self) -> str:
        return f"{self.number:06d}.tar"

    @property
    def items(self) -> tuple[SourceItem, ...]:
        return self.source.items


def run(config: ShardConfig) -> ShardResult:
    """Shard a source; what is already done is kept.

    Raises:
        ConfigError, DataError, StorageError: nothing half-written is visible, and the same command continues.
    """
    part, parts = _check(config)
    storage.require_apart(config.source, config.dest)
    source = read(config.source, config.layout, config.split)
    if config.masks and "mask" in source.fields:
        raise ConfigError(f"--masks {config.masks}: {source.root} brings its own masks; leave it out")
    jobs = plan(config, source)
    mine = jobs[part - 1 :: parts]
    recipe = _recipe(config, source)
    summary = (
        f"{source.layout}: {len(source.items):,} images of {len(source.class_names)} classes in {source.root} -> "
        f"{len(jobs)} shards of {config.image_size} x {config.image_size} pixels in {config.dest}"
        f"{f', {len(mine)} of them by part {config.part}' if parts > 1 else ''}"
    )
    if config.dry_run:
        return ShardResult(summary, None)
    manifests.claim(config.dest, recipe, overwrite=config.overwrite)
    done = manifests.done(config.dest)
    todo = [job for job in mine if job.name not in done]
    total, before = sum(len(job.items) for job in mine), sum(len(job.items) for job in mine if job.name in done)
    with Progress("shard", total, "images", done=before) as bar:
        rejected = Rejections(config.max_rejected, len(source.items))
        for record in manifests.records(config.dest, [job.name for job in jobs if job.name in done]):
            rejected.add(record.rejects)
        for record in _write_all(todo, config.workers):
            rejected.add(record.rejects)
            bar.advance(record.samples + len(record.rejects), rejected=str(rejected.count))
    return ShardResult(summary, _publish_if_complete(config, source, recipe, jobs))


def plan(config: ShardConfig, source: Source) -> list[ShardJob]:
    """The table of shards. Images are dealt out at random, so that every shard holds every class."""
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(source.items))
    starts = range(0, len(order), config.samples_per_shard)
    parts = [tuple(source.items[i] for i in order[start : start + config.samples_per_shard]) for start in starts]
    return [
        ShardJob(config, number, replace(source, items=part), frozenset(source.fields))
        for number, part in enumerate(parts)
    ]


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
                f"{self.count} of {self.total} images rejected ({reasons}), the first: {self.first}; "
                f"repair or remove them, or allow more than {self.largest_share:.1%} with --max-rejected"
            )


def write_shard(job: ShardJob) -> ShardRecord:
    """Write one shard and then its record."""
    rejects: list[Reject] = []
    counts = [0] * len(job.source.class_names)
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


def _samples(job: ShardJob, rejects: list[Reject]) -> Iterator[RawSample]:
    for row, item in enumerate(job.items):
        try:
            yield _sample(job, item, key_of(job.number, row))
        except Rejected as error:
            rejects.append(Reject(source=item.image, reason=error.reason, detail=str(error)))


def _sample(job: ShardJob, item: SourceItem, key: str) -> RawSample:
    """One image with all that belongs to it, at the image size."""
    for name in job.fields:
        if getattr(item, name) is None:
            raise Rejected(f"{name} missing", "other images of the source have one")
    found, size, rule = job.source.decode_item(item), job.config.image_size, job.config.crop
    width, height = found.image.size
    pixels, mask, ids = crop(found.image, size, rule), None, None
    if found.segmentation is not None:
        ids = crop_ids(found.segmentation, (width, height), size, rule, job.source.unlabelled)
    if found.mask is not None:
        mask = binary(crop(found.mask, size, rule))
    elif job.config.masks:
        mask = MASKS[job.config.masks](job.config.seed, key, size)
    metadata = {"source": item.image, "width": width, "height": height, "crop": rule}
    return RawSample(key, pixels, item.class_index, mask, ids, metadata)


def _write_all(jobs: list[ShardJob], workers: int) -> Iterator[ShardRecord]:
    """Records as the shards get done, by as many processes as told."""
    if workers == 1 or len(jobs) <= 1:
        yield from map(write_shard, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), SPAWN, begin_worker)
    try:
        for future in as_completed([pool.submit(write_shard, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died; run the same command again, it continues where this one stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _publish_if_complete(config: ShardConfig, source: Source, recipe: dict, jobs: list[ShardJob]) -> Manifest | None:
    if not {job.name for job in jobs} <= manifests.done(config.dest):
        return None
    records = manifests.records(config.dest, [job.name for job in jobs])
    Rejections(config.max_rejected, len(source.items)).add(tuple(r for record in records for r in record.rejects))
    if not sum(record.samples for record in records):
        raise DataError(f"{source.root}: not one image could be used")
    counts = np.sum([record.class_counts for record in records], axis=0)
    classes = tuple(
        ClassRecord(index=index, name=name, count=int(counts[index])) for index, name in enumerate(source.class_names)
    )
    manifest = Manifest(
        kind="raw",
        image_size=config.image_size,
        classes=classes,
        fields=tuple(sorted({*source.fields, "mask"} if config.masks else source.fields)),
        labels=source.labels or ({i: str(i) for i in range(256)} if "segmentation" in source.fields else {}),
        recipe=recipe,
        shards=records,
    )
    manifests.publish(config.dest, manifest)
    return manifest


def _recipe(config: ShardConfig, source: Source) -> dict:
    """Everything that decides the shards' bytes."""
    return {
        "kind": "raw",
        "layout": source.layout,
        "split": config.split,
        "image_size": config.image_size,
        "crop": config.crop,
        "image_format": config.image_format,
        "encoding": FORMATS[config.image_format],
        "masks": config.masks,
        "labels": source.labels,
        "samples_per_shard": config.samples_per_shard,
        "seed": config.seed,
        "pictures": len(source.items),
        "source": manifests.digest(asdict(item) for item in source.items),
    }


def _check(config: ShardConfig) -> tuple[int, int]:
    """Refuse a wrong flag; else which part of how many this is."""
    for flag, value, allowed in (
        ("--layout", config.layout, ("auto", *LAYOUTS)),
        ("--format", config.image_format, FORMATS),
        ("--crop", config.crop, CROPS),
        ("--masks", config.masks, (None, *MASKS)),
    ):
        if value not in allowed:
            raise ConfigError(f"{flag} {value}: unknown; one of {', '.join(filter(None, allowed))}")
    match = re.fullmatch(r"(\d+)/(\d+)", config.part)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError(f"--part {config.part}: must be as 3/16, the third of sixteen parts")
    if parts > 1 and config.overwrite:
        raise ConfigError("--overwrite: would remove what other parts wrote; give it once, without --part")
    return part, parts
