"""`lfm status`: one screen about a run, from what its folder records."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm import storage
from lfm.errors import ConfigError, DataError, StorageError
from pipelines.common.progress import Progress
from pipelines.monitoring.status_options import StatusConfig

CONFIG, LOG, BEST, LOCK = "config.json", "log.jsonl", "best.json", ".lock"
CHECKPOINT = re.compile(r"samples-(\d{12})/state\.json")
MEASURED = re.compile(r"validation_loss|recognised|fid|(?:fd|kid)-.+")
HIGHER_IS_BETTER = ("recognised",)
LEVELS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH, BAR_WIDTH = 60, 40
RECENT_LINES = 10  # of the log, whose median rate is the present one


@dataclass(frozen=True)
class Measurement:
    """A measurement of the EMA weights: the newest value and the best one, each with the samples seen."""

    name: str
    samples_seen: int
    value: float
    best_samples_seen: int
    best: float


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    Attributes:
        run: folder or URL.
        state: training, stopped or finished; recorded, of a URL, where nothing tells whether it trains.
        samples_seen: of the newest line of the log.
        num_samples: of the whole training.
        samples_per_second: of training alone, the median of the newest lines; None before the first line.
        goodput: samples per second of all time, checkpoints, images and evaluation included; None before the first line.
        seconds_left: at the goodput; None if it does not train.
        loss: the mean loss of each line of the log, None where it was not finite.
        newest: other values of the newest line.
        measurements: of the EMA weights.
        checkpoints: samples seen of each complete one, the oldest first.
        idle_seconds: since the log was written; None of a URL.
    """

    run: str
    state: str
    samples_seen: int
    num_samples: int
    samples_per_second: float | None
    goodput: float | None
    seconds_left: float | None
    loss: list[float | None]
    newest: dict[str, Any]
    measurements: list[Measurement]
    checkpoints: list[int]
    idle_seconds: float | None

    def as_json(self) -> str:
        """Return the status as JSON."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        share = self.samples_seen / self.num_samples
        filled = "#" * round(BAR_WIDTH * share)
        lines = [
            f"{self.run}: {self.state}",
            f"  progress     [{filled:.<{BAR_WIDTH}}] {share:.1%}, {self.samples_seen:,} of {self.num_samples:,} samples",
        ]
        if self.samples_per_second is not None and self.goodput is not None:
            lines.append(
                f"  rate         {self.samples_per_second:,.1f} samples/s in training, {self.goodput:,.1f} of all time"
            )
        if self.seconds_left is not None:
            left = Progress.format_interval(self.seconds_left)
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + self.seconds_left))
            lines.append(f"  time left    {left}, until about {end}")
        if self.idle_seconds is not None:
            lines.append(f"  last line    {Progress.format_interval(self.idle_seconds)} ago")
        finite = [loss for loss in self.loss if loss is not None]
        if finite:
            lines.append(f"  loss         {sparkline(self.loss)}  {finite[0]:.4g} -> {finite[-1]:.4g}")
        if self.newest:
            named = {
                "gradient_norm": "gradient norm",
                "learning_rate": "learning rate",
                "skipped_steps": "skipped steps",
            }
            shown = [
                f"{text} {self.newest[key]:.4g}" for key, text in named.items() if self.newest.get(key) is not None
            ]
            if self.newest.get("data_wait") is not None:
                shown.append(f"data wait {self.newest['data_wait']:.1%}")
            if self.newest.get("peak_memory_bytes"):
                shown.append(f"peak memory {self.newest['peak_memory_bytes'] / 1e9:.2f} GB")
            lines.append(f"  newest step  {', '.join(shown)}")
        for each in self.measurements:
            best = (
                "the best"
                if each.best_samples_seen == each.samples_seen
                else f"best {each.best:.4g} at {each.best_samples_seen:,}"
            )
            lines.append(f"  {each.name:12} {each.value:.4g} at {each.samples_seen:,} samples, {best}")
        numbers = ", ".join(f"{count:,}" for count in self.checkpoints) or "none"
        lines.append(f"  checkpoints  {numbers}")
        return "\n".join(lines)


def run(config: StatusConfig) -> RunStatus:
    """Read the status of a run.

    Raises:
        ConfigError: the folder holds no run of lfm.
    """
    experiment, lines = _read_config(config.run), _read_log(config.run)
    num_samples = int(experiment["train"]["num_steps"]) * int(experiment["train"]["global_batch"])
    seen = min(int(lines[-1]["samples_seen"]), num_samples) if lines else 0
    state, idle = _state(config.run, finished=seen >= num_samples)
    recent = lines[-RECENT_LINES:]
    rate = statistics.median(line["samples_per_second"] for line in recent) if recent else None
    goodput = _goodput(lines)
    return RunStatus(
        run=config.run,
        state=state,
        samples_seen=seen,
        num_samples=num_samples,
        samples_per_second=rate,
        goodput=goodput,
        seconds_left=(num_samples - seen) / goodput if goodput and state in ("training", "recorded") else None,
        loss=[line.get("loss") for line in lines],
        newest=lines[-1] if lines else {},
        measurements=_measurements(lines),
        checkpoints=_checkpoints(config.run),
        idle_seconds=idle,
    )


def _goodput(lines: list[dict[str, Any]]) -> float | None:
    """Return the samples per second over the whole log, without the time between a stop and the resumption."""
    seen, seconds = 0, 0.0
    for line in lines:
        seconds += (line["samples_seen"] - seen) / line.get("goodput", line["samples_per_second"])
        seen = line["samples_seen"]
    return seen / seconds if seconds else None


def sparkline(values: list[float | None], width: int = CURVE_WIDTH) -> str:
    """Return values as a line of at most `width` blocks, each the mean of its part; without finite values, a space."""
    size = max(1, math.ceil(len(values) / width))
    parts = [
        [value for value in values[first : first + size] if value is not None] for first in range(0, len(values), size)
    ]
    means = [statistics.fmean(part) if part else None for part in parts]
    finite = [mean for mean in means if mean is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    steps = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else LEVELS[round((mean - low) * steps)] for mean in means)


def _read_config(run: str) -> dict[str, Any]:
    path = storage.join(run, CONFIG)
    if storage.is_local(run) and not Path(run).is_dir():
        problem = "is a file" if Path(run).exists() else "no such folder"
        raise ConfigError(f"{run}: {problem}; name the run folder of a training")
    if not storage.exists(path):
        raise ConfigError(f"{run}: holds no run of lfm: there is no {CONFIG}; name the run folder of a training")
    try:
        content = storage.read_json(path)
        assert content["train"]["num_steps"] > 0 and content["train"]["global_batch"] > 0
    except (StorageError, DataError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{run}: holds no run of lfm: {CONFIG} is damaged or of something else; name the run folder of a training"
        ) from error
    return content


def _read_log(run: str) -> list[dict[str, Any]]:
    """Return the lines of the log, without one that is being written."""
    path = storage.join(run, LOG)
    lines = []
    if storage.exists(path):
        for text in storage.read_bytes(path).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and {"samples_seen", "samples_per_second"} <= line.keys():
                    lines.append(line)
    return lines


def _checkpoints(run: str) -> list[int]:
    """Return the samples seen of each complete checkpoint, the oldest first."""
    try:
        names = storage.find(storage.join(run, "checkpoints"))
    except StorageError:  # no checkpoint yet
        return []
    return sorted(int(match[1]) for name in names if (match := CHECKPOINT.fullmatch(name)))


def _state(run: str, *, finished: bool) -> tuple[str, float | None]:
    """Return the state, and the seconds since the log was written."""
    if not storage.is_local(run):
        return "finished" if finished else "recorded", None
    log, lock = Path(run) / LOG, Path(run) / LOCK
    idle = max(0.0, time.time() - log.stat().st_mtime) if log.exists() else None
    if _is_locked(lock):
        return "training", idle
    return "finished" if finished else "stopped; run its command again to resume", idle


def _is_locked(path: Path) -> bool:
    """Return whether a process trains into the folder of a lock file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or none that may be read
        return False
    return False


def _measurements(lines: list[dict[str, Any]]) -> list[Measurement]:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if MEASURED.fullmatch(name) and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, []).append((line["samples_seen"], float(value)))
    measurements = []
    for name, curve in sorted(points.items()):
        choose = max if name in HIGHER_IS_BETTER else min
        best_samples_seen, best = choose(curve, key=lambda point: point[1])
        measurements.append(Measurement(name, *curve[-1], best_samples_seen, best))
    return measurements
