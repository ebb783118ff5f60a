"""The commands that make and inspect data."""

from __future__ import annotations

import click

from lfm.errors import printable
from pipelines.cli.stage_command import StageGroup, command_line, echo, show, stage_command, with_flags
from pipelines.data.data_options import AutoencoderConfig, DropConfig, EncodeConfig, InspectConfig, ShardConfig
from pipelines.demo.demo_options import ScenesConfig


@stage_command(ShardConfig)
def shard(config: ShardConfig) -> None:
    """Pack the images of SOURCE, with their classes, segmentations and masks, into raw shards in DEST."""
    from pipelines.data.shard import run

    result = run(config, announce=lambda text: echo(with_flags(text, ShardConfig)))
    if config.dry_run:
        return show(config, with_flags(result.description, ShardConfig))
    if (manifest := result.manifest) is None:
        return echo(f"{result.plan}; done, the last part writes the manifest")
    echo(f"{result.plan}: {manifest.num_samples:,} samples, {len(manifest.rejects)} rejected")
    for reject in manifest.rejects[:5]:
        echo(printable(f"  rejected {reject.source}: {reject.detail or reject.reason}"))
    echo(f"next: lfm encode {config.dest} LATENTS")


@stage_command(EncodeConfig)
def encode(config: EncodeConfig) -> None:
    """Encode the raw shards RAW into latent shards in DEST, on all GPUs.

    Under torchrun, deepspeed or Slurm each rank encodes its part, and then the shards of ranks that died.
    """
    from pipelines.common.processes import run_on_every_gpu
    from pipelines.data.encode import run

    results = run_on_every_gpu(run, config, 1 if config.dry_run else config.num_gpus)
    plan = results[0].plan
    if config.dry_run:
        return show(config, plan)
    manifest = next((result.manifest for result in results if result.manifest), None)
    if manifest is None:
        return echo("this rank is done; the last one writes the manifest")
    echo(f"{plan}: {manifest.num_samples:,} samples")
    echo("next: set data.shards in a configuration and run: lfm train --config FILE")


@stage_command(InspectConfig)
def inspect(config: InspectConfig) -> None:
    """Describe the shards in PATH, and save a sheet of their first images.

    Of several folders of latents, or of an experiment, print shares, classes, columns, and the samples that two sources share.
    Of an image of `lfm sample`, print how it was made.
    """
    from lfm.data.sources.names import is_image

    if is_image(config.path):
        from pipelines.common.sample_jobs.image_note import read_options

        lines, options = read_options(config.path)
        return echo("\n".join([*lines, f"  again    {command_line('lfm sample', options)}"]))
    from pipelines.common import launcher
    from pipelines.data.inspect_shards import run

    echo(run(config, launcher.world()).report)


@click.group(cls=StageGroup)
def data() -> None:
    """Change data sets of shards."""


@stage_command(DropConfig)
def drop(config: DropConfig) -> None:
    """Withdraw samples from SHARDS: trainings that begin or resume leave them out. No shard is written again.

    \b
    lfm data drop LATENTS 000012000345 --reason "licence withdrawn"
    lfm data drop LATENTS --where "like(source, 'agency/%')"
    """
    from pipelines.data.growth.drop_samples import run

    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    echo(result.plan)


data.add_command(drop)


@stage_command(AutoencoderConfig)
def autoencoder(config: AutoencoderConfig) -> None:
    """Train an AutoencoderKL on the raw shards RAWS and write it to DEST."""
    from pipelines.common import launcher
    from pipelines.data.train_autoencoder import run

    result = run(config, launcher.world())
    if config.dry_run:
        return show(config, result.plan)
    echo(result.plan if result.psnr is None else f"{result.plan}, reconstructs at {result.psnr:.2f} dB")


@stage_command(ScenesConfig)
def scenes(config: ScenesConfig) -> None:
    """Generate a synthetic data set in DEST: images in class folders, segmentations and masks."""
    from pipelines.demo.draw_scenes import run

    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    echo(result.plan)
