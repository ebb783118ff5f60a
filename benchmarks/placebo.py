"""What `lfm compare` says of configurations that do not differ, and of one that is worse by about 3 %.

    python benchmarks/placebo.py OUT [--latents LATENTS] [--seeds 5] [--dry-run]

Trains on drawn scenes, as `record.py` does, a smaller recipe with `lfm compare`, several seeds each:

    recipe      the first configuration
    placebo     the recipe with other seeds: other initial weights, samples, noise and times
    rounding    the recipe with the batch summed in two parts, which changes the last bits alone, and the same seeds
    planted     the recipe at a lower learning rate, which costs about 3 % of the loss, and the same seeds

The learning rate of `planted` was chosen on a seed that is not among those of the comparison. Both kinds of test are then
applied to all ways of splitting the runs of recipe and placebo, which are runs of one distribution, into two groups of
three: the share of splits with p < 0.05 should be about 0.05. All of it resumes. The numbers are written to placebo.json
beside this file and the plot to docs/placebo.png; with --dry-run, in the smallest size, to OUT.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import record

from pipelines.comparison.compare import run as compare
from pipelines.comparison.comparison_options import CompareConfig
from pipelines.comparison.paired_statistics import difference

HERE = Path(__file__).parent
METRIC = "validation_loss"
GROUP = 3  # runs on each side of a split

RECIPE: record.Changes = {
    "run": "unused",
    "model.hidden_size": 64,
    "model.num_heads": 2,
    "train.num_steps": 160,
    "train.validate_every": 40,
    "evaluation": None,
}
CONFIGURATIONS: dict[str, record.Changes] = {
    "recipe": {},
    "placebo": {"train.seed": 100},
    "rounding": {"train.micro_batch": 32},
    "planted": {"train.learning_rate": 2.6e-3},
}


def splits(values: list[float]) -> dict[str, float]:
    """Return the share of splits of equivalent runs into two groups that each kind of test calls significant."""
    pairs = [
        (first, second)
        for first in itertools.permutations(range(len(values)), GROUP)
        for second in itertools.permutations(sorted(set(range(len(values))) - {*first}), GROUP)
        if first[0] == min(first)  # one order of each pairing
    ]
    shares = {}
    for name, paired in (("paired", True), ("welch", False)):
        tests = [
            difference([values[i] for i in first], [values[i] for i in second], paired=paired, higher_is_better=False)
            for first, second in pairs[:: max(1, len(pairs) // 2000)]
        ]
        shares[name] = statistics.fmean(test.p < 0.05 for test in tests)
    return shares


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the report says of each configuration, and the shares of `splits`."""
    entries = {entry["name"]: entry for entry in report["configurations"]}
    finals = {name: entry[METRIC]["final"] for name, entry in entries.items()}
    result: dict[str, Any] = {"configurations": {}}
    for name, entry in entries.items():
        test = entry[METRIC]["difference"]
        result["configurations"][name] = {
            "changes": CONFIGURATIONS[name],
            "seeds": entry["seeds"],
            "final": finals[name],
            "not_paired": entry["not_paired"],
            "difference": test,
        }
        if test and not entry["not_paired"] and len(finals[name]) > 2:
            result["configurations"][name]["correlation"] = statistics.correlation(finals["recipe"], finals[name])
    equivalent = finals["recipe"] + finals["placebo"]
    if len(equivalent) >= 2 * GROUP:
        result["false_positives"] = {"group": GROUP, **splits(equivalent)}
        # The smallest number of seeds is the default of `lfm compare`.
        result["planted_of_three"] = [
            difference(
                [finals["recipe"][i] for i in seeds],
                [finals["planted"][i] for i in seeds],
                paired=True,
                higher_is_better=False,
            ).p
            for seeds in itertools.combinations(range(len(finals["planted"])), GROUP)
        ]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="in the smallest size")
    options = parser.parse_args()
    out = options.out.absolute()
    sizes = (64, 64) if options.dry_run else (record.NUM_SCENES, record.NUM_HELD_BACK)
    latents = options.latents or record.scenes(out, *sizes)
    overrides = [f"data.shards={latents.absolute()}"]
    if options.dry_run:
        overrides += ["train.num_steps=2", "train.validate_every=1"]
        options.seeds = 1
    configurations = list(CONFIGURATIONS.items())[: 2 if options.dry_run else None]
    files = [record.write_config(out / "configs", name, RECIPE | changes) for name, changes in configurations]
    config = CompareConfig(
        tuple(map(str, files)), str(out / "runs"), seeds=options.seeds, overrides=tuple(overrides), num_gpus=1
    )
    print(compare(config).table)
    result = summary(json.loads((out / "runs" / "compare.json").read_text()))
    folder = out if options.dry_run else HERE
    (folder / "placebo.json").write_text(json.dumps(result, indent=1) + "\n")
    if not options.dry_run:
        shutil.copy(out / "runs" / "compare.png", record.CHECKOUT / "docs" / "placebo.png")
    print(json.dumps({key: value for key, value in result.items() if key != "configurations"}))


if __name__ == "__main__":
    main()
