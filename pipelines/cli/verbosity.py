"""The options -q and -v, which every command has, and `lfm` itself before the command.

They are passed on by environment variables, so that processes that a command starts inherit them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from pipelines.common.progress import QUIET

TRACEBACK = "LFM_TRACEBACK"  # errors end with a traceback


def verbosity_options() -> list[click.Parameter]:
    """Return the options."""
    quiet = "Show no progress; the plan, warnings, errors and results remain."
    verbose = "Log more, and show where in the code an error occurred."
    return [_option("-q", "--quiet", QUIET, quiet), _option("-v", "--verbose", TRACEBACK, verbose)]


def _option(short: str, long: str, variable: str, text: str) -> click.Option:
    """Return an option that sets an environment variable."""

    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            os.environ[variable] = "1"
            if variable == TRACEBACK:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    return click.Option([short, long], is_flag=True, expose_value=False, callback=callback, help=text)


@contextmanager
def environment_restored() -> Iterator[None]:
    """Leave the two variables as they were before the block."""
    before = {name: os.environ.get(name) for name in (QUIET, TRACEBACK)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
