"""Pages of the manual as programs: their command lines and Python code, run in the order of the page at a tiny size."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.cli import model_commands
from tests.support.commands import REPOSITORY, finish, free_port, lfm, start_ranks
from tests.support.training_runs import SCRIPT

REAL_SIZE = "## At real size"  # the section whose trainings are only planned
STEP = re.compile(r"^```python\n(.*?)^```|^    ((?:lfm|torchrun) [^\n]*)$", re.MULTILINE | re.DOTALL)
PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-mse"
SMALLER = {
    "shard": ("--image-size", "16", "--samples-per-shard", "8"),
    "scenes": ("--image-size", "16", "--num", "20"),
    "autoencoder": ("--num-steps", "2", "--batch-size", "4"),
    "evaluate": ("--num", "6"),
}
SMALL_TRAINING = {
    "model.size": "null",
    "model.hidden_size": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.compile": "false",
    "train.num_steps": 2,
    "train.warmup_steps": 0,
    "train.global_batch": 8,
    "train.micro_batch": "null",
    "train.precision": "fp32",
}


class ManualPage:
    """A page of docs/, to be run in the working directory.

    Args:
        name: path of the page in docs/.
        autoencoder: takes the place of the published one.
    """

    def __init__(self, name: str, autoencoder: Path) -> None:
        self.text = (REPOSITORY / "docs" / name).read_text()
        self.autoencoder = autoencoder
        self.outputs: dict[str, str] = {}  # what each command printed, by its line
        self.variables: dict[str, Any] = {}  # those of its Python code

    def run(self) -> None:
        """Run every command line and every block of Python code."""
        for match in STEP.finditer(self.text):
            if match[1]:
                exec(compile(match[1], "the page", "exec"), self.variables)
            else:
                self.outputs[match[2]] = self._run_command(match[2], REAL_SIZE in self.text[: match.start()])

    def output(self, start: str) -> str:
        """Return what the first command with this start printed."""
        return next(output for line, output in self.outputs.items() if line.startswith(start))

    def _run_command(self, line: str, planned: bool) -> str:
        words = shlex.split(line, comments=True)
        words = [str(self.autoencoder) if word == PUBLISHED_AUTOENCODER else word for word in words]
        if words[0] == "torchrun":
            return self._run_launched(words[1:])
        _, command, *words = words
        if command == "train":
            return self._train(words, planned or "--dry-run" in words)
        result = lfm(command, *words, *SMALLER.get(command, ()))
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result.stdout

    def _train(self, words: list[str], planned: bool) -> str:
        words += small_training()
        if planned:
            result = lfm(*words, *(() if "--dry-run" in words else ("--dry-run",)), command=model_commands.train)
            assert result.exit_code == 0, f"{words}\n{result.output}"
            return result.stdout
        return ended_well(start_ranks([sys.executable, SCRIPT, *words], 1))

    def _run_launched(self, words: list[str]) -> str:
        """Run torchrun as on two machines with one process each, both of which are this one."""
        words[words.index("--nproc-per-node") + 1] = "1"
        words[words.index("--rdzv-endpoint") + 1] = f"127.0.0.1:{free_port()}"
        if "train" in words:
            words += small_training()
        return ended_well(start_ranks([sys.executable, "-m", "torch.distributed.run", *words], 2))


def small_training() -> list[str]:
    """Return the overrides that make any training a tiny one."""
    return [part for key, value in SMALL_TRAINING.items() for part in ("--set", f"{key}={value}")]


def ended_well(processes: list[subprocess.Popen[str]]) -> str:
    """Wait for processes, assert that the first one ended without an error, and return what it printed."""
    ended = finish(processes)
    assert ended.returncode == 0, f"{processes[0].args}\n{ended.stderr}"
    return ended.stdout
