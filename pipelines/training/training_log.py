"""How a training is doing, in figures: JSON lines, DeepSpeed's monitors, the progress bar and a plot of the loss."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from lfm import storage
from lfm.data.stream.latent_stream import LatentStream
from lfm.training.engine import Engine
from pipelines.common import image_files, plots

LOG = "log.jsonl"
PLOT = "loss.png"


class Log:
    """The figures of a run as JSON lines; what a killed run wrote beyond its last checkpoint is dropped.

    Args:
        folder: of the run.
        samples_seen: at which training begins or goes on.
        engine: the figures that it has are taken from it; all but the main rank's log is silent.
        flops_per_sample: of a forward and a backward pass, for the model FLOP utilisation.
    """

    def __init__(self, folder: Path, samples_seen: int, engine: Engine, flops_per_sample: int) -> None:
        self.path, self.engine, self.flops_per_sample = folder / LOG, engine, flops_per_sample
        self.quiet = not engine.world.is_main
        self.matmul_rate = matmul_rate(engine.device, engine.dtype)  # on all ranks at once, as they train
        self.at, self.seen, self.waited = time.perf_counter(), samples_seen, 0.0
        self.losses: list[dict[str, float]] = []  # of every step since the last line
        if self.quiet:
            return
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line + "\n" for line in lines if _samples_seen(line) <= samples_seen]
        storage.write_bytes(str(self.path), "".join(kept).encode())
        self.file = self.path.open("a", buffering=1)

    def write(
        self, samples_seen: int, step: int, stream: LatentStream, learning_rate: float, found: dict[str, float]
    ) -> dict[str, str]:
        """Add a line with the mean of `losses`, and empty them; returns what the progress bar shows of it.

        Args:
            stream: tells how long training has waited for data, and what its cache did.
            found: what was measured on the EMA, by name.
        """
        now, losses = time.perf_counter(), _means_of_finite(self.losses)
        elapsed, waited = now - self.at, stream.wait_seconds - self.waited
        rate = (samples_seen - self.seen) / elapsed
        self.at, self.seen, self.waited, self.losses = now, samples_seen, stream.wait_seconds, []
        guard, norm = self.engine.guard, self.engine.gradient_norm
        counts = {what: stream.cache.counts[what] for what in ("cache_hits", "downloads", "retries")}
        line: dict[str, Any] = {
            "samples_seen": samples_seen,
            "step": step,
            **losses,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": guard.skipped,
            "samples_per_second": rate,
            "data_wait": waited / elapsed,
            "model_flop_utilisation": self.flops_per_sample * rate / (self.engine.world.size * self.matmul_rate),
            "peak_memory_bytes": peak_memory(self.engine.device),
            **counts,
            "learning_rate": learning_rate,
            **found,
        }
        if self.quiet:
            return {}
        self.file.write(json.dumps(line) + "\n")
        numbers = {f"train/{name}": float(value) for name, value in line.items() if value is not None}
        self.engine.write_monitors(numbers, samples_seen)
        shown = {
            "step": f"{step:,}",
            "loss": "none finite" if losses["loss"] is None else f"{losses['loss']:.4f}",
            "gradient_norm": f"{norm:.2f}",
            "data_wait": f"{line['data_wait']:.1%}",
            "MFU": f"{line['model_flop_utilisation']:.0%}",
            "memory": f"{line['peak_memory_bytes'] / 1e9:.1f} GB",
            **{what: f"{count:,}" for what, count in counts.items() if count},
        }
        if guard.skipped:
            shown["skipped"] = str(guard.skipped)
        return shown | {name: f"{value:.4g}" for name, value in found.items()}

    def draw(self, distance: str | None) -> None:
        """The curves so far, as images beside the log: of the losses, and of the distance of this name."""
        if self.quiet:
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        for file, names in ((PLOT, ("loss", "validation_loss")), (f"{distance}.png", (distance,))):
            curves = {
                name: [(line["samples_seen"], line[name]) for line in lines if line.get(name) is not None]
                for name in names
                if name
            }
            if any(curves.values()):
                plot = plots.line_plot(
                    {name: points for name, points in curves.items() if points}, x_label="samples seen"
                )
                image_files.save(plot, self.path.parent / file, flush=False)

    def close(self) -> None:
        """Nothing more is written."""
        if not self.quiet:
            self.file.close()


def _means_of_finite(losses: list[dict[str, float]]) -> dict[str, float | None]:
    """Return the mean of each loss by name over the steps at which it was finite; None if it never was."""
    means: dict[str, float | None] = {}
    for name in losses[0]:
        values = [loss[name] for loss in losses if math.isfinite(loss[name])]
        means[name] = sum(values) / len(values) if values else None
    return means


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations per second of the best of the large matrix products that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    one, best, until = torch.full((size, size), 0.5, dtype=dtype, device=device), math.inf, math.inf
    while time.perf_counter() < until:
        began = time.perf_counter()
        float((one @ one)[0, 0])  # waits for the device
        now = time.perf_counter()
        best = min(best, now - began) if until < math.inf else best  # the first one warms up
        until = min(until, now + seconds)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of tensors on a GPU, else of everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _samples_seen(line: str) -> float:
    """Of a line of the log; infinite where a kill cut it off."""
    try:
        return json.loads(line)["samples_seen"]
    except (ValueError, KeyError, TypeError):
        return math.inf
