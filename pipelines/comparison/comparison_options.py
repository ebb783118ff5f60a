"""Options of `lfm compare`."""

from __future__ import annotations

from typing import Annotated

from pipelines.common.options import EXECUTION, Argument, Count, DryRun, Flag, Location, stage_options


@stage_options
class CompareConfig:
    """Options of `lfm compare`."""

    configs: Annotated[tuple[str, ...], Argument()]
    """YAML files of experiments, or names that `lfm config list` prints; the others are compared with the first."""
    out: Annotated[Location, Flag(metavar="DIR")]
    """Folder for the runs, DIR/NAME/seed-K, and the report."""
    seeds: Count = 3
    """Number of trainings of each configuration, with the seeds train.seed, train.seed + 1, ..."""
    overrides: Annotated[tuple[str, ...], Flag("--set", metavar="KEY=VALUE")] = ()
    """Replace a value in all configurations, as in train.num_steps=10; may be repeated."""
    jobs: Annotated[Count, EXECUTION] = 1
    """Number of trainings at a time; they share the cores. On GPUs leave it at 1."""
    num_gpus: Count | None = None
    """Number of ranks of each training, one per GPU; also possible without GPUs.  [default: all GPUs]"""
    dry_run: DryRun = False
