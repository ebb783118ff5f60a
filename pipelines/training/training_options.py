"""Options of the training commands; an experiment's own settings are in its YAML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.common.options import Argument, Count, DryRun, Flag, Location, NumGpus, Positive, Section, stage_options


@stage_options
class TrainOptions:
    """Options of `launch/train.py`."""

    config: Annotated[str, Flag(metavar="NAME_OR_FILE")]
    """YAML file of the experiment, or the name of one that comes with lfm (`lfm config list`)."""
    overrides: Annotated[tuple[str, ...], Flag("--set", metavar="KEY=VALUE")] = ()
    """Replace a value of the YAML file, as in train.num_steps=10; may be repeated."""
    allow_changes: bool = False
    """Resume from a checkpoint of a different configuration."""
    initialize_from: Annotated[str | None, Flag(metavar="SOURCE")] = None
    """Start from the EMA weights of a run, checkpoint or weights file, adapted where the network differs from it."""
    class_map: Annotated[str | None, Flag(metavar="FILE")] = None
    """JSON, YAML or CSV: classes at whose rows own classes begin, by name or index; by default those of the same names."""
    new_classes: Literal["mean", "null"] = "mean"
    """Row at which classes begin that the source does not have: the mean of all rows, or the null row."""
    other_latents: bool = False
    """Start from weights that were trained on latents of another autoencoder."""
    repeat_data: Annotated[str | None, Flag(metavar="RUN")] = None
    """Read the versions of the data that a run, checkpoint or weights file was trained on, each from the same sample on."""
    ranks: Annotated[Count | None, Section("Forecast of --dry-run")] = None
    """Number of ranks (GPUs) to plan for.  [default: those that would train]"""
    rate: Positive | None = None
    """Samples per second of all ranks, for the hours.  [default: measured here, or by the run that is resumed]"""
    local_rank: Annotated[int | None, Flag("--local_rank", hidden=True)] = None
    """Passed by the deepspeed launcher and not used; the environment holds it too."""
    dry_run: DryRun = False


@stage_options
class LaunchedTrainOptions(TrainOptions):
    """Options of `lfm train`: those of the launch file, and of the launcher that starts it."""

    num_gpus: NumGpus = None
    deepspeed_options: Annotated[tuple[str, ...], Argument()] = ()
    """Options of the deepspeed launcher, after --, such as -- --hostfile HOSTS."""


@stage_options
class EmaConfig:
    """Options of `lfm ema`."""

    run: Annotated[Location, Argument()]
    """Run folder with snapshots of train.ema_sigma_rel."""
    sigma_rel: Annotated[float, Field(ge=0.01, le=0.25)]
    """Relative width of the average, as a share of the training time."""
    samples_seen: Count | None = None
    """Samples seen at which the average ends.  [default: the newest snapshot]"""
    out: str | None = None
    """Weights file to write.  [default: RUN/ema-SIGMA_REL.safetensors]"""
    dry_run: DryRun = False
