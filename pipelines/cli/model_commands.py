"""The commands that train a model and use it."""

from __future__ import annotations

import os
import sys
from dataclasses import fields

from lfm.errors import ConfigError
from pipelines.cli.stage_command import echo, show, stage_command, with_flags
from pipelines.common.sample_jobs.sample_options import SampleConfig
from pipelines.comparison.comparison_options import CompareConfig
from pipelines.demo.demo_options import DemoConfig
from pipelines.exchange.exchange_options import ExportConfig, ImportConfig, PushConfig
from pipelines.monitoring.status_options import StatusConfig
from pipelines.training.training_options import EmaConfig, LaunchedTrainOptions, TrainOptions
from pipelines.web.web_options import UiConfig


@stage_command(SampleConfig)
def sample(config: SampleConfig) -> None:
    """Generate images with the weights of RUN: one per seed, and a grid.

    Under torchrun, deepspeed or Slurm each rank generates its part.
    """
    from pipelines.common.processes import run_on_every_gpu
    from pipelines.sampling.sample import run

    results = run_on_every_gpu(run, config, 1 if config.dry_run else config.num_gpus)
    if config.dry_run:
        return show(config, results[0].plan)
    for result in results:
        if result.timing:
            echo(result.timing)
    done = next((result for result in results if result.grid), None)
    if done is None:
        return echo("this rank is done; the last one makes the grid. If a rank died, run the same command to resume")
    echo(f"{done.plan}: {done.grid}, {done.mean_nfe:.0f} network evaluations per image")


@stage_command(DemoConfig)
def demo(config: DemoConfig) -> None:
    """Run the whole pipeline on synthetic scenes: shard, encode, train with DeepSpeed, sample."""
    from pipelines.demo.demo import run

    result = run(config)
    if config.dry_run:
        return show(config, result.plan)
    echo(result.report)


@stage_command(EmaConfig)
def ema(config: EmaConfig) -> None:
    """Compute EMA weights of another width from the snapshots of RUN (train.ema_sigma_rel)."""
    from pipelines.training.post_hoc_ema import run

    result = run(config)
    if result.weights is None:
        return show(config, result.plan)
    echo(result.plan)
    _echo_next(result.weights)


@stage_command(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model on latent shards. Run the same command to resume."""
    _check_forecast(options)
    _train(options)


def _check_forecast(options: TrainOptions) -> None:
    if (options.ranks or options.rate) and not options.dry_run:
        raise ConfigError("`ranks`, `rate`: are for `dry_run`; leave them out, or set that")


def _echo_next(weights: str) -> None:
    """Print the command that samples with a run, or with a weights file."""
    from lfm.weights_file import load_header
    from pipelines.common.sample_jobs.sample_command import sample_command

    echo(f"next: {sample_command(weights, load_header(weights))}")


def _train(options: TrainOptions) -> None:
    from pipelines.common import launcher
    from pipelines.common.experiment import config_file, shipped_experiments
    from pipelines.training.initialization import Initialization
    from pipelines.training.train import run

    experiment = config_file.load(shipped_experiments.find(options.config), options.overrides)
    world = launcher.world()
    initialization = None
    if options.initialize_from:
        initialization = Initialization(
            options.initialize_from, options.class_map, options.new_classes, options.other_latents
        )
    elif options.class_map or options.other_latents or options.new_classes != "mean":
        raise ConfigError("`class_map`, `new_classes`, `other_latents`: set `initialize_from`, to which they belong")
    result = run(
        experiment,
        world,
        dry_run=options.dry_run,
        allow_changes=options.allow_changes,
        initialization=initialization,
        repeat_data=options.repeat_data,
        num_ranks=options.ranks,
        rate=options.rate,
    )
    if options.dry_run:
        echo(config_file.as_yaml(experiment))
        echo(result.plan)
    elif world.is_main:
        echo(f"{result.samples_seen:,} samples seen, as train.num_steps asks for: {result.weights}")
        _echo_next(experiment.run)


@stage_command(LaunchedTrainOptions, name="train")
def launched_train(options: LaunchedTrainOptions) -> None:
    """Train a model on latent shards, on all GPUs of this machine. Run the same command to resume.

    \b
    lfm train --config ffhq_256
    lfm train --config mine.yaml --num-gpus 4
    lfm train --config mine.yaml -- --hostfile HOSTS --master_addr NODE
    """
    from pipelines.common import launcher
    from pipelines.common.processes import num_processes

    _check_forecast(options)
    for option in options.deepspeed_options[:1]:
        if not option.startswith("-"):
            raise ConfigError(
                f"{option}: unexpected; name the experiment by `config`, and deepspeed's options after --"
            )
    if options.dry_run or launcher.is_launched():
        if launcher.is_launched() and (options.num_gpus or options.deepspeed_options):
            raise ConfigError(
                "`num_gpus`, DEEPSPEED_OPTIONS: a launcher has started the processes already; leave them out"
            )
        shared = {field.name: getattr(options, field.name) for field in fields(TrainOptions)}
        if options.dry_run and not launcher.is_launched():  # this process plans for those that would be started
            shared["ranks"] = options.ranks or num_processes(options.num_gpus)
        return _train(TrainOptions(**shared))
    num_ranks = None if options.deepspeed_options and not options.num_gpus else num_processes(options.num_gpus)
    command = launcher.training_command(
        options.config,
        options.overrides,
        None if num_ranks == 1 else num_ranks,
        arguments=_arguments(options),
        deepspeed_options=options.deepspeed_options,
    )
    sys.stdout.flush()
    # The launcher takes the place of this process, and with it signals, output and exit code.
    os.execve(command[0], command, launcher.environment(num_ranks or num_processes(None)))


def _arguments(options: LaunchedTrainOptions) -> list[str]:
    """Return the launch file's arguments beside its configuration and overrides."""
    texts = {"--initialize-from": options.initialize_from, "--class-map": options.class_map}
    texts |= {"--new-classes": options.new_classes, "--repeat-data": options.repeat_data}
    arguments = [part for flag, text in texts.items() if text is not None for part in (flag, text)]
    switches = {"--allow-changes": options.allow_changes, "--other-latents": options.other_latents}
    return arguments + [flag for flag, is_set in switches.items() if is_set]


@stage_command(UiConfig)
def ui(config: UiConfig) -> None:
    """Open a web page that makes images with the weights of RUNS: on this machine alone, without any telemetry."""
    from pipelines.web.serve import run

    run(config, announce=echo)


@stage_command(StatusConfig)
def status(config: StatusConfig) -> None:
    """Print progress, rate, loss, measurements and checkpoints of RUN, which may train at the moment."""
    from pipelines.monitoring.run_status import run

    result = run(config)
    echo(result.as_json() if config.as_json else str(result))


@stage_command(CompareConfig)
def compare(config: CompareConfig) -> None:
    """Train CONFIGS on the same samples, noise and times, several seeds each, and report how they differ."""
    from pipelines.comparison.compare import run

    result = run(config)
    if result.table is None:
        return show(config, result.plan)
    echo(f"{result.table}\n{config.out}/compare.png")


@stage_command(ImportConfig, name="import")
def import_(config: ImportConfig) -> None:
    """Convert a third-party checkpoint PATH to lfm weights in DEST."""
    from pipelines.exchange.import_export import import_checkpoint

    result = with_flags(import_checkpoint(config), ImportConfig)
    if config.dry_run:
        return show(config, result)
    echo(result)
    _echo_next(config.dest)


@stage_command(ExportConfig)
def export(config: ExportConfig) -> None:
    """Write the EMA weights of RUN to DEST, in a format that other tools read."""
    from pipelines.exchange.import_export import export_weights

    result = export_weights(config)
    if config.dry_run:
        return show(config, result)
    echo(result)


@stage_command(PushConfig)
def push(config: PushConfig) -> None:
    """Publish the EMA weights of RUN with a model card in REPOSITORY, USER/NAME on the Hugging Face Hub.

    \b
    hf auth login
    lfm push runs/mine me/mine --licence cc-by-4.0
    lfm sample hf://me/mine --out samples
    """
    from pipelines.exchange.push import run

    result = with_flags(run(config), PushConfig)
    if config.dry_run:
        return show(config, result)
    echo(result)
