"""`lfm shard`: image collections -> raw shards, with equal bytes for equal input.

The plan, which image becomes which row of which shard, is a pure function of the source. So each shard is an independent
job that any process can do at any time, and repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import NEAR_DUPLICATES, ClassRecord, Manifest, Reject, ShardRecord
from lfm.data.masks import MASKS
from lfm.data.near_duplicates import NearDuplicate, import_imagehash
from lfm.data.raw_shards import IMAGE_ENCODINGS, content_digest, raw_members
from lfm.data.sources.layouts import LAYOUTS, read
from lfm.data.sources.names import storable
from lfm.data.sources.source import About, Choices, Source
from lfm.data.tar import sample_key
from lfm.data.transforms import Rejected, binary, crop, crop_ids
from lfm.data.versions import begin_growth, check_present, with_version_before
from lfm.errors import ConfigError, DataError
from lfm.types import RawSample, SourceItem
from lfm.world import World
from pipelines.common import image_files
from pipelines.common.processes import map_processes, part_of
from pipelines.common.progress import Progress
from pipelines.data.data_options import ShardConfig
from pipelines.data.growth.shard_growth import (
    KNOWN_CONTENT,
    Growth,
    find_growth,
    give_up_growth,
    is_known,
    rows_of,
)
from pipelines.data.shard_claims import clear_work
from pipelines.data.shard_columns import FactsWriter, write_raw_index
from pipelines.data.shard_duplicates import (
    describe_near_duplicates,
    find_near_duplicates,
    save_pairs,
    sheet_name,
    write_report,
)
from pipelines.data.shard_plan import Survey, describe, interpret_maps, save_sheet, survey
from pipelines.data.shard_set import complete_records, write_shard

NEAR_DUPLICATE = "near duplicate"  # reason of rejects that do not count against `max_rejected`
NOT_COUNTED = {NEAR_DUPLICATE, KNOWN_CONTENT}


@dataclass(frozen=True)
class ShardResult:
    """The plan and the complete data set; no manifest after a dry run, or while other parts are not done."""

    plan: str  # one line
    description: str  # what was understood of the source, in lines
    manifest: Manifest | None


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    config: ShardConfig
    number: int
    source: Source  # its items are those of this shard
    required_fields: frozenset[str]  # of each sample: the fields of the whole source
    near_duplicates: Mapping[int, str] = field(
        default_factory=dict
    )  # rows to drop, with the images that they are near to
    known_contents: str | None = None  # file of the contents that a set which grows has already

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"{self.number:06d}.tar"

    @property
    def num_items(self) -> int:
        """Number of images to read."""
        return len(self.source.items)


def run(config: ShardConfig, announce: Callable[[str], None] = print) -> ShardResult:
    """Write the shards of this part that are not done, and the manifest when all parts are done.

    Args:
        announce: called with the plan before anything is written.

    Raises:
        ConfigError, DataError, StorageError: no shard is visible that is not whole; the same command resumes.
    """
    part = _check(config)
    storage.require_apart(config.source, config.dest)
    source = interpret_maps(_read(config), config)
    if config.masks and "mask" in source.fields:
        raise ConfigError(f"`masks` {config.masks}: {source.root} has masks of its own; leave the option out")
    growth = None if config.overwrite else find_growth(config.dest, source, lambda source: _recipe(config, source))
    source = growth.source if growth else source
    order = shard_order(config, source, growth)
    jobs = plan(config, source, order, growth)
    own_jobs = jobs[part.slice_of(len(jobs))]
    recipe = growth.recipe if growth else _recipe(config, source)
    summary = (
        f"{source.layout}: {len(source.items):,} images of {len(source.class_names)} classes in {config.source} -> "
        f"{len(jobs)} shards of {config.image_size} x {config.image_size} pixels in {config.dest}"
    )
    if growth:
        summary += f", which has {growth.num_known:,} of them and grows by {len(growth.new):,}"
    if part.size > 1:
        summary += f", {len(own_jobs)} of them by part {config.part}"
    first_shard = growth.first_shard if growth else 0
    sample = survey(source, config.crop, lambda place: _drawn_mask(config, order, first_shard, place))
    description = f"{summary}\n{describe(source, sample)}"
    if config.sheet:
        save_sheet(source, sample, config.sheet)
    if config.dry_run:
        if config.near_duplicates != "keep":
            _, line = _near_duplicates(config, source, part, None, order, growth)
            description = f"{description}\n{line}"
        if problem := _foreseen_failure(config, source, sample):
            description = f"{description}\n  {'stops':<11}{problem}"
        return ShardResult(summary, description, None)
    announce(description)
    if growth and not growth.new:
        return ShardResult(summary, description, growth.published)
    _begin(config, recipe, growth)
    if growth:
        jobs = [replace(job, known_contents=growth.contents) for job in jobs]
        own_jobs = jobs[part.slice_of(len(jobs))]
    if _needs_near_duplicates(config, own_jobs):
        copies, line = _near_duplicates(config, source, part, config.dest, order, growth)
        announce(line)
        if config.near_duplicates == "drop":
            jobs = _without(jobs, order, source, copies)
            own_jobs = jobs[part.slice_of(len(jobs))]
    rejections = Rejections(config.max_rejected, sum(job.num_items for job in jobs))
    _write_jobs(config, jobs, own_jobs, rejections, growth)
    return ShardResult(summary, description, _publish_if_complete(config, source, recipe, jobs, growth))


def _begin(config: ShardConfig, recipe: dict[str, Any], growth: Growth | None) -> None:
    """Claim the folder for a new set, or for one that grows."""
    if growth:
        check_present(config.dest, growth.base)
        begin_growth(config.dest, recipe, growth.published)
        return
    if not config.overwrite:
        give_up_growth(config.dest, recipe)
    manifests.claim(config.dest, recipe, overwrite=config.overwrite)


def _read(config: ShardConfig) -> Source:
    choices = Choices(
        config.classes,
        config.class_order,
        config.labels,
        config.label_column,
        config.mask_files,
        config.map_files,
        leave_out=(config.dest, *([config.sheet, sheet_name(config.sheet)] if config.sheet else [])),
    )
    source = read(config.source, config.layout, config.split, choices)
    if config.mask_value != "white" and "mask" not in source.fields:
        raise ConfigError(f"`mask_value` {config.mask_value}: {source.root} has no masks; leave it out")
    return replace(source, mask_value=config.mask_value)


def _check(config: ShardConfig) -> World:
    """Refuse wrong options; return this command's place among the parts."""
    if config.layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"`layout` {config.layout}: unknown; one of auto, {', '.join(LAYOUTS)}")
    if config.near_duplicates != "keep":
        import_imagehash(f"`near_duplicates` {config.near_duplicates}")
    if config.sheet:
        image_files.require_png("sheet", config.sheet)
    part = part_of(config.part)
    if part.size > 1 and config.overwrite:
        raise ConfigError("`overwrite`: would remove the shards of other parts; use it once, without `part`")
    return part


def plan(
    config: ShardConfig, source: Source, order: list[list[int]] | None = None, growth: Growth | None = None
) -> list[ShardJob]:
    """Assign images to shards, by `shard_order`. The order is random, so that every shard has images of all classes."""
    jobs = []
    for number, indices in enumerate(order or shard_order(config, source), growth.first_shard if growth else 0):
        items = tuple(source.items[index] for index in indices)
        jobs.append(ShardJob(config, number, replace(source, items=items, about=About()), frozenset(_required(source))))
    return jobs


def shard_order(config: ShardConfig, source: Source, growth: Growth | None = None) -> list[list[int]]:
    """Return the numbers of the source's images in each shard, or in each new one of a set that grows."""
    new, first_shard = (growth.new, growth.first_shard) if growth else (range(len(source.items)), 0)
    random = np.random.Generator(np.random.Philox(key=config.seed + (first_shard << 64)))
    order = (new.start + random.permutation(len(new))).tolist()
    return [order[start : start + config.samples_per_shard] for start in range(0, len(order), config.samples_per_shard)]


def _drawn_mask(config: ShardConfig, order: list[list[int]], first_shard: int, index: int) -> np.ndarray | None:
    """Return the mask that `masks` draws for an image of the source; None without it, or for one that is packed already."""
    if not config.masks:
        return None
    shard = next((number for number, indices in enumerate(order) if index in indices), None)
    if shard is None:
        return None
    key = sample_key(first_shard + shard, order[shard].index(index))
    return MASKS[config.masks](config.seed, key, config.image_size)


def _needs_near_duplicates(config: ShardConfig, own_jobs: list[ShardJob]) -> bool:
    """Return whether near duplicates must be searched: they are not known, or shards are to be made without them."""
    if config.near_duplicates == "keep":
        return False
    is_known = storage.exists(storage.join(config.dest, NEAR_DUPLICATES))
    return not is_known or not {job.name for job in own_jobs} <= manifests.done(config.dest)


def _near_duplicates(
    config: ShardConfig,
    source: Source,
    part: World,
    dest: str | None,
    order: list[list[int]],
    growth: Growth | None,
) -> tuple[list[NearDuplicate], str]:
    """Return the near duplicates of a source and a line about them; write their list and sheet."""
    known = list(range(growth.num_known if growth else 0))
    size = config.samples_per_shard
    copies = find_near_duplicates(
        source,
        [*order, *(known[start : start + size] for start in range(0, len(known), size))],
        config.crop,
        frozenset(_required(source)),
        dest,
        own=part.slice_of(len(order)),
        workers=config.workers,
    )
    if dest is not None:
        write_report(dest, source, copies)
    if config.sheet:
        save_pairs(source, copies, config.crop, sheet_name(config.sheet))
    return copies, describe_near_duplicates(source, copies)


def _without(
    jobs: list[ShardJob], order: list[list[int]], source: Source, copies: list[NearDuplicate]
) -> list[ShardJob]:
    """Return the jobs with the rows of near duplicates, which they reject."""
    earlier = {each.image: source.items[each.earlier].image for each in copies}
    return [
        replace(job, near_duplicates={row: earlier[index] for row, index in enumerate(indices) if index in earlier})
        for job, indices in zip(jobs, order, strict=True)
    ]


def _required(source: Source) -> set[str]:
    return {*source.fields, "class_index"} if source.class_names else set(source.fields)


def _foreseen_failure(config: ShardConfig, source: Source, sample: Survey) -> str | None:
    """Return why the images that are known to be rejected would stop the stage, if they would."""
    incomplete = sum(any(getattr(item, name) is None for name in _required(source)) for item in source.items)
    unusable = sum(sample.rejected.values())
    count, what = max((incomplete, "incomplete"), (unusable, "unusable in the sample"))
    if count <= int(config.max_rejected * len(source.items)):
        return None
    return (
        f"fails without `dry_run`: {count} of {len(source.items)} images are {what}; repair or remove them, or allow more "
        f"than {config.max_rejected:.1%} with `max_rejected`"
    )


class Rejections:
    """Counts rejected images, and stops the stage when they exceed a share of all images."""

    def __init__(self, largest_share: float, num_images: int) -> None:
        self.largest_share, self.num_images = largest_share, num_images
        self.by_reason: Counter[str] = Counter()
        self.first: Reject | None = None

    @property
    def count(self) -> int:
        """Number of rejected images."""
        return self.by_reason.total()

    def add(self, rejects: tuple[Reject, ...]) -> None:
        """Count rejects.

        Raises:
            DataError: there are too many; names the reasons and the first image.
        """
        rejects = tuple(reject for reject in rejects if reject.reason not in NOT_COUNTED)
        self.by_reason.update(reject.reason for reject in rejects)
        if rejects and self.first is None:
            self.first = rejects[0]
        if self.first and self.count > int(self.largest_share * self.num_images):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
            raise DataError(
                f"{self.count} of {self.num_images} images rejected ({reasons}), the first: {self.first.source} "
                f"({self.first.detail or self.first.reason}); repair or remove them, or allow more than "
                f"{self.largest_share:.1%} with `max_rejected`"
            )


def _write_jobs(
    config: ShardConfig,
    jobs: list[ShardJob],
    own_jobs: list[ShardJob],
    rejections: Rejections,
    growth: Growth | None,
) -> None:
    """Write the shards of this part that are not done, and count the rejects of all shards."""
    num_items = {job.name: job.num_items for job in jobs}
    num_classes = len(jobs[0].source.class_names)

    def fits(record: ShardRecord) -> bool:
        is_counted = len(record.class_counts) == num_classes and (
            not num_classes or sum(record.class_counts) <= record.samples
        )
        return is_counted and record.samples + len(record.rejects) == num_items.get(record.name)

    of_base = {shard.name for shard in growth.base.shards} if growth else set()
    manifests.discard_damaged(config.dest, fits, of_base)
    done = manifests.done(config.dest)
    for record in manifests.records(config.dest, [job.name for job in jobs if job.name in done]):
        rejections.add(record.rejects)
    total = sum(job.num_items for job in own_jobs)
    done_before = sum(job.num_items for job in own_jobs if job.name in done)
    with Progress("shard", total, "images", done=done_before) as progress:
        for record in map_processes(write_job, [job for job in own_jobs if job.name not in done], config.workers):
            rejections.add(record.rejects)
            progress.advance(record.samples + len(record.rejects), rejected=str(rejections.count))


def write_job(job: ShardJob) -> ShardRecord:
    """Write the shard of a job and then its record."""
    rejects: list[Reject] = []
    class_counts = [0] * len(job.source.class_names)
    facts = FactsWriter()

    def members() -> Iterator[dict[str, Any]]:
        for row, item in enumerate(job.source.items):
            try:
                if row in job.near_duplicates:
                    raise Rejected(NEAR_DUPLICATE, f"of {job.near_duplicates[row]}")
                sample = _sample(job, item, sample_key(job.number, row))
                packed = raw_members(sample, job.config.image_format)
                content = content_digest(packed)
                if job.known_contents and is_known(job.known_contents, content):
                    raise Rejected(KNOWN_CONTENT, "the data set has it under another name")
            except Rejected as error:
                rejects.append(Reject(source=storable(item.image), reason=error.reason, detail=storable(str(error))))
                continue
            if sample.class_index is not None:
                class_counts[sample.class_index] += 1
            facts.add(row, sample, content)
            yield packed

    def description() -> dict[str, Any]:
        facts.write(job.config.dest, job.name)  # before the record, which marks the shard as done
        return {
            "samples": job.num_items - len(rejects),
            "class_counts": tuple(class_counts),
            "rejects": tuple(rejects),
        }

    return write_shard(job.config.dest, job.name, members(), description)


def _sample(job: ShardJob, item: SourceItem, key: str) -> RawSample:
    """Decode one item, and resize and crop all of its images to the image size.

    Raises:
        Rejected: something of the item is missing or cannot be used.
    """
    for name in sorted(job.required_fields):
        if getattr(item, name) is None:
            raise Rejected(f"{name.removesuffix('_index')} missing", "other images of the source have one")
    size, rule = job.config.image_size, job.config.crop
    decoded = job.source.decode_item(item)
    width, height = decoded.image.size
    image, mask, ids = crop(decoded.image, size, rule), None, None
    if decoded.segmentation is not None:
        ids = crop_ids(decoded.segmentation, (width, height), size, rule, job.source.unlabelled)
    if decoded.mask is not None:
        whole = binary(np.asarray(decoded.mask))
        if whole.min() == whole.max():
            raise Rejected("mask full" if whole.max() else "mask empty", "it hides all pixels or none")
        mask = binary(crop(decoded.mask, size, rule))  # may be empty: the hole of a valid mask can lie outside the crop
    elif job.config.masks:
        mask = MASKS[job.config.masks](job.config.seed, key, size)
    metadata = {"source": storable(item.image), "width": width, "height": height, "crop": rule}
    return RawSample(key, image, item.class_index, mask, ids, metadata)


def _publish_if_complete(
    config: ShardConfig, source: Source, recipe: dict[str, Any], jobs: list[ShardJob], growth: Growth | None
) -> Manifest | None:
    records = complete_records(config.dest, [job.name for job in jobs])
    if records is None:
        return None
    rejects = tuple(reject for record in records for reject in record.rejects)
    Rejections(config.max_rejected, sum(job.num_items for job in jobs)).add(rejects)
    shards, sources = (*(growth.base.shards if growth else ()), *records), [job.source for job in jobs]
    if not any(record.samples for record in shards):
        raise DataError(f"{source.root}: none of the images could be used")
    counts = np.zeros(len(source.class_names), np.int64)
    for record in shards:
        counts[: len(record.class_counts)] += np.array(record.class_counts, np.int64)
    if growth:
        known = replace(source, items=source.items[: growth.num_known])
        file = f"columns-{len(shards):06d}.parquet"  # the version before keeps its own until the manifest is replaced
        columns = write_raw_index(config.dest, sources, records, rows_of(config.dest, growth.base), known, file)
    else:
        columns = write_raw_index(config.dest, sources, records)
    manifest = Manifest(
        kind="raw",
        image_size=config.image_size,
        classes=tuple(
            ClassRecord(index=index, name=storable(name), count=int(counts[index]))
            for index, name in enumerate(source.class_names)
        ),
        fields=tuple(sorted({*source.fields, "mask"} if config.masks else source.fields)),
        labels=_labels(source),
        recipe=recipe,
        shards=shards,
        columns=columns,
    )
    if growth:
        manifest = with_version_before(manifest, growth.base)
    manifests.publish(config.dest, manifest)
    if growth or config.near_duplicates != "keep":
        clear_work(config.dest)
    return manifest


def _labels(source: Source) -> dict[int, str]:
    """The class ids of the segmentations by name; numbers for a source that has segmentations and no names."""
    if "segmentation" in source.fields and not source.labels:
        return {class_id: str(class_id) for class_id in range(256)}
    return source.labels


def _identity(item: SourceItem) -> dict[str, Any]:
    """What of an item decides its shard's bytes."""
    return {name: getattr(item, name) for name in ("image", "class_index", "segmentation", "mask")}


def _recipe(config: ShardConfig, source: Source) -> dict[str, Any]:
    """Everything that decides the shards' bytes. The keys are part of the file format."""
    optional = {
        "mask_value": config.mask_value if config.mask_value != "white" else None,
        "colours": {f"{colour:06x}": label for colour, label in source.maps.colours.items()},
        "is_binary": source.maps.is_binary,
        "near_duplicates": "drop" if config.near_duplicates == "drop" else None,
    }
    return {
        "kind": "raw",
        "layout": source.layout,
        "split": config.split,
        "image_size": config.image_size,
        "crop": config.crop,
        "image_format": config.image_format,
        "encoding": IMAGE_ENCODINGS[config.image_format],
        "masks": config.masks,
        "labels": source.labels,
        "samples_per_shard": config.samples_per_shard,
        "seed": config.seed,
        "pictures": len(source.items),
        "source": manifests.digest(map(_identity, source.items)),
        **{key: value for key, value in optional.items() if value},  # keys that older recipes do not have
    }
