"""The commands that train a model and use it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.cli.options import (
    COUNT,
    LOCATION,
    POSITIVE,
    Finite,
    OneLine,
    cache_option,
    dry_run_option,
    overwrite_option,
    show,
)


@click.command()
@click.argument("run", type=LOCATION)
@click.option("--out", required=True, help="Folder for the images.")
@click.option(
    "--seeds",
    help="One image for each; they take turns of what follows.  [default: as many as --rows names, else 0-15]",
)
@click.option("--class-index", help="Such as 3, or 0-9.  [default: all classes]")
@click.option("--image", multiple=True, help="An image to fill in; as often as there are masks.")
@click.option("--mask", multiple=True, help="White is what to fill.")
@click.option("--segmentation", multiple=True, help="A map of class ids to make an image for.")
@click.option("--crop", help="Bring these to the model's size, as lfm shard does: centre, pad or squash.")
@click.option("--shards", help="Raw or latent shards to take masks, maps and classes from.")
@click.option("--rows", help="Which samples of the shards, such as 0-3.  [default: as many as seeds]")
@click.option("--composite/--no-composite", default=True, help="Put the known pixels back.  [default: composite]")
@click.option("--guidance-scale", default="1", show_default=True, help="1 means none; 1,1.5,2 makes a sheet.")
@click.option("--guidance-interval", help="Times between which to guide, such as 0.2,0.8.  [default: 0,1]")
@click.option("--autoguidance", metavar="RUN", help="A weaker model to lead away from, in place of no condition.")
@click.option(
    "--solver", default="heun", show_default=True, help="euler, midpoint, heun, rk4, ab2, sde, dopri5, bosh3, ..."
)
@click.option("--num-steps", type=COUNT, help="Of a fixed-step solver.  [default: 25]")
@click.option("--time-shift", type=POSITIVE, help="Above 1, more of the steps near noise.  [default: 1]")
@click.option("--times", help="In place of both, such as 1,0.8,0.5,0.")
@click.option("--atol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--rtol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--trajectory", metavar="png|gif", help="Show the way of the first images from noise, too.")
@click.option("--time", is_flag=True, help="Measure solver and decoder, too.")
@click.option("--num-gpus", type=COUNT, help="Processes, one for each GPU.  [default: all there are]")
@click.option("--autoencoder", help="Where the run's autoencoder is now, if it has moved.")
@cache_option
@overwrite_option
@dry_run_option
def sample(num_gpus: int | None, **options: Any) -> None:
    """Make images with the weights of RUN: one per seed, and a grid. Under torchrun every rank takes its part."""
    from pipelines.common.processes import on_every_gpu
    from pipelines.sampling.sample import run
    from pipelines.sampling.sample_job import SampleConfig

    config = SampleConfig(**options)
    results = on_every_gpu(run, config, 1 if config.dry_run else num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    for result in results:
        if result.timing:
            click.echo(result.timing)
    done = next((result for result in results if result.grid), None)
    if done is None:
        return click.echo("this rank is done; the last one makes the grid. If one died, the same command goes on")
    click.echo(f"{done.plan}: {done.grid}, {done.mean_nfe:.0f} network evaluations per image")


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for all that it makes.")
@dry_run_option
def demo(**options: Any) -> None:
    """Do the whole job on drawn scenes: shard, encode, train with DeepSpeed, sample."""
    from pipelines.demo.demo import DemoConfig, run

    config = DemoConfig(**options)
    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    click.echo(result.report)


@click.command()
@click.argument("run", type=LOCATION)
@click.option("--sigma-rel", type=Finite(0.01, 0.25), required=True, help="Its width, as a share of the training.")
@click.option("--samples-seen", type=COUNT, help="Where the average ends.  [default: the newest snapshot]")
@click.option("--out", help="Weights file.  [default: RUN/ema-SIGMA_REL.safetensors]")
@dry_run_option
def ema(**options: Any) -> None:
    """Make an average of another width from the snapshots of RUN (train.ema_sigma_rel)."""
    from pipelines.training.post_hoc_ema import EmaConfig, run

    config = EmaConfig(**options)
    result = run(config)
    if result.weights is None:
        return show(config, result.plan)
    click.echo(result.plan)
    click.echo(f"next: lfm sample {result.weights} --out DIR")


@click.command("train", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("rest", nargs=-1)
def train_hint(rest: tuple[str, ...]) -> None:
    raise click.UsageError("training is begun by a launcher: deepspeed launch/train.py --config configs/NAME.yaml")


@click.command(cls=OneLine)
@click.option("--config", required=True, help="YAML of the experiment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Put over a key of the YAML.")
@click.option("--allow-changes", is_flag=True, help="Go on from a checkpoint of another configuration.")
@click.option("--initialize-from", metavar="RUN", help="Begin with the EMA weights of a run or weights file.")
@click.option("--local_rank", type=int, hidden=True, help="From the deepspeed launcher; the environment has it.")
@dry_run_option
def train(config: str, overrides: tuple[str, ...], dry_run: bool, local_rank: int | None, **options: Any) -> None:
    """Train a DiT on latent shards. The same command resumes."""
    from pipelines.common import config_schema as configs
    from pipelines.common import factory
    from pipelines.training.train import run

    experiment = configs.load(config, overrides)
    world = factory.world()
    result = run(experiment, world, dry_run=dry_run, **options)
    if dry_run:
        click.echo(configs.as_yaml(experiment))
        click.echo(result.plan)
    elif world.is_main:
        click.echo(f"{result.samples_seen:,} samples seen, as train.num_steps asks for: {result.weights}")
        told = f" --shards {experiment.data.shards}" if experiment.conditions - {"class"} else ""
        click.echo(f"next: lfm sample {experiment.run} --out DIR{told}")


@click.command("import")
@click.argument("path", type=LOCATION)
@click.argument("dest", type=LOCATION)
@click.option("--from", "source", required=True, help="lfm (the paper's, or ours), dit or sit.")
@click.option("--autoencoder", default="embedded", show_default=True, help="Of its latents: a path or hub id.")
@click.option("--num-heads", type=COUNT, help="Where width and depth are none of the published ones.")
@click.option("--num-classes", type=click.IntRange(0), help="0 makes it unconditional.  [default: by the class table]")
@dry_run_option
def import_(**options: Any) -> None:
    """Make of the checkpoint PATH of others weights in DEST that sample here."""
    from pipelines.exchange.import_export import ImportConfig, bring_in

    config = ImportConfig(**options)
    result = bring_in(config)
    if config.dry_run:
        return show(config, result)
    click.echo(result)
    click.echo(f"next: lfm sample {config.dest} --out DIR")


@click.command()
@click.argument("run", type=LOCATION)
@click.argument("dest", type=LOCATION)
@click.option(
    "--to", required=True, help="safetensors (one file) or diffusers (a folder that DiffusionPipeline loads)."
)
@click.option("--autoencoder", help="Where the run's autoencoder is now, if it has moved.")
@dry_run_option
def export(**options: Any) -> None:
    """Write the EMA weights of RUN for others to DEST."""
    from pipelines.exchange.import_export import ExportConfig, send_out

    config = ExportConfig(**options)
    result = send_out(config)
    if config.dry_run:
        return show(config, result)
    click.echo(result)
