"""The log of a training: JSON lines, DeepSpeed's monitors, figures for the progress bar, and plots."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lfm import storage
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.versions import Segment
from lfm.training.engine import Engine
from pipelines.common import image_files, plots

LOG = "log.jsonl"
LOSS_CURVES = ("loss", "validation_loss")  # plotted together in loss.png
CACHE_COUNTS = ("cache_hits", "downloads", "retries")
RISES, SMALLEST_RISE = 3, 0.01  # validations in a row that must rise, and by what share in all
logger = logging.getLogger(__name__)


class TrainingLog:
    """Writes the log of a run. Lines beyond `samples_seen`, of a run that was killed after its last checkpoint, are removed.

    Args:
        folder: run folder.
        samples_seen: number of samples at which training starts or resumes.
        engine: trains the model; only the main rank writes.
        stream: training data, whose waiting times and cache are logged.
        flops_per_sample: operations of a forward and a backward pass, for the model FLOP utilization; None if unknown.
        history: versions of the data, of which the log names each once.
    """

    def __init__(
        self,
        folder: Path,
        samples_seen: int,
        engine: Engine,
        stream: LatentStream,
        flops_per_sample: int | None,
        history: Sequence[Segment] = (),
    ) -> None:
        self.path, self.engine, self.stream, self.flops_per_sample = folder / LOG, engine, stream, flops_per_sample
        # On all ranks at once, as in training, where they share memory bandwidth and cores.
        self.matmul_rate = matmul_rate(engine.device, engine.dtype) if flops_per_sample else math.nan
        self.losses: list[dict[str, float]] = []  # of each step since the last line
        self._history, self._logged_segment = history, -1
        self._restart_interval(samples_seen)
        self.writes = engine.world.is_main
        if self.writes:
            lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
            lines = [f"{line}\n" for line in lines if _samples_seen(line) <= samples_seen]
            storage.write_bytes(str(self.path), "".join(lines).encode())
            self.file = self.path.open("a", buffering=1)

    def write(
        self, samples_seen: int, step: int, learning_rate: float, measurements: dict[str, float]
    ) -> dict[str, str]:
        """Write a line with the means of `losses`, and clear them.

        Args:
            samples_seen: samples seen after this step.
            step: number of this step, from 1.
            learning_rate: learning rate of this step.
            measurements: results of validation and evaluation at this step, by name.

        Returns:
            The figures for the progress bar, as text by name; empty on other ranks than the main one.
        """
        line = self._line(samples_seen, step, learning_rate, measurements) | self._new_versions(samples_seen)
        self.losses = []
        self._restart_interval(samples_seen)
        if not self.writes:
            return {}
        self.file.write(json.dumps(line) + "\n")
        if "validation_loss" in measurements and (warning := overfitting(self._read())):
            logger.warning(warning)
        numbers = {f"train/{name}": float(value) for name, value in line.items() if isinstance(value, (int, float))}
        self.engine.write_monitors(numbers, samples_seen)
        return _figures(line) | {name: f"{value:.4g}" for name, value in measurements.items()}

    def _new_versions(self, samples_seen: int) -> dict[str, list[str]]:
        """Return the first digits of the digests of the data that are read, if this log has not named them yet."""
        segment = sum(segment.first_sample < samples_seen for segment in self._history) - 1
        if segment == self._logged_segment:
            return {}
        self._logged_segment = segment
        return {"data_versions": [state.digest[:12] for state in self._history[segment].sources]}

    def plot(self, *distances: str) -> None:
        """Plot the losses so far as loss.png, and each of the measured `distances` as NAME.png."""
        if not self.writes:
            return
        lines = self._read()
        for stem, names in (("loss", LOSS_CURVES), *((name, (name,)) for name in distances)):
            curves = {
                name: [(line["samples_seen"], line[name]) for line in lines if line.get(name) is not None]
                for name in names
                if any(line.get(name) is not None for line in lines)
            }
            if curves:
                plot = plots.line_plot(curves, x_label="samples seen")
                image_files.save(plot, self.path.with_name(f"{stem}.png"), flush=False)

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        """Close the file."""
        if self.writes:
            self.file.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time within the block in `goodput`, and not in the other rates."""
        start, start_cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.paused_seconds += time.perf_counter() - start
            self.paused_cpu_seconds += time.process_time() - start_cpu

    def _restart_interval(self, samples_seen: int) -> None:
        """Measure rate and waiting time from now on."""
        self.start_time, self.start_samples = time.perf_counter(), samples_seen
        self.start_cpu_seconds = time.process_time()
        self.start_wait = self.stream.wait_seconds
        self.paused_seconds = self.paused_cpu_seconds = 0.0

    def _line(
        self, samples_seen: int, step: int, learning_rate: float, measurements: dict[str, float]
    ) -> dict[str, Any]:
        elapsed = time.perf_counter() - self.start_time
        trained = elapsed - self.paused_seconds
        cpu_seconds = time.process_time() - self.start_cpu_seconds - self.paused_cpu_seconds
        num_samples = samples_seen - self.start_samples
        rate = num_samples / trained
        norm = self.engine.gradient_norm
        line: dict[str, Any] = {
            "samples_seen": samples_seen,
            "step": step,
            **_means_of_finite(self.losses),
            "gradient_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": self.engine.guard.num_skipped,
            "samples_per_second": rate,
            "goodput": num_samples / elapsed,
            "cpu_seconds_per_sample": cpu_seconds / num_samples,
            "data_wait": (self.stream.wait_seconds - self.start_wait) / trained,
        }
        if self.flops_per_sample:
            limit = self.engine.world.size * self.matmul_rate
            line["model_flop_utilisation"] = self.flops_per_sample * rate / limit
        line["peak_memory_bytes"] = peak_memory(self.engine.device)
        line |= {name: self.stream.cache.counts[name] for name in CACHE_COUNTS}
        return line | {"learning_rate": learning_rate, **measurements}


def _figures(line: dict[str, Any]) -> dict[str, str]:
    """Return what the progress bar shows of a line."""
    figures = {
        "step": f"{line['step']:,}",
        "loss": "none finite" if line["loss"] is None else f"{line['loss']:.4f}",
        "gradient_norm": "not finite" if line["gradient_norm"] is None else f"{line['gradient_norm']:.2f}",
        "data_wait": f"{line['data_wait']:.1%}",
    }
    if "model_flop_utilisation" in line:
        figures["MFU"] = f"{line['model_flop_utilisation']:.0%}"
    figures["memory"] = f"{line['peak_memory_bytes'] / 1e9:.1f} GB"
    figures |= {name: f"{line[name]:,}" for name in CACHE_COUNTS if line[name]}
    if line["skipped_steps"]:
        figures["skipped"] = str(line["skipped_steps"])
    return figures


def _means_of_finite(losses: list[dict[str, float]]) -> dict[str, float | None]:
    """Return the mean of each loss by name over the steps at which it was finite; None if it never was."""
    means: dict[str, float | None] = {}
    for name in losses[0]:
        values = [loss[name] for loss in losses if math.isfinite(loss[name])]
        means[name] = sum(values) / len(values) if values else None
    return means


def overfitting(lines: Sequence[dict[str, Any]]) -> str | None:
    """Return a warning if the validation loss has risen, validation by validation, while the training loss fell.

    Args:
        lines: the log of a run, the newest line last.
    """
    losses = [(number, line["validation_loss"]) for number, line in enumerate(lines) if line.get("validation_loss")]
    newest = losses[-RISES - 1 :]
    rises = [after[1] > before[1] for before, after in itertools.pairwise(newest)]
    if len(rises) < RISES or not all(rises) or newest[-1][1] < (1 + SMALLEST_RISE) * newest[0][1]:
        return None
    turn, lowest = newest[0]
    middle = (turn + 1 + len(lines)) // 2
    before, after = _mean_loss(lines[turn + 1 : middle]), _mean_loss(lines[middle:])
    if before is None or after is None or after >= before:
        return None
    return (
        f"the validation loss has risen since {lines[turn]['samples_seen']:,} samples seen, from {lowest:.4g} to "
        f"{newest[-1][1]:.4g}, while the training loss falls: the network learns its samples by heart; stop here, or train "
        "with more samples, flips or condition_dropout"
    )


def _mean_loss(lines: Sequence[dict[str, Any]]) -> float | None:
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return statistics.fmean(losses) if losses else None


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the floating-point operations per second of the fastest of the large matrix products within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    factor = torch.full((size, size), 0.5, dtype=dtype, device=device)
    float((factor @ factor)[0, 0])  # warms up
    shortest, end = math.inf, time.perf_counter() + seconds
    while shortest == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        float((factor @ factor)[0, 0])  # waits for the device
        shortest = min(shortest, time.perf_counter() - start)
    return 2 * size**3 / shortest


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that this process has held: of tensors on a GPU, else of all its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The figure of getrusage may be that of the process which started this one, if that was larger.
    status = Path("/proc/self/status")
    if status.exists() and (line := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(line[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _samples_seen(line: str) -> float:
    """Return the samples seen of a line of the log; infinity for a line that a kill cut off."""
    try:
        return json.loads(line)["samples_seen"]
    except (ValueError, KeyError, TypeError):
        return math.inf
