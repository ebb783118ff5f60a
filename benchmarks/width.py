"""Whether a learning rate that was found on a narrow network serves a wide one, with and without `train.reference_width`.

    python benchmarks/width.py OUT [--latents LATENTS] [--seeds 3] [--dry-run]

Trains the recipe of `record.py` on drawn scenes at each of `WIDTHS` and `RATES`, several seeds each: as it is, and with the
learning rate scaled from the narrowest width. The validation loss over the learning rate is plotted in docs/width.png, and
its values are written to width.json beside this file; with --dry-run, in the smallest size, to OUT. Resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import record
from matplotlib.figure import Figure

from pipelines.comparison.compare import run as compare
from pipelines.comparison.comparison_options import CompareConfig

HERE = Path(__file__).parent
WIDTHS: tuple[int, ...] = (64, 128, 256)
RATES: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
HEAD_CHANNELS = 32
MODES = {"as it is": None, f"reference_width {WIDTHS[0]}": WIDTHS[0]}

Results = dict[str, dict[str, dict[str, list[float]]]]  # losses of the seeds by mode, width and rate

BUDGET: record.Changes = {
    "run": "unused",
    "train.global_batch": 32,
    "train.num_steps": 200,
    "train.validate_every": 200,
    "evaluation": None,
}


def measure(
    out: Path, width: int, reference: int | None, rates: tuple[float, ...], seeds: int, overrides: tuple[str, ...]
) -> dict[str, list[float]]:
    """Train one width at each rate, and return the validation losses at the end of each seed by rate."""
    label = f"{width}-{'plain' if reference is None else 'scaled'}"
    files = []
    for rate in rates:
        changes: record.Changes = {
            "model.hidden_size": width,
            "model.num_heads": width // HEAD_CHANNELS,
            "train.learning_rate": rate,
        }
        if reference is not None:
            changes["train.reference_width"] = reference
        files.append(str(record.write_config(out / "configs", f"{label}-{rate:g}", {**BUDGET, **changes})))
    compare(CompareConfig(tuple(files), str(out / "runs" / label), seeds=seeds, overrides=overrides, num_gpus=1))
    report = json.loads((out / "runs" / label / "compare.json").read_text())
    losses = [entry["validation_loss"]["final"] for entry in report["configurations"]]
    return {f"{rate:g}": values for rate, values in zip(rates, losses, strict=True)}


def plot(results: Results, path: Path) -> None:
    """Draw the mean loss over the rate, a panel for each mode and a line for each width; rings are the best rates."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, (mode, widths) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for number, (width, rates) in enumerate(widths.items()):
            means = [statistics.fmean(values) for values in rates.values()]
            spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in rates.values()]
            panel.errorbar(list(map(float, rates)), means, spreads, color=f"C{number}", label=f"width {width}")
            best = min(rates, key=lambda rate: statistics.fmean(rates[rate]))
            panel.plot(float(best), min(means), "o", color=f"C{number}", markersize=10, fillstyle="none")
        panel.set_xscale("log", base=2)
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        panel.set_xlabel("learning rate")
        panel.set_title(mode)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.axes[0].set_ylabel("validation loss")
    figure.savefig(path, dpi=110)


def table(results: Results) -> str:
    """Return the losses, mean and standard deviation, as a table in Markdown."""
    rates = next(iter(next(iter(results.values())).values()))
    rows = ["| | width | " + " | ".join(rates) + " |", "|" + " --- |" * (2 + len(rates))]
    for mode, widths in results.items():
        for width, losses in widths.items():
            cells = [
                f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
                for values in losses.values()
            ]
            rows.append(f"| {mode} | {width} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out = options.out.absolute()
    sizes = (64, 64) if options.dry_run else (record.NUM_SCENES, record.NUM_HELD_BACK)
    latents = options.latents or record.scenes(out, *sizes)
    overrides: tuple[str, ...] = (f"data.shards={latents.absolute()}",)
    widths, rates, seeds = WIDTHS, RATES, options.seeds
    if options.dry_run:
        overrides += ("train.num_steps=2", "train.validate_every=1")
        widths, rates, seeds = WIDTHS[:1], RATES[:1], 1
    results = {
        mode: {str(width): measure(out, width, reference, rates, seeds, overrides) for width in widths}
        for mode, reference in MODES.items()
    }
    folder, image = (out, out / "width.png") if options.dry_run else (HERE, record.CHECKOUT / "docs" / "width.png")
    (folder / "width.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, image)
    print(table(results))


if __name__ == "__main__":
    main()
