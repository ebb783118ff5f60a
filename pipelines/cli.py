"""The command line. Each command imports its stage when it runs, so that `lfm --help` needs no torch."""

from __future__ import annotations

import click

from pipelines import cli_data, cli_metrics, cli_model
from pipelines.cli_options import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lfm")
def main() -> None:
    """Flow matching in latent space: pictures -> shards -> latents -> a model -> pictures.

    \b
    lfm shard PICTURES RAW --image-size 256
    lfm encode RAW LATENTS --autoencoder PATH_OR_HUB_ID
    deepspeed launch/train.py --config configs/NAME.yaml
    lfm sample RUN --out DIR
    lfm reference RAW REFERENCE.safetensors; lfm evaluate RUN --reference REFERENCE.safetensors --out DIR

    The same command resumes. `lfm demo` does all of it on drawn pictures.
    """


for command in (
    *(cli_data.shard, cli_data.encode, cli_data.inspect, cli_data.autoencoder, cli_data.scenes),
    *(cli_metrics.reference, cli_metrics.evaluate, cli_metrics.likelihood),
    *(cli_model.sample, cli_model.import_, cli_model.export, cli_model.ema, cli_model.demo, cli_model.train_hint),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
