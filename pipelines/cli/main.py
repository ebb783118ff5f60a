"""The command line. Each command imports its stage when it runs, so that `lfm --help` needs no torch."""

from __future__ import annotations

import click

from pipelines.cli import config_commands, data_commands, evaluation_commands, installation_commands, model_commands
from pipelines.cli.stage_command import StageGroup
from pipelines.cli.verbosity import verbosity_options

COMMANDS = (
    data_commands.shard,
    data_commands.encode,
    data_commands.inspect,
    data_commands.data,
    data_commands.autoencoder,
    data_commands.scenes,
    evaluation_commands.reference,
    evaluation_commands.evaluate,
    evaluation_commands.likelihood,
    config_commands.config,
    model_commands.launched_train,
    model_commands.status,
    model_commands.compare,
    model_commands.sample,
    model_commands.ui,
    model_commands.import_,
    model_commands.export,
    model_commands.push,
    model_commands.ema,
    model_commands.demo,
    installation_commands.doctor,
)


@click.group(cls=StageGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lfm")
def main() -> None:
    """Flow matching in latent space: images -> shards -> latents -> a model -> images.

    \b
    lfm shard IMAGES RAW --image-size 256
    lfm encode RAW LATENTS --autoencoder PATH_OR_HUB_ID
    lfm train --config NAME_OR_FILE
    lfm sample RUN --out DIR
    lfm reference RAW REFERENCE.safetensors; lfm evaluate RUN --reference REFERENCE.safetensors --out DIR

    Run the same command to resume it. `lfm demo` runs all stages on synthetic images.
    """


main.params += verbosity_options()
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
