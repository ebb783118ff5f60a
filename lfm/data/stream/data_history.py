"""The history of a training's data: which versions of its data sets it reads from which sample on.

It is recorded in every checkpoint. From it, the order of all samples follows: of those that were seen and of those to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lfm.data.columns.selection import Selection
from lfm.data.dropped import Drop, drops_digest, without_drops
from lfm.data.stream.balanced_order import BalancedOrder
from lfm.data.stream.mixture import LatentSource, Mixture, View
from lfm.data.stream.mixture_order import MixtureOrder, SourceOrder
from lfm.data.stream.segmented_order import SEGMENTS, Pool, SegmentedOrder, SuccessiveOrders
from lfm.data.versions import Segment, SourceState, at_version, digests
from lfm.errors import DataError


def state_of(source: LatentSource, digest: str | None = None, drops: tuple[Drop, ...] | None = None) -> SourceState:
    """Return the state of a data set, by default of its newest version without all samples that were dropped.

    Args:
        source: the newest version, whole.
        digest: of another version.
        drops: entries of the list of dropped samples that hold.

    Raises:
        DataError: the data set has no such version.
    """
    drops = source.drops if drops is None else drops
    manifest = at_version(source.manifest, digest or source.manifest.digest, source.folder)
    chosen = _first_shards(source.chosen, len(manifest.shards))
    selection = without_drops(chosen, manifest, drops, source.folder)
    return SourceState(
        digest=manifest.digest,
        num_samples=manifest.num_samples if selection is None else int(selection.counts.sum()),
        num_drops=len(drops),
        drops=drops_digest(drops),
        selected=chosen.digest if chosen else None,
    )


def continues(source: LatentSource, state: SourceState) -> bool:
    """Return whether a data set is that of a state, or has grown or lost samples since."""
    drops = source.drops[: state.num_drops]
    return state.digest in digests(source.manifest) and drops_digest(drops) == state.drops


def has_same_selection(source: LatentSource, state: SourceState) -> bool:
    """Return whether `where` selects what it did in the version of a state; see `continues`."""
    return state_of(source, state.digest, source.drops[: state.num_drops]).selected == state.selected


def with_views(source: LatentSource, states: Sequence[SourceState]) -> LatentSource:
    """Return the version of a data set in the last of some states, with a view of each if there are several.

    Args:
        source: the newest version, whole.
        states: of which the first is that at the start of the training.

    Raises:
        DataError: the data set is not that of the states.
    """
    views = []
    for state in states:
        if not continues(source, state):
            raise DataError(
                f"{source.folder}: is not the data set of the history, or has lost its version {state.digest[:12]} or "
                "entries of its dropped.json; name the folder that the run was trained on"
            )
        manifest = at_version(source.manifest, state.digest, source.folder)
        chosen = _first_shards(source.chosen, len(manifest.shards))
        drops = source.drops[: state.num_drops]
        views.append(View(len(manifest.shards), without_drops(chosen, manifest, drops, source.folder)))
    manifest, last = at_version(source.manifest, states[-1].digest, source.folder), views[-1]
    return replace(
        source,
        manifest=manifest,
        selection=last.selection,
        chosen=_first_shards(source.chosen, last.num_shards),
        drops=source.drops[: states[-1].num_drops],
        views=tuple(views) if len(views) > 1 else (),
    )


def order_of(mixture: Mixture, seed: int, window: int) -> MixtureOrder:
    """Return the order of a mixture, by its history if it has several segments."""
    sizes = [source.shard_sizes() for source in mixture.sources]
    selections = [source.selection for source in mixture.sources]
    balances = [source.balance for source in mixture.sources]
    order = MixtureOrder(sizes, mixture.stages, seed, window, selections, balances)
    for number, source in enumerate(mixture.sources):
        if source.views:
            stream = (number,) if len(mixture.sources) > 1 else ()
            starts = [int(order.shares.counts(segment.first_sample)[number, 0]) for segment in mixture.history]
            order.replace_order(number, _order_of_views(source, number, mixture.history, starts, seed, window, stream))
    return order


def _order_of_views(
    source: LatentSource,
    number: int,
    history: Sequence[Segment],
    starts: Sequence[int],
    seed: int,
    window: int,
    stream: tuple[int, ...],
) -> SourceOrder:
    """Return the order of a source with views; segments that leave it as it was leave its order, too."""
    states = [segment.sources[number] for segment in history]
    changes = [place for place, state in enumerate(states) if not place or state != states[place - 1]]
    views, starts = [source.views[place] for place in changes], [starts[place] for place in changes]
    sizes = [source.shard_sizes(view) for view in views]
    selections = [view.selection for view in views]
    if source.balance is None:
        at_once = [history[place].join == "at_once" for place in changes]
        return SegmentedOrder(starts, list(map(Pool, sizes, selections, at_once)), seed, window, stream=stream)
    orders = [
        BalancedOrder(size, seed, window, view.balance, stream=(*stream, SEGMENTS, place) if place else stream)
        for place, (size, view) in enumerate(zip(sizes, views, strict=True))
        if view.balance is not None
    ]
    return SuccessiveOrders(starts, orders, selections)


def num_open_windows(history: Sequence[Segment]) -> int:
    """Return the largest number of windows of one data set that are read from at the same time."""
    return 1 + sum(segment.join == "at_once" for segment in history[1:])


def _first_shards(selection: Selection | None, num: int) -> Selection | None:
    return selection and selection.of_shards(slice(num))
