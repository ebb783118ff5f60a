"""The commands that train a model and use it."""

from __future__ import annotations

from typing import Any

import click

from pipelines.cli_options import COUNT, POSITIVE, Finite, OneLine, dry_run_option, overwrite_option, show


@click.command()
@click.argument("run")
@click.option("--out", required=True, help="Folder for the pictures.")
@click.option("--seeds", default="0-15", show_default=True, help="One picture for each.")
@click.option("--class-index", help="Such as 3, or 0-9: the seeds take turns.  [default: all classes]")
@click.option("--guidance-scale", type=Finite(-1000, 1000), default=1.0, show_default=True, help="1 means none.")
@click.option("--solver", default="heun", show_default=True, help="euler, midpoint, heun, rk4, dopri5, bosh3, ...")
@click.option("--num-steps", type=COUNT, help="Of a fixed-step solver.  [default: 25]")
@click.option("--atol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--rtol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--autoencoder", help="Where the run's autoencoder is now, if it has moved.")
@overwrite_option
@dry_run_option
def sample(**options: Any) -> None:
    """Make pictures with the weights of RUN: one per seed, and a grid."""
    from pipelines import factory
    from pipelines.sample import SampleConfig, run

    config = SampleConfig(**options)
    result = run(config, factory.world())
    if result.grid is None:
        return show(config, result.plan)
    click.echo(f"{result.plan}: {result.grid}, {result.mean_nfe:.0f} network evaluations per picture")


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for all that it makes.")
@dry_run_option
def demo(**options: Any) -> None:
    """Do the whole job on drawn scenes: shard, encode, train with DeepSpeed, sample."""
    from pipelines.demo import DemoConfig, run

    config = DemoConfig(**options)
    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    click.echo(result.report)


@click.command("train", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("rest", nargs=-1)
def train_hint(rest: tuple[str, ...]) -> None:
    raise click.UsageError("training is begun by a launcher: deepspeed launch/train.py --config configs/NAME.yaml")


@click.command(cls=OneLine)
@click.option("--config", required=True, help="YAML of the experiment.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Put over a key of the YAML.")
@click.option("--allow-changes", is_flag=True, help="Go on from a checkpoint of another configuration.")
@click.option("--local_rank", type=int, hidden=True, help="From the deepspeed launcher; the environment has it.")
@dry_run_option
def train(config: str, overrides: tuple[str, ...], allow_changes: bool, dry_run: bool, local_rank: int | None) -> None:
    """Train a DiT on latent shards. The same command resumes."""
    from pipelines import config as configs
    from pipelines import factory
    from pipelines.train import run

    experiment = configs.load(config, overrides)
    world = factory.world()
    result = run(experiment, world, dry_run=dry_run, allow_changes=allow_changes)
    if dry_run:
        click.echo(configs.as_yaml(experiment))
        click.echo(result.plan)
    elif world.is_main:
        click.echo(f"{result.samples_seen:,} samples seen: {result.weights}")
        click.echo(f"next: lfm sample {experiment.run} --out DIR")
