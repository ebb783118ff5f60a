"""The index of columns at a large number of rows: its size, and time and memory of writing, selecting and reading an order.

    python benchmarks/columns.py --rows 10000000

writes an index of random columns as `lfm shard` writes it (keys, 1,000 classes, sources, sizes, a score), selects samples by
conditions, and takes a million positions of the order of each. Each row of the table is a process of its own, whose
peak memory it states: pyarrow and lfm alone take what the row `nothing` shows.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from lfm.data.columns.column_index import import_pyarrow, write_index
from lfm.data.columns.selection import select
from lfm.data.manifest import OWN_COLUMNS, ColumnsRecord, Manifest, ShardRecord
from lfm.data.stream.mixture_order import MixtureOrder, Stage
from lfm.data.tar import sample_key
from lfm.storage.cache import Cache

SHARD = 4096
DISTINCT = 256  # shards of different columns, a million rows
POSITIONS = 2**20
CONDITIONS = {
    "1 % by a number": "score < 0.01",
    "1 % by class": "class in ('class 10', 'class 20', 'class 30', 'class 40', 'class 50', 'class 60', 'class 70', 'class 80', "
    "'class 90', 'class 100')",
    "a pattern of sources": "like(source, '%/7%.jpg')",
    "all": "score >= 0",
}


def parts(rows: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of each shard; all but the keys repeat after `DISTINCT` shards, as random names take long to make."""
    random = np.random.default_rng(0)
    made = [_random_columns(random) for _ in range(DISTINCT)]
    for shard, start in enumerate(range(0, rows, SHARD)):
        num = min(SHARD, rows - start)
        columns = {name: values[:num] for name, values in made[shard % DISTINCT].items()}
        yield {"key": [sample_key(shard, row) for row in range(num)], **columns}


def _random_columns(random: np.random.Generator) -> dict[str, Any]:
    """Return the columns of one shard, without its keys."""
    classes = random.integers(1000, size=SHARD).tolist()
    names = random.integers(10**6, size=SHARD).tolist()
    return {
        "class": [f"class {index}" for index in classes],
        "source": [f"class {index}/{name}.jpg" for index, name in zip(classes, names, strict=True)],
        "width": random.integers(200, 2000, size=SHARD),
        "height": random.integers(200, 2000, size=SHARD),
        "score": random.random(SHARD),
    }


def manifest_of(rows: int, record: ColumnsRecord) -> Manifest:
    """Return the manifest of so many samples."""
    sizes = [min(SHARD, rows - start) for start in range(0, rows, SHARD)]
    shards = [
        ShardRecord(name=f"{number:06d}.tar", samples=size, bytes=size, sha256="", crc32=0)
        for number, size in enumerate(sizes)
    ]
    return Manifest(kind="raw", image_size=8, recipe={}, shards=tuple(shards), columns=record)


class Measurement(BaseModel):
    """What one process measured."""

    seconds: float
    peak_bytes: int
    selected: int = 0
    bytes: int = 0  # of the index
    order_seconds: float = 0.0  # for `POSITIONS` positions


def measure(folder: Path, rows: int, task: str) -> Measurement:
    """Do one task in this process."""
    import_pyarrow("benchmarks")
    record_file = folder / "record.json"
    began = time.perf_counter()
    result: dict[str, Any] = {}
    if task == "write":
        record = write_index(str(folder), parts(rows), OWN_COLUMNS | {"score": "float"})
        record_file.write_text(record.model_dump_json())
        result["bytes"] = record.bytes
    elif task in CONDITIONS:
        manifest = manifest_of(rows, ColumnsRecord.model_validate_json(record_file.read_text()))
        began = time.perf_counter()
        selection = select(str(folder), manifest, CONDITIONS[task], Cache(folder / "cache"), "where")
        result |= {"selected": int(selection.counts.sum()), "seconds": time.perf_counter() - began}
        began = time.perf_counter()
        order = MixtureOrder([selection.counts], (Stage(0, (Fraction(1),)),), 0, 8, [selection])
        for position in range(0, POSITIONS, SHARD):
            order.at(position, SHARD)
        result["order_seconds"] = time.perf_counter() - began
    result.setdefault("seconds", time.perf_counter() - began)
    return Measurement(peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **result)


def main() -> None:
    """Run every task in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--dry-run", action="store_true", help="10,000 rows")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="folder for the index (default: a temporary one)")
    options = parser.parse_args()
    options.rows = 10_000 if options.dry_run else options.rows
    if options.task:
        print(measure(options.folder, options.rows, options.task).model_dump_json())
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"{options.rows:,} rows, {-(-options.rows // SHARD):,} shards")
        for task in ("nothing", "write", *CONDITIONS):
            command = [sys.executable, __file__, "--task", task, "--rows", str(options.rows)]
            output = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=True).stdout
            row = Measurement.model_validate_json(output)
            size = f", {row.bytes / 1e6:,.1f} MB, {row.bytes / options.rows:.1f} bytes a row" if row.bytes else ""
            order = f", {row.selected:,} samples; order {row.order_seconds / POSITIONS * 1e6:.2f} us a position"
            print(
                f"{task:<22} {row.seconds:8.2f} s, peak {row.peak_bytes / 1e6:7,.0f} MB"
                f"{size}{order if task in CONDITIONS else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
