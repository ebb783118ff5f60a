"""Parse lists of numbers in options, such as `0-15`, `3,5,8-9` or `1,0.8,0.5,0`."""

from __future__ import annotations

import math
import re

from lfm.errors import ConfigError

MAX_INDICES = 1_000_000
MAX_MAGNITUDE = 1000.0
INDEX_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")


def is_index_range(text: str) -> bool:
    """Return whether the text is a number such as `3` or a range such as `0-15`."""
    return INDEX_RANGE.fullmatch(text) is not None


def parse_indices(option: str, text: str) -> list[int]:
    """Return the integers of a list of numbers and ranges, in the order in which they are named.

    Args:
        option: field name of the option, for messages.
        text: comma-separated numbers and inclusive ranges, such as `0-15` or `3,5,8-9`.

    Raises:
        ConfigError: the text is not such a list, repeats a number or names more than MAX_INDICES.
    """
    indices: list[int] = []
    for part in text.split(","):
        match = INDEX_RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"`{option}` {text}: must be numbers and ranges below 1e18, as in 0-15 or 3,5,8-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"`{option}` {text}: the range {part.strip()} is empty; write the smaller number first")
        if len(indices) + last - first >= MAX_INDICES:
            raise ConfigError(f"`{option}` {text}: more than {MAX_INDICES:,} numbers; split the work into several runs")
        indices += range(first, last + 1)
    if len(set(indices)) != len(indices):
        raise ConfigError(f"`{option}` {text}: names a number twice")
    return indices


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Return the numbers of a comma-separated list such as `1,0.8,0.5,0`.

    Args:
        option: field name of the option, for messages.
        text: the list.

    Raises:
        ConfigError: the text is not such a list, or a number is not finite or exceeds MAX_MAGNITUDE.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"`{option}` {text}: must be comma-separated numbers, as in 1,1.5") from error
    if not all(math.isfinite(number) and abs(number) <= MAX_MAGNITUDE for number in numbers):
        raise ConfigError(f"`{option}` {text}: must be finite and at most {MAX_MAGNITUDE:g}")
    return numbers
