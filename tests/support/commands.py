"""Small data sets, command lines run in this process, and ranks started without a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from click.testing import CliRunner, Result

from lfm.autoencoder import import_diffusers
from lfm.world import World
from pipelines.cli.main import main

REPOSITORY = Path(__file__).parents[2]
ALONE = World()


@dataclass(frozen=True)
class SmallSet:
    """Paths of a small data set: images, raw shards, latent shards, and the autoencoder of the latents."""

    images: Path
    raw: Path
    latents: Path
    autoencoder: Path


def make_autoencoder(folder: Path, seed: int) -> Path:
    """Write a tiny AutoencoderKL with random weights in the format of diffusers, and return its folder."""
    torch.manual_seed(seed)
    model = import_diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.8,
    )
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Tasks:
    """Paths of scenes with segmentations and masks, their shards, and a run of random weights for each task."""

    scenes: Path
    raw: Path
    latents: Path
    runs: Path
    autoencoder: Path


def lfm(*arguments: object, env: dict[str, str] | None = None, command: click.Command = main) -> Result:
    """Run a command line in this process: starting Python and torch for each would dominate the time of the tests."""
    result = CliRunner(env=env).invoke(command, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_line(result: Result, *parts: object) -> None:
    """Assert that a command failed as after a user's mistake: exit code 2 and one error line that contains `parts`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert str(part) in lines[0], lines[0]


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_ranks(command: Sequence[object], ranks: int) -> list[subprocess.Popen[str]]:
    """Start a command on several ranks as torchrun does, without the seconds that torchrun takes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **shared, **place}
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(list(map(str, command)), env=environment, text=True, stdout=pipe, stderr=pipe)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> subprocess.CompletedProcess[str]:
    """Wait for all ranks; return the result of the first one, with the stderr of all. Ranks that hang are killed."""
    try:
        results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()  # no effect on those that have ended
    return subprocess.CompletedProcess([], results[0][2], results[0][0], "".join(result[1] for result in results))
