"""Resolve class names and indices in options, such as `star,circle` or `0-9`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from lfm.data.manifest import ClassRecord
from lfm.errors import ConfigError
from pipelines.common.number_lists import is_index_range, parse_indices

NUM_NAMED = 8  # classes in an error message


def resolve_classes(text: str, classes: Sequence[ClassRecord], option: str = "class_index") -> list[int]:
    """Return the class indices that a list of names, indices and index ranges names, in its order.

    A part that consists of digits is an index, even if a class has that name. Whether the model knows an index is
    checked where the condition is built.

    Args:
        text: comma-separated class names, indices and inclusive ranges, such as `star,circle,0-3`.
        classes: the classes of the model or data set.
        option: field name of the option, for messages.

    Raises:
        ConfigError: a name is unknown, or a class is named twice.
    """
    names = {record.name: record.index for record in classes}
    if text in names:  # a name that holds a comma
        return [names[text]]
    indices: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if is_index_range(part):
            indices += parse_indices(option, part)
        elif part in names:
            indices.append(names[part])
        else:
            raise ConfigError(f"`{option}` {text}: unknown class {part!r}; {_hint(part, list(names))}")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"`{option}` {text}: names a class twice")
    return indices


def _hint(part: str, names: list[str]) -> str:
    """Return the known name that is nearest to a part, whatever its case, or the first names."""
    folded = {name.casefold(): name for name in names}
    if near := get_close_matches(part.casefold(), folded, n=1):
        return f"did you mean {folded[near[0]]}?"
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"use names or indices, such as 0-{len(names) - 1}, of {', '.join(names[:NUM_NAMED])}{more}"
