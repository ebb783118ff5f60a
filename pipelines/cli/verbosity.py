"""The options -q and -v, which every command has, and `lfm` itself before the command.

They are passed on by environment variables, so that processes that a command starts inherit them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from pipelines.common.progress import QUIET

TRACEBACK = "LFM_TRACEBACK"  # errors end with a traceback


def verbosity_options() -> list[click.Parameter]:
    """Return the options."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_setting(QUIET),
            help="Show no progress; the plan, warnings, errors and results remain.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_setting(TRACEBACK),
            help="Log more, and show where in the code an error occurred.",
        ),
    ]


def _setting(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            os.environ[name] = "1"
            if name == TRACEBACK:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    return callback


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
