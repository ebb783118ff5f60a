"""The commands that measure images and latents."""

from __future__ import annotations

from dataclasses import fields

import click

from pipelines.cli.stage_command import echo, show, stage_command
from pipelines.evaluation.evaluation_options import BoundConfig, EvaluateConfig, LikelihoodConfig, ReferenceConfig

# The options of `lfm evaluate` that apply with --bound.
BOUND_OPTIONS = ("targets", "bound", "out", "num", "first_seed", "batch_size", "autoencoder", "cache", "dry_run")


@stage_command(ReferenceConfig)
def reference(config: ReferenceConfig) -> None:
    """Measure the real images of SOURCE once and write their statistics to OUT."""
    from pipelines.common.processes import run_on_every_gpu
    from pipelines.evaluation.make_reference import run

    results = run_on_every_gpu(run, config, 1 if config.dry_run else config.num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    if not any(result.reference for result in results):
        return echo("this rank is done; the last one writes the reference")
    echo(results[0].plan)
    echo(f"next: lfm evaluate RUN --reference {config.out} --out DIR")


@stage_command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Compare the images of TARGETS with references: of runs, folders of images, or raw shards."""
    from pipelines.common.processes import run_on_every_gpu
    from pipelines.evaluation.evaluate import run

    if config.bound:
        return _bound(config, config.bound)
    if not config.reference:
        raise click.UsageError("Missing option '--reference'; make one with `lfm reference`")
    results = run_on_every_gpu(run, config, 1 if config.dry_run else config.num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    table = next((result.table for result in results if result.table), None)
    echo(f"{table}\n{config.out}/report.json" if table else "this rank is done; the last one writes the report")


def _bound(config: EvaluateConfig, raw: str) -> None:
    """Run `lfm evaluate RUN --bound RAW`."""
    from pipelines.common import launcher
    from pipelines.evaluation.distance_bound import run

    for field in fields(config):
        if field.name not in BOUND_OPTIONS and getattr(config, field.name):
            raise click.UsageError(f"--{field.name.replace('_', '-')} is not for --bound; leave it out")
    if len(config.targets) != 1:
        raise click.UsageError("--bound takes one run at a time")
    bound = BoundConfig(
        run=config.targets[0],
        raw=raw,
        out=config.out,
        num=1000 if config.num is None else config.num,
        seed=config.first_seed or 0,
        batch_size=config.batch_size,
        autoencoder=config.autoencoder,
        cache=config.cache,
        dry_run=config.dry_run,
    )
    result = run(bound, launcher.world())
    if config.dry_run:
        return show(bound, result.plan)
    echo(f"{result.table}\n{config.out}/bound.json")


@stage_command(LikelihoodConfig)
def likelihood(config: LikelihoodConfig) -> None:
    """Compute the negative log-likelihood of LATENTS under RUN, in bits per dimension."""
    from pipelines.common import launcher
    from pipelines.evaluation.latent_likelihood import run

    result = run(config, launcher.world())
    if result.bits_per_dim is None:
        return show(config, result.plan)
    echo(
        f"{result.plan}: {result.bits_per_dim:.4f} +- {result.standard_error:.4f} bits per dimension, "
        f"{result.nfe:.0f} network evaluations per latent"
    )
