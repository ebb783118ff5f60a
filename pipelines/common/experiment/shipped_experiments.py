"""The experiments that come with lfm, found by name, and the launch file: in an installed package, or in a checkout."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from lfm.errors import ConfigError

PACKAGE = Path(str(files("pipelines")))


def _shipped(name: str) -> Path:
    """Return a folder of the repository's root, which an installed package holds inside `pipelines`."""
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / name


CONFIGS = _shipped("configs")
LAUNCH_FILE = _shipped("launch") / "train.py"


def names() -> list[str]:
    """Return the names of the experiments, in order."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find(name_or_file: str) -> str:
    """Return the YAML file of an experiment: the file itself, or the shipped one of that name, such as ffhq_256.

    Raises:
        ConfigError: it is a name, and no experiment has it.
    """
    path = Path(name_or_file).expanduser()
    if path.suffix or path.parent != Path() or path.exists():
        return str(path)
    if name_or_file in names():
        return str(CONFIGS / f"{name_or_file}.yaml")
    near = difflib.get_close_matches(name_or_file, names(), 1)
    hint = f"did you mean {near[0]}?" if near else "`lfm config list` prints them"
    raise ConfigError(f"{name_or_file}: neither a file nor the name of a shipped experiment; {hint}")
