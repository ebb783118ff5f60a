"""A mixture of latent data sets: its sources, what they have in common, and their weights over time.

A data set alone is a mixture of one. Sources are mixed if their latents come from one autoencoder and have one size, and if
all of them have the members that the conditions need. Classes are merged by name: the classes of the first source keep their
indices, and each new name of a later one gets the next index. A source without classes can serve the null condition.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.columns.selection import Selection
from lfm.data.dropped import Drop
from lfm.data.manifest import ClassRecord, Manifest, ShardRecord
from lfm.data.stream.balanced_order import Balance
from lfm.data.stream.mixture_order import Stage
from lfm.data.versions import Segment
from lfm.errors import ConfigError, DataError

# The members that each condition reads: by name, those of the image and of the mirrored image.
MEMBERS_OF_CONDITION = {
    "none": {"latent": ("latent.npy", "latent_flip.npy")},
    "class": {"class": ("cls", "cls")},
    "inpaint": {"masked": ("masked.npy", "masked_flip.npy"), "mask": ("mask.npy", "mask.npy")},
    "semantic": {"segmentation": ("seg.npy", "seg.npy")},
}


@dataclass(frozen=True)
class View:
    """What is read of a source in one segment of a training."""

    num_shards: int  # the first ones of the source
    selection: Selection | None  # in these; None for all samples
    balance: Balance | None = None  # of the classes of these samples


@dataclass(frozen=True)
class LatentSource:
    """One data set of a mixture, or a part of its shards."""

    folder: str  # path or URL of the latent shards
    manifest: Manifest  # of the shards that are read
    name: str = ""  # in plans and messages
    skip_shards: tuple[str, ...] = ()  # names of shards that are left out
    flips: bool = True  # whether mirrored latents are used, where the shards have them
    class_map: tuple[int, ...] | None = None  # the mixture's class of each class of the source; None if they are equal
    where: str = ""  # the expression that chose the samples
    selection: Selection | None = None  # the samples that are read; None for all
    balance: Balance | None = None  # of the classes of these samples; None for the data as they are
    chosen: Selection | None = None  # those of `where`, dropped ones included; None for all
    drops: tuple[Drop, ...] = ()  # samples that are left out of `selection`
    views: tuple[View, ...] = ()  # one for each segment of the history, if there are several

    def shard_sizes(self, view: View | None = None) -> list[int]:
        """Return the number of samples that are read of each shard, counting those to leave out as empty.

        Args:
            view: what is read; by default all shards, and `selection` of their samples.
        """
        sizes = shard_sizes(self.manifest, self.skip_shards, self.folder)[: view.num_shards if view else None]
        selection = view.selection if view else self.selection
        if selection is None:
            return sizes
        return [min(size, selected) for size, selected in zip(sizes, selection.counts.tolist(), strict=True)]

    @property
    def num_samples(self) -> int:
        """Samples that are read in one pass."""
        return sum(self.shard_sizes())

    @property
    def suffixes(self) -> set[str]:
        """Suffixes of the members of every sample."""
        return {member.suffix for member in self.manifest.members}


@dataclass(frozen=True)
class Mixture:
    """Latent data sets that are trained on together."""

    sources: tuple[LatentSource, ...]
    manifest: Manifest  # of the whole: merged classes, labels and members, and the shards of all sources
    stages: tuple[Stage, ...] = (Stage(0, (Fraction(1),)),)
    history: tuple[Segment, ...] = ()  # what was read before, and is read now; see `lfm.data.stream.data_history`

    @property
    def name(self) -> str:
        """The folders, for messages."""
        return ", ".join(source.folder for source in self.sources)

    @property
    def digest(self) -> str:
        """A hash of the data sets and of how their classes are merged; of one data set its manifest's digest."""
        if len(self.sources) == 1 and self.sources[0].class_map is None:
            return self.sources[0].manifest.digest
        classes = [entry.name for entry in self.manifest.classes]
        return manifests.digest([classes, *([source.manifest.digest, source.class_map] for source in self.sources)])

    @property
    def subsets_digest(self) -> str | None:
        """A hash of the samples that are read, if they are chosen by columns; None for whole data sets."""
        subsets = [
            (source.where, source.manifest.columns.crc32 if source.where and source.manifest.columns else None)
            for source in self.sources
        ]
        return manifests.digest(subsets) if any(where for where, _ in subsets) else None

    def split(self, num_held_back: int) -> tuple[Mixture, Mixture]:
        """Return the mixture of the shards to train on, and that of the last `num_held_back` shards of each source.

        Classes are balanced in the first only, so that losses on the second are comparable. Of a source that grows during a
        training, the last shards are those at its start, so that they are never trained on.

        Raises:
            DataError: no shards of a source would be left to train on.
        """
        training, held_back = [], []
        for source in self.sources:
            num_shards = source.views[0].num_shards if source.views else len(source.manifest.shards)
            if num_held_back >= num_shards:
                of_source = f" in {source.folder}" if len(self.sources) > 1 else ""
                raise DataError(
                    f"data.held_back {num_held_back}: there are {num_shards} shards{of_source}, and some must be trained "
                    "on; lower it, or encode with fewer samples per shard"
                )
            border = num_shards - num_held_back
            training.append(_with_shards(source, slice(border), slice(num_shards, None)))
            unbalanced = replace(source, balance=None, views=())
            held_back.append(_with_shards(unbalanced, slice(border, num_shards)))
        return self._of(training), self._of(held_back)

    def _of(self, sources: list[LatentSource]) -> Mixture:
        shards = tuple(shard for source in sources for shard in source.manifest.shards)
        return replace(self, sources=tuple(sources), manifest=self.manifest.model_copy(update={"shards": shards}))


def single_source(folder: str, manifest: Manifest, skip_shards: tuple[str, ...] = ()) -> Mixture:
    """Return the mixture of one data set."""
    return Mixture((LatentSource(folder, manifest, folder, skip_shards),), manifest)


def mix(
    sources: Sequence[LatentSource],
    conditions: Collection[str],
    renamed_classes: Sequence[Mapping[str, str]] | None = None,
) -> Mixture:
    """Return the mixture of several data sets, each with a weight of its number of samples.

    Args:
        sources: the data sets, of different names.
        conditions: of class, inpaint and semantic.
        renamed_classes: for each source the mixture's names of its classes, by their names there; others keep theirs.

    Raises:
        ConfigError: a class to rename is unknown.
        DataError: the sources do not fit each other, or one is empty; names both.
    """
    for source in sources:
        if source.manifest.autoencoder is None or not source.num_samples:
            raise DataError(f"{source.folder}: holds no latents to train on")
    first = sources[0]
    for other in sources[1:]:
        _check_fits(first, other)
    for condition in sorted(set(conditions) - {"class"}):
        _check_members(sources, condition)
    classes, maps = _merge_classes(sources, renamed_classes or [{}] * len(sources))
    common = set.intersection(*(source.suffixes for source in sources)) | ({"cls"} if classes else set())
    members = {member.suffix: member for source in reversed(sources) for member in source.manifest.members}
    crops = [source.manifest.recipe.get("crop") for source in sources]
    merged = first.manifest.model_copy(
        update={
            "classes": classes,
            "labels": _merge_labels(sources),
            "recipe": {"crop": crops[0]} if crops.count(crops[0]) == len(crops) else {},
            "members": tuple(members[suffix] for suffix in sorted(common & members.keys())),
            "shards": tuple(shard for source in sources for shard in source.manifest.shards),
            "parent_digest": None,
            "versions": (),
            "channel_mean": (),
            "channel_std": (),
        }
    )
    mapped = [
        replace(source, class_map=None if class_map == tuple(range(len(classes))) else class_map)
        for source, class_map in zip(sources, maps, strict=True)
    ]
    weights = tuple(Fraction(source.num_samples) for source in sources)
    return Mixture(tuple(mapped), merged, (Stage(0, weights),))


def shard_sizes(manifest: Manifest, skip_shards: tuple[str, ...], folder: str) -> list[int]:
    """Return the number of samples of each shard, counting those to leave out as empty.

    All other shards keep their place in the order, so that a run which stopped at a damaged shard resumes where it was.

    Raises:
        DataError: there is no shard of that name.
    """
    unknown = sorted(set(skip_shards) - {shard.name for shard in manifest.shards})
    if unknown:
        raise DataError(f"{folder}: no shard {unknown[0]} to leave out; name it as its file")
    return [0 if shard.name in skip_shards else shard.samples for shard in manifest.shards]


def shared_shards(training: Mixture, held_back: Mixture) -> list[tuple[str, str]]:
    """Return the paths of shards that are held back and have the bytes of one that is trained on, with those of the latter."""
    trained = {shard.sha256: path for path, shard in _shards_read(training)}
    return [(path, trained[shard.sha256]) for path, shard in _shards_read(held_back) if shard.sha256 in trained]


def _shards_read(mixture: Mixture) -> Iterator[tuple[str, ShardRecord]]:
    """Yield the shards that samples are read of, with their paths or URLs."""
    for source in mixture.sources:
        for shard, size in zip(source.manifest.shards, source.shard_sizes(), strict=True):
            if size:
                yield storage.join(source.folder, shard.name), shard


def _with_shards(source: LatentSource, *parts: slice) -> LatentSource:
    """Return a source of parts of its shards, one after the other."""
    shards = tuple(shard for part in parts for shard in source.manifest.shards[part])
    names = {shard.name for shard in source.manifest.shards} - {shard.name for shard in shards}

    def of_parts(selection: Selection | None) -> Selection | None:
        return selection and Selection.join([selection.of_shards(part) for part in parts])

    def balance_of_parts(balance: Balance | None) -> Balance | None:
        return balance and Balance.join([balance.of_shards(part) for part in parts])

    views = [
        View(
            sum(len(range(view.num_shards)[part]) for part in parts),
            of_parts(view.selection),
            balance_of_parts(view.balance),
        )
        for view in source.views
    ]
    return replace(
        source,
        manifest=source.manifest.model_copy(update={"shards": shards}),
        skip_shards=tuple(name for name in source.skip_shards if name not in names),
        selection=of_parts(source.selection),
        balance=balance_of_parts(source.balance),
        chosen=of_parts(source.chosen),
        views=tuple(views),
    )


def _check_fits(first: LatentSource, other: LatentSource) -> None:
    """Raise DataError, naming both, if the latents of two sources cannot be in one batch."""
    ours, theirs = first.manifest, other.manifest
    assert ours.autoencoder and theirs.autoencoder
    for what, one, two in (
        ("autoencoder", ours.autoencoder.content_hash[:12], theirs.autoencoder.content_hash[:12]),
        ("scale factor", ours.autoencoder.scale_factor, theirs.autoencoder.scale_factor),
        ("shift", ours.autoencoder.shift, theirs.autoencoder.shift),
        ("image size", ours.image_size, theirs.image_size),
    ):
        if one != two:
            raise DataError(
                f"{first.folder} and {other.folder}: cannot be mixed, their {what} is {one} and {two}; encode both alike"
            )
    shapes = {member.suffix: (list(member.shape), member.dtype) for member in ours.members}
    for member in theirs.members:
        shape = shapes.get(member.suffix)
        if shape and shape != (list(member.shape), member.dtype):
            raise DataError(
                f"{first.folder} and {other.folder}: cannot be mixed, their {member.suffix} is {shape[0]} {shape[1]} and "
                f"{list(member.shape)} {member.dtype}; encode both alike"
            )


def _check_members(sources: Sequence[LatentSource], condition: str) -> None:
    """Raise DataError, naming both, if one source has the members of a condition and another has not."""
    needed = {image for image, _ in MEMBERS_OF_CONDITION[condition].values()}
    complete = [source for source in sources if needed <= source.suffixes]
    others = [source for source in sources if not needed <= source.suffixes]
    if complete and others:
        missing = ", ".join(sorted(needed - others[0].suffixes))
        raise DataError(
            f"{others[0].folder}: its samples have no {missing}, those of {complete[0].folder} do; encode shards that do, "
            "or leave it out"
        )


def _merge_classes(
    sources: Sequence[LatentSource], renamed: Sequence[Mapping[str, str]]
) -> tuple[tuple[ClassRecord, ...], list[tuple[int, ...]]]:
    """Return the merged classes with their counts, and for each source the merged index of each of its classes."""
    counts: dict[str, int] = {}
    owners: dict[str, tuple[str, str]] = {}  # the first class of each name without case and punctuation, and its source
    maps = []
    for source, names in zip(sources, renamed, strict=True):
        own = [entry.name for entry in source.manifest.classes]
        for name in sorted(set(names) - set(own)):
            near = difflib.get_close_matches(name, own, 1)
            raise ConfigError(
                f"data.sources {source.name}: classes: {source.folder} has no class {name}"
                + (f"; did you mean {near[0]}?" if near else "; name those that `lfm inspect` lists")
            )
        for entry in source.manifest.classes:
            name = names.get(entry.name, entry.name)
            plain = "".join(character for character in name.casefold() if character.isalnum()) or name
            owner = owners.setdefault(plain, (name, source.name))
            if owner[0] != name:
                raise DataError(
                    f"data.sources {owner[1]} and {source.name}: their classes {owner[0]} and {name} differ in spelling only; "
                    "name one as the other in classes"
                )
            counts[name] = counts.get(name, 0) + entry.count
        index = {name: number for number, name in enumerate(counts)}
        maps.append(tuple(index[names.get(name, name)] for name in own))
    records = (ClassRecord(index=index, name=name, count=count) for index, (name, count) in enumerate(counts.items()))
    return tuple(records), maps


def _merge_labels(sources: Sequence[LatentSource]) -> dict[int, str]:
    """Return the names of the segmentations' class ids, which all sources must share."""
    labels: dict[int, str] = {}
    owners: dict[int, str] = {}
    for source in sources:
        for label, name in source.manifest.labels.items():
            if labels.setdefault(label, name) != name:
                raise DataError(
                    f"{owners[label]} and {source.folder}: cannot be mixed, label {label} of their segmentations is "
                    f"{labels[label]} and {name}; shard one with the labels of the other"
                )
            owners.setdefault(label, source.folder)
    return labels
