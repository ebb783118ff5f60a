"""Derive click commands from option classes: one option per field, and errors that name flags."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lfm.errors import LfmError, hide_credentials, printable
from pipelines.cli.verbosity import TRACEBACK, environment_restored, verbosity_options
from pipelines.common.options import Argument, Flag, PythonOnly, Section, expand_home, problem
from pipelines.common.processes import logs_without_credentials, stopped_by_sigterm

METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


class StageCommand(click.Command):
    """A command that ends with one line and exit code 2 after a mistake that the user can repair.

    The help lists options in sections: `sections` maps each title to the names of the parameters under it.
    """

    sections: Mapping[str, list[str]] = {}

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command and exit: 2 where the user can repair something, 130 after an interrupt."""
        with environment_restored():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with stopped_by_sigterm(), logs_without_credentials():
                return super().main(*args, **kwargs | {"standalone_mode": False})
        except click.Abort:
            click.echo("interrupted; run the same command to resume", err=True)
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
        except click.ClickException as error:
            _fail(error.format_message())
        except (LfmError, OSError) as error:
            if os.environ.get(TRACEBACK):
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                _fail(f"{error.filename or 'the disk'}: no space left; make room and run the same command")
            _fail(str(error))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments and options with their help, section by section."""
        for title, names in self.sections.items():
            rows = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx) if parameter.name in names]
            if rows := [row for row in rows if row]:
                with formatter.section(title):
                    formatter.write_dl(rows)


class DescribedArgument(click.Argument):
    """A positional argument with a line of help."""

    def __init__(self, name: str, *, nargs: int, required: bool, description: str) -> None:
        super().__init__([name], nargs=nargs, required=required, type=str)
        self.description = description

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the argument's name and description, as options do."""
        return self.make_metavar(ctx), self.description


class StageGroup(StageCommand, click.Group):
    """The group of all commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Group.format_options(self, ctx, formatter)


def stage_command(config_class: type, name: str | None = None) -> Callable[[Callable[[Any], None]], click.Command]:
    """Make a function of one configuration a command whose options are the fields of `config_class`."""

    def decorate(function: Callable[[Any], None]) -> click.Command:
        @click.pass_context
        def callback(context: click.Context, /, **values: Any) -> None:
            chosen = {
                key: value
                for key, value in values.items()
                if context.get_parameter_source(key) is not click.core.ParameterSource.DEFAULT or key in required
            }
            with errors_name_flags(flags):
                function(_config_of(config_class, chosen, flags))

        described = list(_fields(config_class))
        required = {key for key, field in described if field.is_required()}
        flags = {key: _flag(key, field) for key, field in described}
        command = StageCommand(
            name or function.__name__,
            callback=callback,
            params=[*(_parameter(key, field) for key, field in described), *verbosity_options()],
            help=function.__doc__,
        )
        command.sections = _sections(described)
        return command

    return decorate


@contextmanager
def errors_name_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Replace the names of options in errors, which are Python names in backticks, by their flags."""
    try:
        yield
    except LfmError as error:
        error.args = (_with_flags(str(error), flags),)
        raise


def with_flags(text: str, config_class: type) -> str:
    """Return text with the names of a command's options, which are Python names in backticks, replaced by their flags."""
    return _with_flags(text, {key: _flag(key, field) for key, field in _fields(config_class)})


def _with_flags(text: str, flags: Mapping[str, str]) -> str:
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)


def command_line(command: str, options: Any) -> str:
    """Return the command line that a configuration of options stands for, with only those that are not the defaults."""
    arguments: list[str] = []
    flags: list[str] = []
    for key, field in _fields(type(options)):
        value = getattr(options, key)
        if _marker(field, Argument):
            arguments += value if isinstance(value, tuple) else [value]
        elif value != field.default and isinstance(value, bool):
            flags.append(_flag(key, field) if value else f"--no-{_flag(key, field).removeprefix('--')}")
        elif value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [part for each in values for part in (_flag(key, field), str(each))]
    return f"{command} {shlex.join([*arguments, *flags])}"


def echo(text: str) -> None:
    """Print a line without the credentials of URLs in it."""
    click.echo(hide_credentials(text))


def show(config: Any, plan: str) -> None:
    """Print a resolved configuration and its plan, for `--dry-run`."""
    for field in fields(config):
        echo(f"{field.name}: {getattr(config, field.name)}")
    echo(plan)


def _fields(config_class: Any) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields that the command line offers."""
    for key, field in config_class.__pydantic_fields__.items():
        if _marker(field, PythonOnly) is None:
            yield key, field


def _config_of(config_class: type, values: Mapping[str, Any], flags: Mapping[str, str]) -> Any:
    """Return the configuration of a command line; a wrong value is named with its flag."""
    try:
        return config_class(**expand_home(dict(values)))
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{flags[str(first['loc'][0])]} {first['input']}: {problem(first)}") from error


def _marker(field: FieldInfo, kind: type) -> Any:
    """Return a field's marker of some class; None if it has none."""
    return next((marker for marker in field.metadata if isinstance(marker, kind)), None)


def _flag(key: str, field: FieldInfo) -> str:
    """Return the name of a field on the command line."""
    if _marker(field, Argument):
        return key.upper()
    flag = _marker(field, Flag)
    return flag.name if flag and flag.name else f"--{key.replace('_', '-')}"


def _parameter(key: str, field: FieldInfo) -> click.Parameter:
    kind, choices, several = _kind(field.annotation)
    if _marker(field, Argument):
        return DescribedArgument(
            key, nargs=-1 if several else 1, required=field.is_required(), description=field.description or ""
        )
    flag = _marker(field, Flag) or Flag()
    name = _flag(key, field)
    if kind is bool and field.default is True:
        name += f"/--no-{name.removeprefix('--')}"
    shown = not field.is_required() and kind is not bool and field.default not in (None, ())
    # told `is_flag=False`, click lets an option go without its value, and takes the -1 after it for another option; told
    # `default=None`, it never misses a required one
    if kind is bool:
        of_kind: dict[str, Any] = {"is_flag": True, "default": field.default, "type": bool}
    else:
        of_kind = {"type": str}
    return click.Option(
        [key, name, flag.alias] if flag.alias else [key, name],
        multiple=several,
        required=field.is_required() and flag.required,
        **of_kind,
        metavar=flag.metavar or (f"[{'|'.join(choices)}]" if choices else METAVARS.get(kind)),
        help=f"{field.description}{f'  [default: {field.default}]' if shown else ''}",
        hidden=flag.hidden,
    )


def _kind(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """Return the type of a field's value, the choices of a Literal, and whether the field takes several values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        return _kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return (*_kind(arguments[0])[:2], True)
    if origin is Literal:
        return str, tuple(map(str, arguments)), False
    return annotation, (), False


def _sections(described: list[tuple[str, FieldInfo]]) -> dict[str, list[str]]:
    """Return the parameters under each title of the help."""
    sections: dict[str, list[str]] = {"Arguments": [], "Options": []}
    title = "Options"
    for key, field in described:
        if section := _marker(field, Section):
            title = section.title
        sections.setdefault("Arguments" if _marker(field, Argument) else title, []).append(key)
    sections[title] += ["quiet", "verbose", "help"]
    return sections


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {hide_credentials(printable(' '.join(message.split())))}", err=True)
    sys.exit(2)
