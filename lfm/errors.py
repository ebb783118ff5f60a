"""Errors that a user can cause and repair. Each message is one line that names the problem, its place and the repair."""

import re

_QUERY = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s\"'`?]*)\?[^\s\"'`]+")  # a signed URL carries its signature there
_PASSWORD = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^\s\"'`/:@]*:[^\s\"'`]*@")
_TOKEN = re.compile(r"(\bhttps?://)[^\s\"'`/@]+@", re.IGNORECASE)


def hide_credentials(text: str) -> str:
    """Replace the user, password, token and query of every URL in a text by `***`."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1?***", _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1***@", text)))


class LfmError(Exception):
    """Base class of the errors that end a command with exit code 2 and one line, without a traceback."""

    def __str__(self) -> str:
        return hide_credentials(super().__str__())


class ConfigError(LfmError):
    """An argument or a configuration key has a value that cannot be used, or contradicts another."""


class DataError(LfmError):
    """An image, shard, manifest or data set is missing, damaged or not of the expected kind."""


class StorageError(LfmError):
    """A path or URL cannot be read or written."""


class CheckpointError(LfmError):
    """A run folder, checkpoint or weights file is missing, incomplete or of another model."""


def on_one_line(error: BaseException | None) -> str:
    """Return the message of another library's error, shortened for a part of one line; its type if it has no message."""
    return hide_credentials(" ".join(str(error).split()))[:200] or type(error).__name__


def printable(text: str) -> str:
    """Return text for a terminal: control characters, and bytes of a file name that are not UTF-8, become escapes."""
    return "".join(
        character if character.isprintable() or character == " " else character.encode("unicode_escape").decode()
        for character in text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )
