"""What the commands share: how they end, the kinds of their options, and options that several have."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import sys
from typing import Any, NoReturn

import click

from lfm.errors import LfmError


class OneLine(click.Command):
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


class Commands(OneLine, click.Group):
    """A group whose commands leave their errors to it."""

    command_class = click.Command


class Finite(click.FloatRange):
    """A number in a range, and neither nan nor inf."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite", param, ctx)
        return number


class Location(click.ParamType):
    """A path or URL; one of this machine's files is a path from here on."""

    name = "path or URL"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Refuse the empty string, which an unset variable of the shell leaves behind."""
        if not value.strip():
            self.fail("is empty; name a folder or URL", param, ctx)
        return value.removeprefix("file://")


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


LOCATION = Location()
COUNT = click.IntRange(1, 10**9)
SEED = click.IntRange(0, 2**63 - 1)
PIXELS = click.IntRange(1, 16_384)
SHARE = Finite(0, 1)
POSITIVE = Finite(0, min_open=True)

dry_run_option = click.option("--dry-run", is_flag=True, help="Print the configuration and the plan, and do nothing.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Begin anew, and remove what the command made before."
)
cache_option = click.option("--cache", help="Folder for copies of remote shards.  [default: ~/.cache/lfm]")

num_gpus_option = click.option(
    "--num-gpus", type=COUNT, help="Processes to start; on a machine without GPUs too.  [default: all GPUs]"
)


def show(config: Any, plan: str) -> None:
    """Print a resolved configuration and its plan, for `--dry-run`."""
    for field in dataclasses.fields(config):
        click.echo(f"{field.name}: {getattr(config, field.name)}")
    click.echo(plan)
