"""What the forecasts of `--dry-run` share: sizes in words, free disk space, and the time that work takes on a device."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

KEPT_BY_MALLOC = 0.25  # share of the activations by which a process on a CPU grows beyond them; measured
MEASURED_SECONDS, FEWEST_TIMES, MOST_TIMES = 1.0, 2, 100


def gigabytes(size: float) -> str:
    """Return a size in GB of 10^9 bytes, or in MB if it is small."""
    return f"{size / 1e9:.3g} GB" if size >= 5e7 else f"{size / 1e6:.3g} MB"


def listed(parts: Mapping[str, int]) -> str:
    """Return the sum of sizes in bytes, and in brackets the parts that are not 0."""
    words = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    return f"{gigabytes(sum(parts.values()))} ({words})"


def kept_by_malloc(activations: int) -> dict[str, int]:
    """Return as a part what a process on a CPU keeps of the activations that it has freed."""
    return {"freed activations": round(KEPT_BY_MALLOC * activations)}


def free_bytes(path: Path) -> int:
    """Return the free space of the disk of a path, which need not exist yet."""
    return shutil.disk_usage(next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())).free


def median_seconds(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median time of work, done several times within about a second, after a first time that is not counted."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    work()
    times: list[float] = []
    while len(times) < FEWEST_TIMES or (sum(times) < MEASURED_SECONDS and len(times) < MOST_TIMES):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times)
