"""Errors that a user can cause and repair. Each message is one line that names the problem, its place and the repair."""


class LfmError(Exception):
    """Base class of the errors that end a command with exit code 2 and one line, without a traceback."""


class ConfigError(LfmError):
    """An argument or a configuration key has a value that cannot be used, or contradicts another."""


class DataError(LfmError):
    """An image, shard, manifest or data set is missing, damaged or not of the expected kind."""


class StorageError(LfmError):
    """A path or URL cannot be read or written."""


class CheckpointError(LfmError):
    """A run folder, checkpoint or weights file is missing, incomplete or of another model."""


def on_one_line(error: Exception) -> str:
    """Return the message of another library's error, shortened for a part of one line; its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
