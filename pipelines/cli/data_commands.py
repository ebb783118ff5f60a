"""The commands that make and look at data."""

from __future__ import annotations

from typing import Any

import click

from pipelines.cli.options import (
    COUNT,
    LOCATION,
    PIXELS,
    POSITIVE,
    SEED,
    SHARE,
    Finite,
    cache_option,
    dry_run_option,
    num_gpus_option,
    overwrite_option,
    show,
)


@click.command()
@click.argument("source", type=LOCATION)
@click.argument("dest", type=LOCATION)
@click.option("--layout", default="auto", show_default=True, help="How the images lie in SOURCE: auto, or a name.")
@click.option("--image-size", type=PIXELS, default=256, show_default=True, help="Pixels, after resize and crop.")
@click.option("--split", help="A folder of SOURCE, such as train.")
@click.option("--samples-per-shard", type=COUNT, default=4096, show_default=True)
@click.option(
    "--format", "image_format", default="webp", show_default=True, help="webp or png (lossless), or jpg (95)."
)
@click.option("--crop", default="centre", show_default=True, help="centre (as ADM does), pad or squash.")
@click.option("--masks", help="free-form: draw MAT's large holes, where SOURCE has no masks.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the dealing to shards, and of drawn masks.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Processes.")
@click.option("--part", default="1/1", show_default=True, help="As 3/16: which shards this machine writes.")
@click.option("--max-rejected", type=SHARE, default=0.01, show_default=True, help="Share that may be unusable.")
@overwrite_option
@dry_run_option
def shard(**options: Any) -> None:
    """Pack the images of SOURCE, with their classes, maps and masks, into raw shards in DEST."""
    from pipelines.data.shard import ShardConfig, run

    config = ShardConfig(**options)
    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    if (manifest := result.manifest) is None:
        return click.echo(f"{result.plan}; done, the last part writes the manifest")
    click.echo(f"{result.plan}: {manifest.num_samples:,} samples, {len(manifest.rejects)} rejected")
    for reject in manifest.rejects[:5]:
        click.echo(f"  rejected {reject.source}: {reject.detail or reject.reason}")
    click.echo(f"next: lfm encode {config.dest} LATENTS")


@click.command()
@click.argument("raw", type=LOCATION)
@click.argument("dest", type=LOCATION)
@click.option("--autoencoder", default="embedded", show_default=True, help="Path or hub id that diffusers loads.")
@click.option("--flips", is_flag=True, help="Encode each image's mirror too.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16.")
@click.option("--threads", type=COUNT, default=4, show_default=True, help="Of each process, to decode images.")
@num_gpus_option
@cache_option
@overwrite_option
@dry_run_option
def encode(num_gpus: int | None, **options: Any) -> None:
    """Turn the raw shards RAW into latent shards DEST, on every GPU there is.

    Under torchrun, deepspeed or Slurm, every rank takes its part; what a dead one leaves, the others take.
    """
    from pipelines.common.processes import on_every_gpu
    from pipelines.data.encode import EncodeConfig, run

    config = EncodeConfig(**options)
    results = on_every_gpu(run, config, 1 if config.dry_run else num_gpus)
    plan = results[0].plan
    if config.dry_run:
        return show(config, plan)
    manifest = next((result.manifest for result in results if result.manifest), None)
    if manifest is None:
        return click.echo("this rank is done; the last one writes the manifest")
    click.echo(f"{plan}: {manifest.num_samples:,} samples")
    click.echo("next: set data.shards in a configuration and run: deepspeed launch/train.py --config configs/NAME.yaml")


@click.command()
@click.argument("path", type=LOCATION)
@click.option("--verify", is_flag=True, help="Check every shard against its checksum.")
@click.option("--out", default="sheet.png", show_default=True, help="Where the sheet of images goes.")
@click.option(
    "--num",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Images on the sheet, or samples of the plan.",
)
@click.option("--autoencoder", help="Where the latents' autoencoder is now, if it has moved.")
@click.option("--raw", help="Compare with the raw shards that the latents are of: PSNR, SSIM, originals on the sheet.")
@click.option("--plan", is_flag=True, help="Say which samples training reads next, and nothing else.")
@click.option("--at", type=click.IntRange(0, 2**62), default=0, help="Where: samples seen, as in a checkpoint's name.")
@click.option("--seed", type=SEED, default=0, help="train.seed of the run that --plan tells of.")
@click.option("--window", type=COUNT, default=8, show_default=True, help="data.window of that run.")
@click.option("--skip-shard", multiple=True, help="One of its data.skip_shards; may be repeated.")
@cache_option
def inspect(**options: Any) -> None:
    """Say what is in the shards of PATH, and make a sheet of their images."""
    from pipelines.common import factory
    from pipelines.data.inspect import InspectConfig, run

    click.echo(run(InspectConfig(**options), factory.world()).report)


@click.command()
@click.argument("raws", nargs=-1, required=True, type=LOCATION)
@click.argument("dest", type=LOCATION)
@click.option("--initialize-from", help="Path, hub id or `embedded` to fine-tune.  [default: new weights]")
@click.option("--num-steps", type=COUNT, default=20_000, show_default=True)
@click.option("--batch-size", type=COUNT, default=16, show_default=True)
@click.option("--learning-rate", type=POSITIVE, default=1e-3, show_default=True)
@click.option("--kl-weight", type=Finite(0), default=1e-3, show_default=True)
@click.option("--latent-channels", type=COUNT, default=4, show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16 (autocast).")
@click.option("--seed", type=SEED, default=0, show_default=True)
@cache_option
@overwrite_option
@dry_run_option
def autoencoder(**options: Any) -> None:
    """Train an AutoencoderKL on the raw shards RAWS and write it to DEST."""
    from pipelines.common import factory
    from pipelines.data.train_autoencoder import AutoencoderConfig, run

    config = AutoencoderConfig(**options)
    result = run(config, factory.world())
    if config.dry_run:
        return show(config, result.plan)
    click.echo(result.plan if result.psnr is None else f"{result.plan}, reconstructs at {result.psnr:.2f} dB")


@click.command()
@click.argument("dest", type=LOCATION)
@click.option("--num", type=COUNT, default=4096, show_default=True, help="Images.")
@click.option("--image-size", type=PIXELS, default=64, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--kind", default="scenes", show_default=True, help="scenes, or leaves (for autoencoders).")
@dry_run_option
def scenes(**options: Any) -> None:
    """Draw the project's own data set into DEST: images in class folders, maps and masks."""
    from pipelines.demo.draw_scenes import ScenesConfig, run

    config = ScenesConfig(**options)
    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    click.echo(result.plan)
