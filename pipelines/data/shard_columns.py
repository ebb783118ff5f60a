"""The index of raw shards: what was learned of the samples as they were packed, with the columns of the source's label files.

The first is written beside each shard. The second is joined when the set is complete, so that a label file with new columns, or
other values in them, needs no new shards: the same command renews the index alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from lfm import storage
from lfm.data.columns.column_index import import_pyarrow, write_index
from lfm.data.columns.label_columns import label_columns
from lfm.data.manifest import INDEX, OWN_COLUMNS, ColumnsRecord, ShardRecord
from lfm.data.sources.names import storable
from lfm.data.sources.source import Source
from lfm.data.tar import read_tar, sample_key
from lfm.errors import ConfigError, DataError
from lfm.prefetch import map_ahead
from lfm.types import RawSample

FACTS = ("row", "width", "height")  # of each sample: its place among the shard's items, and the size of its image
CONTENT = "content"  # of each sample: see `content_digest`; absent in older shards
ShardFacts = dict[str, list[int]]


class FactsWriter:
    """Collects the facts of a shard's samples, in their order."""

    def __init__(self) -> None:
        self.facts: ShardFacts = {name: [] for name in (*FACTS, CONTENT)}

    def add(self, row: int, sample: RawSample, content: int) -> None:
        """Add a sample that is in row `row` of the shard's items, with the digest of its content."""
        self.facts[CONTENT].append(content)
        for name, value in zip(FACTS, (row, sample.metadata["width"], sample.metadata["height"]), strict=True):
            self.facts[name].append(value)

    def write(self, dest: str, shard: str) -> None:
        """Write them beside the shard."""
        storage.write_json(_path(dest, shard), self.facts, sealed=True)


def write_raw_index(
    dest: str,
    sources: list[Source],
    records: tuple[ShardRecord, ...],
    before: Iterable[dict[str, list[Any]]] = (),
    known: Source | None = None,
    file: str = INDEX,
) -> ColumnsRecord | None:
    """Write the index of a complete set of raw shards; return its record, or None (and say so) without pyarrow.

    Args:
        dest: folder of the set, a path or URL.
        sources: for each shard the source with its items, those that were rejected included.
        records: of the shards.
        before: rows of the shards before these, of a set that grows.
        known: source with the items of the rows before, as far as they are still there.
        file: name of the index.

    Raises:
        DataError: a shard does not hold the items of its source.
    """
    try:
        import_pyarrow(storage.join(dest, INDEX))
    except ConfigError as error:
        logging.getLogger(__name__).warning(
            "%s, then run the same command again; until then columns are not kept", error
        )
        return None
    all_sources = [*sources, *([known] if known else [])]
    columns = label_columns(item.columns for source in all_sources for item in source.items)
    labels_before = {storable(item.image): item.columns for item in known.items} if known else {}

    def parts() -> Iterator[dict[str, list[Any]]]:
        for rows in before:
            label_rows = [labels_before.get(name) for name in rows["source"]]
            part = {name: rows[name] for name in OWN_COLUMNS}
            yield part | {name: [column.value(row) for row in label_rows] for name, column in columns.items()}
        facts = map_ahead(lambda record: _read(dest, record), records, threads=1 if storage.is_local(dest) else 16)
        for source, record, of_shard in zip(sources, records, facts, strict=True):
            if any(row >= len(source.items) for row in of_shard["row"]):
                raise DataError(f"{_path(dest, record.name)}: of other images; remove it, and run the command again")
            items = [source.items[row] for row in of_shard["row"]]
            names = list(map(storable, source.class_names))
            number = int(record.name[:6])
            part = {
                "key": [sample_key(number, row) for row in of_shard["row"]],
                "class": [None if item.class_index is None else names[item.class_index] for item in items],
                "source": [storable(item.image) for item in items],
                "width": of_shard["width"],
                "height": of_shard["height"],
            }
            yield part | {name: [column.value(item.columns) for item in items] for name, column in columns.items()}

    types = OWN_COLUMNS | {name: column.type for name, column in columns.items()}
    return write_index(dest, parts(), types, file)


def read_facts(dest: str, record: ShardRecord) -> ShardFacts | None:
    """Return the facts that were written beside a shard; None if they are missing or damaged: older shards have none."""
    path = _path(dest, record.name)
    if storage.exists(path):
        with contextlib.suppress(DataError):
            facts = storage.read_json(path)
            if _are_facts(facts, record.samples):
                return facts
    return None


def _path(dest: str, shard: str) -> str:
    return storage.join(dest, f"{shard.removesuffix('.tar')}.columns.json")


def _read(dest: str, record: ShardRecord) -> ShardFacts:
    """Return the facts of a shard, from its samples if they are missing or damaged."""
    noted = read_facts(dest, record)
    if noted is not None:
        return noted
    shard = storage.join(dest, record.name)
    facts: ShardFacts = {name: [] for name in FACTS}
    with storage.open_read(shard) as stream:
        for members in read_tar(stream, shard):
            try:
                metadata = json.loads(members["json"])
                values = (int(members["__key__"][-6:]), int(metadata["width"]), int(metadata["height"]))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{shard}: sample {members['__key__']} has no size; make the shard again") from error
            for name, value in zip(FACTS, values, strict=True):
                facts[name].append(value)
    if not _are_facts(facts, record.samples):
        raise DataError(f"{shard}: does not hold the {record.samples} samples of its record; make the shard again")
    return facts


def _are_facts(facts: Any, samples: int) -> bool:
    return (
        isinstance(facts, dict)
        and set(FACTS) <= set(facts) <= {*FACTS, CONTENT}
        and all(isinstance(values, list) and len(values) == samples for values in facts.values())
        and all(
            type(value) is int and 0 <= value < 2 ** (63 if name == CONTENT else 31)
            for name, values in facts.items()
            for value in values
        )
    )
