"""`lfm config`: the experiments that come with lfm, new ones, and the schema of their files."""

from __future__ import annotations

import json

import click

from pipelines.cli.config_options import ListConfig, NewConfig, SchemaConfig, ShowConfig
from pipelines.cli.stage_command import StageGroup, echo, stage_command


@click.group(cls=StageGroup)
def config() -> None:
    """Show, write and describe the YAML files of experiments."""


@stage_command(ListConfig, name="list")
def list_(options: ListConfig) -> None:
    """Print the experiments that come with lfm, which `lfm train --config NAME` trains."""
    from pipelines.common.experiment import config_file, shipped_experiments

    for name in shipped_experiments.names():
        experiment = config_file.load(shipped_experiments.find(name))
        echo(
            f"{name:40} {experiment.model.backbone:5} {experiment.condition:14} {experiment.train.num_steps:>9,} steps"
        )


@stage_command(ShowConfig)
def show(options: ShowConfig) -> None:
    """Print an experiment with all its keys, after what it extends and --set."""
    from pipelines.common.experiment import config_file, shipped_experiments

    echo(config_file.as_yaml(config_file.load(shipped_experiments.find(options.name), options.overrides)))


@stage_command(NewConfig)
def new(options: NewConfig) -> None:
    """Print a new experiment in YAML with an explanation of every key, to be kept in a file.

    \b
    lfm config new --task class --image-size 256 > mine.yaml
    """
    from pipelines.common.experiment import config_file, shipped_experiments
    from pipelines.common.experiment.config_template import commented_yaml

    overrides = [f"condition={options.task}", "run=runs/mine", "data.shards=data/mine/latents"]
    if options.task != "none":
        overrides.append("condition_dropout=0.1")
    experiment = config_file.load(shipped_experiments.find(options.size), overrides)
    autoencoder = "" if options.image_size <= 64 else " --autoencoder stabilityai/sd-vae-ft-mse"
    echo(
        "# lfm train --config THIS_FILE\n"
        f"# Latents: lfm shard IMAGES data/mine/raw --image-size {options.image_size}\n"
        f"#          lfm encode data/mine/raw data/mine/latents{autoencoder} --flips\n"
        "# A key in a comment has the default that it shows; units and meaning are above each key.\n"
    )
    echo(commented_yaml(experiment).rstrip())


@stage_command(SchemaConfig)
def schema(options: SchemaConfig) -> None:
    """Print the JSON schema of experiments, by which editors complete and check their files."""
    from pipelines.common.experiment.json_schema import json_schema

    echo(json.dumps(json_schema(), indent=1))


for command in (list_, show, new, schema):
    config.add_command(command)
