"""The commands that measure images."""

from __future__ import annotations

from typing import Any

import click

from pipelines.cli.options import (
    COUNT,
    LOCATION,
    PIXELS,
    POSITIVE,
    SEED,
    Finite,
    cache_option,
    dry_run_option,
    num_gpus_option,
    overwrite_option,
    show,
)


@click.command()
@click.argument("source", type=LOCATION)
@click.argument("out", type=LOCATION)
@click.option("--image-size", type=PIXELS, help="Resize and crop the images of a folder; of an .npz, what they had.")
@click.option("--crop", help="centre, pad or squash, with --image-size.  [default: centre]")
@click.option("--network", default="fd-lite", show_default=True, help="fd-lite, inception:WEIGHTS.pth or MODULE.pt2.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@num_gpus_option
@cache_option
@overwrite_option
@dry_run_option
def reference(num_gpus: int | None, **options: Any) -> None:
    """Measure the real images of SOURCE (raw shards, a folder, or statistics in an .npz) once, into OUT.safetensors."""
    from pipelines.common.processes import on_every_gpu
    from pipelines.evaluation.make_reference import ReferenceConfig, run

    config = ReferenceConfig(**options)
    results = on_every_gpu(run, config, 1 if config.dry_run else num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    if not any(result.reference for result in results):
        return click.echo("this rank is done; the last one writes the reference")
    click.echo(results[0].plan)
    click.echo(f"next: lfm evaluate RUN --reference {config.out} --out DIR")


@click.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--reference", multiple=True, help="Of `lfm reference`; several for several networks.")
@click.option("--out", required=True, help="Folder for the report and the features.")
@click.option("--bound", metavar="RAW", help="In place of metrics: the paper's bound, on held-back images.")
@click.option("--metrics", help="As fd,kid,recall.  [default: all that can be had]")
@click.option("--pairs", help="Real images that the TARGETS' stand for, for psnr, p-ids, ...")
@click.option("--network", multiple=True, help="Where a reference's network is now, if it has moved.")
@click.option("--lpips", help="A module of torch.export: two images -> their distance.")
@click.option("--segmenter", help="A module of torch.export: an image -> scores of labels.")
@click.option("--num", type=COUNT, help="Images of each run.  [default: 50,000]")
@click.option("--first-seed", type=SEED, help="The seeds count on from it.  [default: 0]")
@click.option("--guidance-scale", type=Finite(-1000, 1000), multiple=True, help="Several for a curve.  [default: 1]")
@click.option("--solver", help="euler, midpoint, heun, rk4, dopri5, bosh3, ...  [default: heun]")
@click.option("--num-steps", type=COUNT, help="Of a fixed-step solver.  [default: 25]")
@click.option("--atol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--rtol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--autoencoder", help="Where the runs' autoencoder is now, if it has moved.")
@num_gpus_option
@cache_option
@overwrite_option
@dry_run_option
def evaluate(num_gpus: int | None, bound: str | None, **options: Any) -> None:
    """Measure TARGETS against references: runs or checkpoints, or folders of images or raw shards."""
    from pipelines.common.processes import on_every_gpu
    from pipelines.evaluation.evaluate import EvaluateConfig, run

    if bound:
        return _bound(bound, options)
    if not options["reference"]:
        raise click.UsageError("Missing option '--reference'; make one with `lfm reference`")
    config = EvaluateConfig(**options)
    results = on_every_gpu(run, config, 1 if config.dry_run else num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    table = next((result.table for result in results if result.table), None)
    click.echo(f"{table}\n{config.out}/report.json" if table else "this rank is done; the last one writes the report")


def _bound(raw: str, options: dict[str, Any]) -> None:
    """Do what `lfm evaluate RUN --bound RAW` asks for."""
    from pipelines.common import factory
    from pipelines.evaluation.distance_bound import BoundConfig, run

    used = {"num", "first_seed", "out", "batch_size", "autoencoder", "cache", "dry_run"}
    given = {name: value for name, value in options.items() if name in used and value is not None}
    for name in sorted(options.keys() - used - {"targets"}):
        if options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is not for --bound; leave it out")
    if len(options["targets"]) != 1:
        raise click.UsageError("--bound takes one run at a time")
    config = BoundConfig(run=options["targets"][0], raw=raw, seed=given.pop("first_seed", 0), **given)
    result = run(config, factory.world())
    if config.dry_run:
        return show(config, result.plan)
    click.echo(f"{result.table}\n{config.out}/bound.json")


@click.command()
@click.argument("run", type=LOCATION)
@click.argument("latents", type=LOCATION)
@click.option("--out", default="likelihood.json", show_default=True, help="Where the numbers go.")
@click.option("--rows", help="Which of the latents, such as 0-63.  [default: the first 64]")
@click.option("--estimator", default="hutchinson", show_default=True, help="Or exact: a backward pass per dimension.")
@click.option("--solver", default="dopri5", show_default=True)
@click.option("--num-steps", type=COUNT, help="Of a fixed-step solver.  [default: 25]")
@click.option("--atol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--rtol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--autoencoder", help="Where the run's autoencoder is now, if it has moved.")
@cache_option
@dry_run_option
def likelihood(**options: Any) -> None:
    """Measure how likely the model of RUN holds LATENTS, in bits per dimension."""
    from pipelines.common import factory
    from pipelines.evaluation.latent_likelihood import LikelihoodConfig, run

    config = LikelihoodConfig(**options)
    result = run(config, factory.world())
    if result.bits_per_dim is None:
        return show(config, result.plan)
    click.echo(f"{result.plan}: {result.bits_per_dim:.4f} +- {result.standard_error:.4f} bits per dimension, {result.nfe:.0f} "
               "network evaluations per latent")  # fmt: skip
