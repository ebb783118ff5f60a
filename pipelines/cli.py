"""The command line. Each command imports its stage when it runs, so that `lfm --help` needs no torch."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from lfm.errors import LfmError


class _OneLine(click.Command):
    """Ends with one line and exit code 2 where the user can repair something."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command and exit: 2 where the user can repair something, 130 where they interrupted."""
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except click.Abort:
            click.echo("interrupted; the same command goes on", err=True)
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
        except click.ClickException as error:
            _fail(error.format_message())
        except (LfmError, OSError) as error:
            if os.environ.get("LFM_TRACEBACK"):
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                _fail(f"{error.filename or 'the disk'}: no space left; make room and run the same command")
            _fail(str(error))


class _Commands(_OneLine, click.Group):
    command_class = click.Command


class _Finite(click.FloatRange):
    """A number in a range, and neither nan nor inf."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite", param, ctx)
        return number


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


COUNT = click.IntRange(1, 10**9)
SEED = click.IntRange(0, 2**63 - 1)
PIXELS = click.IntRange(1, 16_384)
SHARE = _Finite(0, 1)
POSITIVE = _Finite(0, min_open=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lfm")
def main() -> None:
    """Flow matching in latent space: pictures -> shards -> latents -> a model -> pictures.

    \b
    lfm shard PICTURES RAW --image-size 256
    lfm encode RAW LATENTS --autoencoder PATH_OR_HUB_ID
    deepspeed launch/train.py --config configs/NAME.yaml
    lfm sample RUN --out DIR

    The same command resumes. `lfm demo` does all of it on drawn pictures.
    """


_dry_run = click.option("--dry-run", is_flag=True, help="Print the configuration and the plan, and do nothing.")
_overwrite = click.option("--overwrite", is_flag=True, help="Begin anew, and remove what the command made before.")
_cache = click.option("--cache", help="Folder for copies of remote shards.  [default: ~/.cache/lfm]")


def _show(config: Any, plan: str) -> None:
    for field in dataclasses.fields(config):
        click.echo(f"{field.name}: {getattr(config, field.name)}")
    click.echo(plan)


@main.command()
@click.argument("source")
@click.argument("dest")
@click.option("--layout", default="auto", show_default=True, help="How the pictures lie in SOURCE: auto, or a name.")
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
@_overwrite
@_dry_run
def shard(**options: Any) -> None:
    """Pack the pictures of SOURCE, with their classes, maps and masks, into raw shards in DEST."""
    from pipelines.shard import ShardConfig, run

    config = ShardConfig(**options)
    result = run(config)
    if config.dry_run:
        return _show(config, result.plan)
    if (manifest := result.manifest) is None:
        return click.echo(f"{result.plan}; done, the last part writes the manifest")
    click.echo(f"{result.plan}: {manifest.num_samples:,} samples, {len(manifest.rejects)} rejected")
    for reject in manifest.rejects[:5]:
        click.echo(f"  rejected {reject.source}: {reject.detail or reject.reason}")
    click.echo(f"next: lfm encode {config.dest} LATENTS")


@main.command()
@click.argument("raw")
@click.argument("dest")
@click.option("--autoencoder", default="embedded", show_default=True, help="Path or hub id that diffusers loads.")
@click.option("--flips", is_flag=True, help="Encode each picture's mirror too.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16.")
@_cache
@_overwrite
@_dry_run
def encode(**options: Any) -> None:
    """Turn the raw shards RAW into latent shards DEST. Under torchrun, every rank takes its part."""
    from pipelines import factory
    from pipelines.encode import EncodeConfig, run

    config = EncodeConfig(**options)
    result = run(config, factory.world())
    if config.dry_run:
        return _show(config, result.plan)
    if result.manifest is None:
        return click.echo("this rank is done; the last one writes the manifest")
    click.echo(f"{result.plan}: {result.manifest.num_samples:,} samples")
    click.echo("next: set data.shards in a configuration and run: deepspeed launch/train.py --config configs/NAME.yaml")


@main.command()
@click.argument("run")
@click.option("--out", required=True, help="Folder for the pictures.")
@click.option("--seeds", default="0-15", show_default=True, help="One picture for each.")
@click.option("--class-index", help="Such as 3, or 0-9: the seeds take turns.  [default: all classes]")
@click.option("--guidance-scale", type=_Finite(-1000, 1000), default=1.0, show_default=True, help="1 means none.")
@click.option("--solver", default="heun", show_default=True, help="euler, midpoint, heun, rk4, dopri5, bosh3, ...")
@click.option("--num-steps", type=COUNT, help="Of a fixed-step solver.  [default: 25]")
@click.option("--atol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--rtol", type=POSITIVE, help="Of an adaptive solver.  [default: 1e-5]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option("--autoencoder", help="Where the run's autoencoder is now, if it has moved.")
@_overwrite
@_dry_run
def sample(**options: Any) -> None:
    """Make pictures with the weights of RUN: one per seed, and a grid."""
    from pipelines import factory
    from pipelines.sample import SampleConfig, run

    config = SampleConfig(**options)
    result = run(config, factory.world())
    if result.grid is None:
        return _show(config, result.plan)
    click.echo(f"{result.plan}: {result.grid}, {result.mean_nfe:.0f} network evaluations per picture")


@main.command()
@click.argument("path")
@click.option("--verify", is_flag=True, help="Check every shard against its checksum.")
@click.option("--out", default="sheet.png", show_default=True, help="Where the sheet of pictures goes.")
@click.option("--num", type=click.IntRange(1, 4096), default=64, show_default=True, help="Pictures on the sheet.")
@click.option("--autoencoder", help="Where the latents' autoencoder is now, if it has moved.")
@_cache
def inspect(**options: Any) -> None:
    """Say what is in the shards of PATH, and make a sheet of their pictures."""
    from pipelines import factory
    from pipelines.inspect import InspectConfig, run

    click.echo(run(InspectConfig(**options), factory.world()).report)


@main.command()
@click.argument("raws", nargs=-1, required=True)
@click.argument("dest")
@click.option("--initialize-from", help="Path, hub id or `embedded` to fine-tune.  [default: new weights]")
@click.option("--num-steps", type=COUNT, default=20_000, show_default=True)
@click.option("--batch-size", type=COUNT, default=16, show_default=True)
@click.option("--learning-rate", type=POSITIVE, default=1e-3, show_default=True)
@click.option("--kl-weight", type=_Finite(0), default=1e-3, show_default=True)
@click.option("--latent-channels", type=COUNT, default=4, show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16 (autocast).")
@click.option("--seed", type=SEED, default=0, show_default=True)
@_cache
@_overwrite
@_dry_run
def autoencoder(**options: Any) -> None:
    """Train an AutoencoderKL on the raw shards RAWS and write it to DEST."""
    from pipelines import factory
    from pipelines.autoencoder import AutoencoderConfig, run

    config = AutoencoderConfig(**options)
    result = run(config, factory.world())
    if config.dry_run:
        return _show(config, result.plan)
    click.echo(result.plan if result.psnr is None else f"{result.plan}, reconstructs at {result.psnr:.2f} dB")


@main.command()
@click.argument("dest")
@click.option("--num", type=COUNT, default=4096, show_default=True, help="Pictures.")
@click.option("--image-size", type=PIXELS, default=64, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--kind", default="scenes", show_default=True, help="scenes, or leaves (for autoencoders).")
@_dry_run
def scenes(**options: Any) -> None:
    """Draw the project's own data set into DEST: pictures in class folders, maps and masks."""
    from pipelines.scenes import ScenesConfig, run

    config = ScenesConfig(**options)
    result = run(config)
    if config.dry_run:
        return _show(config, result.plan)
    click.echo(result.plan)


@main.command("train", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("rest", nargs=-1)
def _train(rest: tuple[str, ...]) -> None:
    raise click.UsageError("training is begun by a launcher: deepspeed launch/train.py --config configs/NAME.yaml")


@main.command()
@click.option("--out", default="demo", show_default=True, help="Folder for all that it makes.")
@_dry_run
def demo(**options: Any) -> None:
    """Do the whole job on drawn scenes: shard, encode, train with DeepSpeed, sample."""
    from pipelines.demo import DemoConfig, run

    config = DemoConfig(**options)
    result = run(config)
    if config.dry_run:
        return _show(config, result.plan)
    click.echo(result.report)


def _train_options(command: Callable) -> Callable:
    for decorate in (
        click.option("--config", required=True, help="YAML of the experiment."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Put over a key of the YAML."),
        click.option("--allow-changes", is_flag=True, help="Go on from a checkpoint of another configuration."),
        click.option(
            "--local_rank", type=int, hidden=True, help="From the deepspeed launcher; the environment has it."
        ),
        _dry_run,
    ):
        command = decorate(command)
    return command


@click.command(cls=_OneLine)
@_train_options
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


if __name__ == "__main__":
    main()
