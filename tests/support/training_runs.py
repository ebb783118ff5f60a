"""Trainings started by launch/train.py: a small experiment, its processes and its losses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file

from pipelines.cli import model_commands
from tests.support.commands import REPOSITORY, finish, lfm, start_ranks

SCRIPT = REPOSITORY / "launch" / "train.py"

YAML = """
run: {run}
condition: class
condition_dropout: 0.1
data:
  shards: {latents}
  window: 2
model:
  hidden_size: 32
  depth: 2
  num_heads: 2
train:
  num_steps: 20
  global_batch: 8
  learning_rate: 1.0e-3
  warmup_steps: 5
  schedule: cosine
  gradient_clipping: 1.0
  ema_decay: 0.99
  checkpoint_every: 5
  log_every: 1
deepspeed: {deepspeed}/zero1.json
"""


def zero(stage: int) -> str:
    """Return the override that chooses a ZeRO stage."""
    return f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


def start(config: Path, *overrides: str, ranks: int = 1, options: Sequence[object] = ()) -> list[subprocess.Popen[str]]:
    """Start training on `ranks` processes."""
    settings = [part for override in overrides for part in ("--set", override)]
    return start_ranks([sys.executable, SCRIPT, "--config", config, *settings, *options], ranks)


def train(config: Path, *overrides: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Train to the end; `how` are the keyword arguments of `start`."""
    return finish(start(config, *overrides, **how))


def plan(config: Path, *overrides: str, options: Sequence[object] = ()) -> Result:
    """Run `launch/train.py --dry-run` in this process, at a given rate, whose measurement would take seconds."""
    settings = [part for override in overrides for part in ("--set", override)]
    return lfm("--config", config, "--dry-run", "--rate", "100", *settings, *options, command=model_commands.train)


def losses(run: Path) -> list[float]:
    """Return the loss of every line of a run's log."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """Assert that the weights of two run folders are equal bit for bit."""
    first, second = (load_file(run / "weights.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
