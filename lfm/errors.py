"""The errors that a user can cause and repair. Each message is one line: what is wrong, where, and the repair."""


class LfmError(Exception):
    """Base of all errors that end a command with exit code 2 and one line, without a traceback."""


class ConfigError(LfmError):
    """A flag, a configuration key, or two of them together, cannot be used as given."""


class DataError(LfmError):
    """An image, shard, manifest or data set is not what it should be."""


class StorageError(LfmError):
    """A path or URL cannot be read or written."""


class CheckpointError(LfmError):
    """A run folder, checkpoint or weights file is missing, incomplete or of another model."""


def on_one_line(error: Exception) -> str:
    """What another library's error says, short enough to stand within a message of ours; its kind if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
