"""What `lfm inspect` says of an experiment, or of several folders of latents: what is mixed, and which samples occur twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np

from lfm.data import manifest as manifests
from lfm.data.columns.column_summary import summarize_columns
from lfm.data.manifest import Manifest
from lfm.data.stream.content_digests import content_digests, place_of
from lfm.data.stream.mixture import LatentSource, Mixture, mix
from lfm.errors import ConfigError
from lfm.storage.cache import Cache
from pipelines.common import factory
from pipelines.common.experiment import config_file
from pipelines.common.experiment.mixture_plan import describe_classes, describe_mixture
from pipelines.common.progress import Progress
from pipelines.data.data_options import InspectConfig


@dataclass(frozen=True)
class Contents:
    """The different samples of one or several sources.

    Attributes:
        digests: uint64 (samples,), ascending, each once.
        places: int64 (samples,), the number of the first sample with each digest, counted over all sources.
        sources: the sources.
        num_samples: of all sources, equal ones included.
    """

    digests: np.ndarray
    places: np.ndarray
    sources: tuple[LatentSource, ...]
    num_samples: int

    def place_of(self, index: int) -> str:
        """Return the shard and row of a sample by its place in `digests`."""
        number = int(self.places[index])
        for source in self.sources:
            if number < source.num_samples:
                return place_of(source, number)
            number -= source.num_samples
        raise AssertionError("the sources have as many samples as digests")


def is_mixture(config: InspectConfig) -> bool:
    """Return whether an experiment or several folders are named, and not one folder."""
    return bool(config.others) or _is_experiment(config)


def _is_experiment(config: InspectConfig) -> bool:
    return config.path.lower().endswith((".yaml", ".yml"))


def describe_mixed_sources(config: InspectConfig) -> Iterator[str]:
    """Yield the lines that describe the latents of an experiment, or of several folders, and what they have in common.

    Raises:
        ConfigError: an option is set that would not be used, or the experiment is wrong.
        DataError: a data set is incomplete or damaged, or the sets cannot be mixed.
    """
    used = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    if others := sorted(used - {"path", "others", "cache"}):
        raise ConfigError(
            f"{', '.join(f'`{name}`' for name in others)}: only used for one folder of shards; leave it out"
        )
    if not _is_experiment(config):
        yield from _describe_folders(config)
    elif config.others:
        raise ConfigError(f"{config.path}: an experiment names its latents itself; inspect other folders by themselves")
    else:
        yield from _describe_experiment(config)


def describe_size(manifest: Manifest) -> str:
    """Return kind and sizes of a data set in a line."""
    size = sum(shard.bytes for shard in manifest.shards)
    return (
        f"{manifest.kind} shards: {manifest.num_samples:,} samples of {manifest.image_size} x {manifest.image_size} pixels "
        f"in {len(manifest.shards)} shards, {size / 1e6:,.1f} MB ({size / max(1, manifest.num_samples) / 1e3:.1f} kB each)"
    )


def describe_columns(folder: str, manifest: Manifest, cache: Cache) -> Iterator[str]:
    """Yield a line for each column of a data set; none without an index, or without pyarrow."""
    if manifest.columns is not None:
        with contextlib.suppress(ConfigError):  # without pyarrow
            yield from (f"  column {line}" for line in summarize_columns(folder, manifest.columns, cache))


def _describe_experiment(config: InspectConfig) -> Iterator[str]:
    experiment = config_file.load(config.path)
    mixture = factory.load_mixture(experiment)
    training, held_back = mixture.split(experiment.data.held_back)
    data = experiment.data
    cache = factory.cache(config.cache or data.cache, data.cache_gigabytes)
    yield from _describe_sources(mixture, cache)
    if data.held_back:
        yield (
            f"{_num_samples(held_back):,} samples in {len(held_back.manifest.shards)} shards are held back: the last "
            f"{data.held_back} of {'each source' if len(mixture.sources) > 1 else 'them'}; below are the "
            f"{_num_samples(training):,} to train on"
        )
    yield from describe_mixture(experiment, training)
    if mixture.manifest.classes and ("class" not in experiment.conditions or len(training.sources) == 1):
        yield from describe_classes(training)
    parts = [*training.sources, *(source for source in held_back.sources if source.num_samples)]
    contents = _read_contents(parts, cache)
    of_training, of_held_back = contents[: len(training.sources)], contents[len(training.sources) :]
    yield from _overlaps(training, of_training)
    if of_held_back:
        first, second = _joined(of_training), _joined(of_held_back)
        yield _overlap("training", first, "held back", second)


def _num_samples(mixture: Mixture) -> int:
    return sum(source.num_samples for source in mixture.sources)


def _describe_folders(config: InspectConfig) -> Iterator[str]:
    folders = (config.path, *config.others)
    ends = [folder.rstrip("/").rpartition("/")[2] for folder in folders]
    names = ends if len(set(ends)) == len(ends) else folders
    sources = [
        LatentSource(folder, manifests.load(folder, "latents"), name)
        for folder, name in zip(folders, names, strict=True)
    ]
    mixture = mix(sources, ())
    cache = factory.cache(config.cache)
    yield from _describe_sources(mixture, cache)
    total = sum(source.num_samples for source in sources)
    for source in sources:
        yield f"{source.name}: {source.num_samples / total:.2%} of the samples, without weights"
    if mixture.manifest.classes:
        yield from describe_classes(mixture)
    yield from _overlaps(mixture, _read_contents(mixture.sources, cache))


def _describe_sources(mixture: Mixture, cache: Cache) -> Iterator[str]:
    for source in mixture.sources:
        yield f"{source.folder}: {describe_size(source.manifest)}"
        yield from describe_columns(source.folder, source.manifest, cache)


def _read_contents(sources: Sequence[LatentSource], cache: Cache) -> list[Contents]:
    """Read all samples of the sources, one shard in memory at a time; 16 bytes stay of each sample."""
    contents = []
    with Progress("compare", sum(source.num_samples for source in sources), "samples") as progress:
        for source in sources:
            digests = content_digests(source, cache, progress.advance)
            contents.append(Contents(*np.unique(digests, return_index=True), (source,), len(digests)))
    return contents


def _joined(contents: list[Contents]) -> Contents:
    starts = np.cumsum([0, *(each.num_samples for each in contents)])
    digests, first = np.unique(np.concatenate([each.digests for each in contents]), return_index=True)
    places = np.concatenate([each.places + start for each, start in zip(contents, starts, strict=False)])[first]
    return Contents(digests, places, tuple(source for each in contents for source in each.sources), int(starts[-1]))


def _overlaps(mixture: Mixture, contents: list[Contents]) -> Iterator[str]:
    """Yield a line for each source with copies in itself, and for each two sources."""
    for source, each in zip(mixture.sources, contents, strict=True):
        if copies := each.num_samples - len(each.digests):
            yield f"{source.name}: {copies:,} of {each.num_samples:,} samples are copies of others in it"
    for (first, one), (second, two) in combinations(zip(mixture.sources, contents, strict=True), 2):
        yield _overlap(first.name, one, second.name, two)


def _overlap(first: str, one: Contents, second: str, two: Contents) -> str:
    """Say how many different samples two data sets have in common, with an example."""
    common, ours, theirs = np.intersect1d(one.digests, two.digests, assume_unique=True, return_indices=True)
    if not len(common):
        return f"{first} and {second}: no sample in common"
    return (
        f"{first} and {second}: {len(common):,} samples in common ({len(common) / len(one.digests):.2%} and "
        f"{len(common) / len(two.digests):.2%} of the different ones), such as {one.place_of(int(ours[0]))} and "
        f"{two.place_of(int(theirs[0]))}"
    )
