"""A new experiment as YAML that explains itself: every key with its docstring, those of their default commented out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.common.experiment.config_schema import ExperimentConfig
from pipelines.common.options import field_descriptions

WIDTH = 100


def commented_yaml(config: ExperimentConfig) -> str:
    """Return an experiment as YAML, which `config_file.load` reads as `config`, with all other keys as comments."""
    blocks = ("\n".join(_key(config, key, field, "")) for key, field in type(config).model_fields.items())
    return "\n\n".join(blocks) + "\n"


def _key(section: Any, key: str, field: FieldInfo, indent: str) -> Iterator[str]:
    """Yield the lines of one key of a section, which is None where it is absent: then all of its keys are shown as set."""
    value = getattr(section, key, None)
    text = field.description or field_descriptions(type(section)).get(key, "")
    yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    inner = _described(value if value is not None else _model_of(field))
    if inner is None:
        default = field.get_default(call_default_factory=True)
        shown = default if section is None else value
        text = "" if shown is PydanticUndefined else f" {json.dumps(_plain(shown), ensure_ascii=False)}"
        yield f"{indent}{'# ' if section is not None and value == default else ''}{key}:{text}"
        return
    prefix = "# " if value is None else ""
    yield f"{prefix}{indent}{key}:"
    for name, described in inner.items():
        yield from (f"{prefix}{line}" for line in _key(value, name, described, f"{indent}  "))


def _described(value: Any) -> Mapping[str, FieldInfo] | None:
    """Return the fields of a section, given as a value or as a class; None of any other value."""
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, BaseModel):
        return kind.model_fields
    return getattr(kind, "__pydantic_fields__", None)


def _model_of(field: FieldInfo) -> type | None:
    """Return the class of an optional section; None of any other field."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
