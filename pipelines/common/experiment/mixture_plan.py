"""The plan of a mixture: samples and passes of each source by stage and of each balanced class, and the merged classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lfm.data.stream.mixture import LatentSource, Mixture
from lfm.data.stream.mixture_order import StagedShares
from lfm.data.stream.shard_file import ShardFiles
from pipelines.common.experiment.config_schema import ExperimentConfig

MOST_CLASSES = 20  # that are listed one by one
ENDS = 5  # of more balanced classes than that, how many of the largest and of the smallest are listed


def describe_mixture(config: ExperimentConfig, training: Mixture) -> Iterator[str]:
    """Yield the lines of a plan for the shards of a mixture to train on; none for one whole data set."""
    yield from _describe_subsets(training)
    total = config.train.num_steps * config.train.global_batch
    shares = StagedShares(training.stages)
    for source, count in zip(training.sources, shares.counts(total)[:, 0].tolist(), strict=True):
        yield from _describe_balance(source, count, config.data.warn_passes)
    if len(training.sources) == 1:
        return
    starts = [stage.first_sample for stage in training.stages if stage.first_sample < total]
    for stage, start, end in zip(training.stages, starts, [*starts[1:], total], strict=False):
        yield f"from sample {start:,} to {end:,}:"
        counts = (shares.counts(end) - shares.counts(start))[:, 0].tolist()
        for source, weight, count in zip(training.sources, stage.weights, counts, strict=True):
            yield f"  {source.name}: {float(weight / sum(stage.weights)):.2%}, {_passes(source, count)}"
    for source, count in zip(training.sources, shares.counts(total)[:, 0].tolist(), strict=True):
        if len(starts) > 1:
            yield f"{source.name}: {_passes(source, count)} in all"
        if count / source.num_samples > config.data.warn_passes:
            yield (
                f"warning: {source.name}: each of its samples is read {count / source.num_samples:,.0f} times, more than "
                f"data.warn_passes {config.data.warn_passes:g}; lower its weight, or add samples"
            )
    if "class" in config.conditions:
        yield from describe_classes(training)


def describe_history(mixture: Mixture) -> Iterator[str]:
    """Yield a line for each version of a data set that is read; none if there is one of each, and no sample was dropped."""
    history = mixture.history
    if len(history) == 1 and not any(state.num_drops for state in history[0].sources):
        return
    for number, source in enumerate(mixture.sources):
        before = None
        for segment in history:
            state = segment.sources[number]
            if state == before:
                continue
            dropped = f", {_num_dropped(source, state.num_drops):,} samples dropped" if state.num_drops else ""
            joins = " (new samples join at once)" if before and segment.join == "at_once" else ""
            yield (
                f"{source.folder}: version {state.digest[:12]} from sample {segment.first_sample:,} on{joins}: "
                f"{state.num_samples:,} samples{dropped}"
            )
            before = state


def _num_dropped(source: LatentSource, num_drops: int) -> int:
    return len({(sample.shard, sample.row) for drop in source.drops[:num_drops] for sample in drop.samples})


def _describe_subsets(training: Mixture) -> Iterator[str]:
    """Yield for each source that is read in part its samples, and what reading them costs."""
    for source in training.sources:
        if source.selection is None:
            continue
        shards, sizes = source.manifest.shards, source.shard_sizes()
        files = [file for file, size in zip(ShardFiles(source), sizes, strict=True) if size]
        read, num_ranges = sum(file.num_bytes for file in files), sum(len(file.ranges) for file in files)
        by_ranges = f" ({sum(bool(file.ranges) for file in files):,} by {num_ranges:,} ranges)" if num_ranges else ""
        needed = sum(shard.bytes * size // max(1, shard.samples) for shard, size in zip(shards, sizes, strict=True))
        total = source.manifest.num_samples
        yield (
            f"{source.folder}{f' where {source.where}' if source.where else ''}: {source.num_samples:,} of {total:,} samples "
            f"({source.num_samples / total:.2%}); a pass reads {len(files):,} of {len(shards):,} shards"
            f"{by_ranges}, {read / 1e9:,.3f} GB for {needed / 1e9:,.3f} GB of these samples"
        )


def _describe_balance(source: LatentSource, count: int, warn_passes: float) -> Iterator[str]:
    """Yield the shares and passes of the balanced classes of a source that is read `count` times: all, or the ends of many."""
    if source.balance is None:
        return
    classes, sizes = source.balance.classes()
    read = source.balance.shares().counts(np.array([count]))[:, 0]
    names = [source.manifest.classes[index].name for index in classes.tolist()]
    by_size = np.argsort(-sizes, kind="stable").tolist()
    yield f"{source.folder}: {len(by_size):,} classes, balanced with {source.balance.power:g}:"
    shown = by_size if len(by_size) <= MOST_CLASSES else [*by_size[:ENDS], *by_size[-ENDS:]]
    for place, number in enumerate(shown):
        if place == ENDS and len(shown) < len(by_size):
            yield f"  {len(by_size) - len(shown):,} more"
        size, share = int(sizes[number]), read[number] / max(1, count)
        yield (
            f"  {names[number]}: {share:.2%} ({size / sizes.sum():.2%} of the data), {read[number]:,} samples, "
            f"{read[number] / size:,.2f} passes over {size:,}"
        )
    passes = read / sizes
    most = int(np.argmax(passes))
    if passes[most] > warn_passes:
        yield (
            f"warning: {source.folder}: each sample of class {names[most]} is read {passes[most]:,.0f} times, more than "
            f"data.warn_passes {warn_passes:g}; lower balance, or add samples"
        )


def _passes(source: LatentSource, count: int) -> str:
    return f"{count:,} samples, {count / source.num_samples:,.2f} passes over {source.num_samples:,}"


def describe_classes(training: Mixture) -> Iterator[str]:
    """Yield the counts of the merged classes in whole shards, and of each source in them; held-back shards do not count."""
    classes = training.manifest.classes
    counts = [_class_counts(source, len(classes)) for source in training.sources]
    yield f"{len(classes)} classes" + ("" if len(classes) <= MOST_CLASSES else f", {MOST_CLASSES} of them:")
    for entry in classes[:MOST_CLASSES]:
        of_sources = [each[entry.index] for each in counts]
        parts = [
            f"{count:,} of {source.name}" for count, source in zip(of_sources, training.sources, strict=True) if count
        ]
        yield f"  {entry.name}: {sum(of_sources):,} ({', '.join(parts)})"
    for source in training.sources:
        if not source.manifest.classes:
            yield f"  no class: {source.name} serves the null condition"


def _class_counts(source: LatentSource, num_classes: int) -> list[int]:
    """Return the number of samples of each class of the mixture in a source's shards."""
    counts = [0] * num_classes
    own = source.manifest.classes
    mapped = source.class_map if source.class_map is not None else range(len(own))
    for shard in source.manifest.shards:
        for index, count in zip(mapped, shard.class_counts, strict=False):  # early shards may lack later classes
            counts[index] += count
    return counts
