"""The report of `lfm compare`: what each configuration measured, its differences to the first one, and one plot.

For each metric and configuration: the final values by seed, their difference to those of the first configuration with a
test, and the samples and seconds after which the final value of the first configuration was reached (of the same seed, where
the trainings are pairs), as a share of the first configuration's whole training. Seconds are those of the log's rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfm import storage
from pipelines.common import factory
from pipelines.comparison.paired_statistics import difference, reached_at
from pipelines.comparison.paired_trainings import Training, read_log, unpaired_key

Points = list[tuple[float, float]]

METRIC_NAMES = ("validation_loss", "recognised")
METRIC_PREFIXES = ("fd-", "kid-")
HIGHER_IS_BETTER = ("recognised",)
REPORT, TABLE, PLOT = "compare.json", "compare.txt", "compare.png"


def build(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return the report of finished trainings as JSON values.

    Keys: `seeds`, `metrics` (names), and `configurations`, of which each has `name`, `file`, `seeds`, `not_paired` (why, or
    None), `num_samples`, `training_flops` (None without a formula), `samples_per_second` (median), and by metric `curves`,
    `final`, `difference` (None for the first), `samples_to_target` and `seconds_to_target` (one per seed; None: not reached).
    """
    groups: dict[str, list[Training]] = {}
    for training in trainings:
        groups.setdefault(training.name, []).append(training)
    logs = {name: [read_log(training.folder) for training in group] for name, group in groups.items()}
    metrics = sorted(set.intersection(*({*_metrics(log)} for group in logs.values() for log in group)))
    first = next(iter(groups.values()))
    report: dict[str, Any] = {"seeds": len(first), "metrics": metrics, "configurations": []}
    for name, group in groups.items():
        reason = unpaired_key(first[0].config, group[0].config)
        entry: dict[str, Any] = {
            "name": name,
            "file": group[0].file,
            "seeds": [training.seed for training in group],
            "not_paired": reason,
            "num_samples": group[0].num_samples,
            "training_flops": _training_flops(group[0]),
            "samples_per_second": statistics.median(line["samples_per_second"] for log in logs[name] for line in log),
        }
        for metric in metrics:
            entry[metric] = _compared(metric, logs[first[0].name], logs[name], paired=reason is None)
            if group is first:
                entry[metric]["difference"] = None
        report["configurations"].append(entry)
    return report


def write(report: dict[str, Any], folder: Path) -> str:
    """Write JSON, table and plot into `folder`; return the table."""
    table = as_table(report)
    storage.write_json(str(folder / REPORT), report)
    storage.write_bytes(str(folder / TABLE), f"{table}\n".encode())
    draw(report, folder / PLOT)
    return table


def _metrics(log: list[dict[str, Any]]) -> list[str]:
    """Return the names of what was measured on the model during a training."""
    names = {name for line in log for name in line}
    return [name for name in names if name in METRIC_NAMES or name.startswith(METRIC_PREFIXES)]


def _training_flops(training: Training) -> float | None:
    """Return the operations of all forward and backward passes of a training: three times the forward passes."""
    mixture = factory.load_mixture(training.config)
    flops = factory.model_config(training.config, mixture.manifest).flops_per_sample
    return None if flops is None else 3.0 * flops * training.num_samples


def _curves(metric: str, log: list[dict[str, Any]]) -> tuple[Points, Points]:
    """Return a metric over the samples seen and over the seconds of training."""
    by_samples, by_seconds = [], []
    seen, seconds = 0, 0.0
    for line in log:
        # Logs of before have one rate, which counts everything.
        seconds += (line["samples_seen"] - seen) / line.get("goodput", line["samples_per_second"])
        seen = line["samples_seen"]
        if line.get(metric) is not None:
            by_samples.append((float(seen), float(line[metric])))
            by_seconds.append((seconds, float(line[metric])))
    return by_samples, by_seconds


def _compared(metric: str, first_logs: list[Any], logs: list[Any], *, paired: bool) -> dict[str, Any]:
    """Return one configuration's entry of a metric."""
    higher = metric in HIGHER_IS_BETTER
    first_curves = [_curves(metric, log) for log in first_logs]
    curves = [_curves(metric, log) for log in logs]
    first_final = [by_samples[-1][1] for by_samples, _ in first_curves]
    final = [by_samples[-1][1] for by_samples, _ in curves]
    targets = first_final if paired else [statistics.fmean(first_final)] * len(final)
    shares: list[list[float | None]] = []
    for axis in range(2):
        whole = statistics.fmean(curve[axis][-1][0] for curve in first_curves)
        reached = [
            reached_at(curve[axis], target, higher_is_better=higher)
            for curve, target in zip(curves, targets, strict=True)
        ]
        shares.append([None if x is None else x / whole for x in reached])
    return {
        "curves": [{"samples": by_samples, "seconds": by_seconds} for by_samples, by_seconds in curves],
        "final": final,
        "difference": _without_nan(asdict(difference(first_final, final, paired=paired, higher_is_better=higher))),
        "samples_to_target": shares[0],
        "seconds_to_target": shares[1],
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON does not have, by None."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def as_table(report: dict[str, Any]) -> str:
    """Return the report as text, one block for each metric."""
    blocks = []
    width = max(len(entry["name"]) for entry in report["configurations"])
    for metric in report["metrics"]:
        better = "higher" if metric in HIGHER_IS_BETTER else "lower"
        header = f"{'final':>20} {'difference':>20} {'p':>6} {'better':>7} {'samples':>21} {'seconds':>21}"
        rows = [f"{metric} ({better} is better)", f"{'':{width}} {header}"]
        rows += [
            f"{entry['name']:{width}} {_row(entry[metric], report['seeds'])}" for entry in report["configurations"]
        ]
        blocks.append("\n".join(rows))
    notes = [f"{entry['name']}: {entry['not_paired']}" for entry in report["configurations"] if entry["not_paired"]]
    if report["seeds"] == 1:
        notes.append("one seed: no spread and no test; another seed may differ by more than the configurations do")
    notes.append("samples, seconds: when the first configuration's final value was reached, as a share of its training")
    return "\n\n".join([*blocks, "\n".join(notes)])


def _row(entry: dict[str, Any], seeds: int) -> str:
    final = f"{statistics.fmean(entry['final']):.4g}"
    if seeds > 1:
        final += f" +- {statistics.stdev(entry['final']):.2g}"
    change, p, better = "", "", ""
    if test := entry["difference"]:
        change = f"{test['relative']:+.1%}" if test["relative"] is not None else f"{test['mean']:+.3g}"
        if test["spread"] is not None:
            change += f" ({test['mean']:+.2g} +- {test['spread']:.1g})"
            p = f"{test['p']:.3f}"
        better = f"{test['num_better']} of {seeds}" if test["values"] else ""
    reached = [_share(entry[f"{axis}_to_target"]) for axis in ("samples", "seconds")]
    return f"{final:>20} {change:>20} {p:>6} {better:>7} {reached[0]:>21} {reached[1]:>21}"


def _share(values: list[float | None]) -> str:
    """Return the median over the seeds with least and most, or in how many seeds the target was reached."""
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f"reached in {len(reached)} of {len(values)}"
    middle = f"{statistics.median(reached):.2f}"
    return middle if len(reached) == 1 else f"{middle} ({min(reached):.2f} to {max(reached):.2f})"


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot each metric over samples and over seconds: the mean of the seeds, and each seed as a thin line."""
    import numpy as np
    from matplotlib.figure import Figure

    metrics = report["metrics"]
    figure = Figure(figsize=(11, 3.6 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), 2, squeeze=False)
    for row, metric in zip(panels, metrics, strict=True):
        for panel, axis in zip(row, ("samples", "seconds"), strict=True):
            for number, entry in enumerate(report["configurations"]):
                curves = [np.array(curve[axis]) for curve in entry[metric]["curves"]]
                for curve in curves:
                    panel.plot(curve[:, 0], curve[:, 1], color=f"C{number}", linewidth=0.5, alpha=0.5)
                mean = np.mean(curves, axis=0)
                panel.plot(mean[:, 0], mean[:, 1], color=f"C{number}", linewidth=1.8, label=entry["name"])
            panel.set_xlabel("samples seen" if axis == "samples" else "seconds of training")
            panel.set_ylabel(metric)
            panel.grid(alpha=0.3)
        row[0].legend()
    with storage.writing(str(path), flush=False) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
