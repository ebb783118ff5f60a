"""Option classes: frozen pydantic dataclasses whose fields are the options of a command.

A field's type, constraints, default and docstring are all that the command line needs: `pipelines.cli.stage_command` derives
one click option from each field. This module and the modules `*_options.py` import no torch, so `lfm X --help` is quick.

    @stage_options
    class ExampleConfig:
        '''Options of `lfm example`.'''

        source: Annotated[Location, Argument()]
        '''Folder of images.'''

        image_format: Annotated[Literal["webp", "png"], Flag("--format")] = "webp"
        '''File format of the images.'''
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

T = TypeVar("T")


def expand_home(value: Any) -> Any:
    """Return a value in which `~/` at the start of a text is the home folder, as in a shell; also in lists and mappings."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    return value


@dataclass_transform(frozen_default=True)
def stage_options(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that converts and validates its values once, when it is constructed.

    Constructing it with a wrong value raises `pydantic.ValidationError`.
    """
    config = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)
    options_class: Any = pydantic_dataclass(frozen=True, config=config)(cls)
    for key, text in field_descriptions(options_class).items():
        options_class.__pydantic_fields__[key].description = text
    return options_class


def field_descriptions(cls: type) -> dict[str, str]:
    """Return the docstrings of the fields of a pydantic dataclass, also of those that it inherits, which pydantic drops."""
    inherited = (getattr(kind, "__pydantic_fields__", {}) for kind in reversed(cls.__mro__))
    return {key: field.description for fields in inherited for key, field in fields.items() if field.description}


@dataclass(frozen=True)
class Argument:
    """Marks a field that is a positional argument of the command."""


@dataclass(frozen=True)
class PythonOnly:
    """Marks a field that is not offered on the command line."""


@dataclass(frozen=True)
class Section:
    """Marks the first of the fields that the help lists under a title of their own."""

    title: str


@dataclass(frozen=True)
class Flag:
    """Names and help of a field's flag, where they differ from `--field-name` and its type.

    Args:
        name: the flag's name; by default the field's own.
        alias: a second name.
        metavar: placeholder of the value in the help.
        hidden: leave the flag out of the help.
        required: demand the flag where the field has no default; if False, the stage must check it.
    """

    name: str | None = None
    alias: str | None = None
    metavar: str | None = None
    hidden: bool = False
    required: bool = True


def _location(text: str) -> str:
    """Refuse the empty string, which an unset shell variable expands to; make a file:// URL a path."""
    if not text.strip():
        raise ValueError("is empty; name a folder, file or URL")
    return text.removeprefix("file://")


Location = Annotated[str, AfterValidator(_location)]
"""A path or URL."""
Count = Annotated[int, Field(ge=1, le=10**9)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

# Fields that several commands have, with their help.
EXECUTION = Section("Execution")
MovedAutoencoder = Annotated[
    str | None,
    Field(description="Path or hub id of the autoencoder, if it has moved since the model was trained."),
    Flag(metavar="PATH_OR_ID"),
]
NumGpus = Annotated[
    Count | None,
    Field(description="Number of processes to start, one per GPU; also possible without GPUs.  [default: all GPUs]"),
    EXECUTION,
]
CacheFolder = Annotated[
    str | None,
    Field(description="Folder for copies of remote shards, of at most 50 GB.  [default: ~/.cache/lfm]"),
    Flag(metavar="DIR"),
    EXECUTION,
]
Overwrite = Annotated[
    bool, Field(description="Delete what an earlier run of the command wrote, and start again."), EXECUTION
]
NumSteps = Annotated[Count | None, Field(description="Number of steps of a fixed-step solver.  [default: 25]")]
AbsoluteTolerance = Annotated[
    Positive | None, Field(description="Absolute tolerance of an adaptive solver.  [default: 1e-5]")
]
RelativeTolerance = Annotated[
    Positive | None, Field(description="Relative tolerance of an adaptive solver.  [default: 1e-5]")
]
Precision = Annotated[
    Literal["fp32", "tf32", "bf16"] | None,
    Field(description="Arithmetic of the network: fp32, tf32 (faster on a GPU) or bf16.  [default: as in training]"),
]
TrustCode = Annotated[
    bool, Field(description="Load modules of torch.export (.pt2), which runs code that they contain.")
]
DryRun = Annotated[bool, Field(description="Print the resolved configuration and the plan, and do nothing."), EXECUTION]


def problem(error: Mapping[str, Any]) -> str:
    """Describe one error of a `pydantic.ValidationError` in a few words that follow the value's name."""
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in ("dataclass_type", "model_type"):
        return "must be a mapping of keys to values"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        near = difflib.get_close_matches(str(value), choices.split(", "), 1)
        return f"unknown; {f'did you mean {near[0]}? ' if near else ''}one of {choices}"
    message = error["msg"].partition(", unable")[0].replace("Input should", "must")
    return message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
