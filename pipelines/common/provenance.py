"""Which code made something: recorded in manifests, weights and reports."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import lfm

PACKAGE = Path(lfm.__file__).parent


@functools.lru_cache(maxsize=1)
def code_version() -> str:
    """Return the package's version and, in a checkout of this repository, its commit."""
    # An installation may lie inside another project's repository, whose commit says nothing about this package.
    if Path(_git("rev-parse", "--show-toplevel") or "/").resolve() != PACKAGE.resolve().parent:
        return lfm.__version__
    commit = _git("describe", "--always", "--dirty")
    return f"{lfm.__version__} ({commit})" if commit else lfm.__version__


def _git(*arguments: str) -> str:
    """Return the output of a git command on the package's folder; empty if git or a repository is missing."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
