"""The campaigns of kills and of mutated files in their smallest size; see tests/campaigns for larger ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.commands import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("kill", "--kills", 3, "--stages", "shard,encode,sample"), ("fuzz", "--cases", 36)]
)
def test_a_campaign_finds_no_problem(arguments: tuple[object, ...]) -> None:
    command = [sys.executable, "-m", f"tests.campaigns.{arguments[0]}", *map(str, arguments[1:])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert "tracebacks" in result.stdout
