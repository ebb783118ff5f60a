"""A small real data set, made once by the stages themselves: drawn scenes -> raw shards -> latents."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from lfm import checkpoint
from lfm.autoencoder import import_diffusers
from lfm.checkpoint import WeightsHeader, save_weights
from lfm.data import manifest as manifests
from lfm.data.scenes import SEGMENT_NAMES
from lfm.models.dit import DiT, DiTConfig
from lfm.world import World
from pipelines import encode, scenes, shard
from pipelines.cli import main

REPOSITORY = Path(__file__).parents[1]
ALONE = World()


@dataclass(frozen=True)
class SmallSet:
    """Where its parts are."""

    pictures: Path
    raw: Path
    latents: Path
    autoencoder: Path


def make_autoencoder(folder: Path, seed: int) -> Path:
    """A tiny AutoencoderKL with random weights, in diffusers' format."""
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


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """40 scenes of 16 pixels in 3 raw shards, and their latents (4, 8, 8) with flips."""
    root = tmp_path_factory.mktemp("small")
    autoencoder = make_autoencoder(root / "autoencoder", seed=0)
    scenes.run(scenes.ScenesConfig(str(root / "scenes"), num=40, image_size=16))
    pictures, raw, latents = root / "scenes" / "images", root / "raw", root / "latents"
    shard.run(shard.ShardConfig(str(pictures), str(raw), image_size=16, samples_per_shard=16))
    encode.run(encode.EncodeConfig(str(raw), str(latents), str(autoencoder), flips=True), ALONE)
    return SmallSet(pictures, raw, latents, autoencoder)


@pytest.fixture
def weights(small_set: SmallSet, tmp_path: Path) -> Path:
    """An untrained class-conditional model for the small set's latents, as a run folder."""
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = DiT(DiTConfig(4, 8, 2, 32, 1, 2, num_classes=8, condition_dropout=0.1))
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    save_weights(str(run_folder / checkpoint.WEIGHTS), model.state_dict(), header)
    return run_folder


@dataclass(frozen=True)
class Tasks:
    """Scenes with maps and masks, and a model of random weights for each task."""

    scenes: Path
    raw: Path
    latents: Path
    runs: Path
    autoencoder: Path


@pytest.fixture(scope="session")
def tasks(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    root = tmp_path_factory.mktemp("tasks")
    scenes.run(scenes.ScenesConfig(str(root / "scenes"), num=20, image_size=16))
    (root / "scenes" / "labels.txt").write_text("\n".join(f"{i}: {name}" for i, name in enumerate(SEGMENT_NAMES)))
    shard.run(
        shard.ShardConfig(str(root / "scenes"), str(root / "raw"), image_size=16, samples_per_shard=8, layout="paired")
    )
    encode.run(encode.EncodeConfig(str(root / "raw"), str(root / "latents"), str(small_set.autoencoder)), ALONE)
    manifest = manifests.load(str(root / "latents"), "latents")
    assert manifest.autoencoder is not None
    for name, shape in {
        "none": {},
        "class": {"num_classes": 8},
        "inpaint": {"condition_channels": 5},
        "semantic": {"num_labels": manifest.num_labels, "downsample_factor": 2},
        "both": {"num_classes": 8, "condition_channels": 5},
        "undropped": {"condition_channels": 5, "condition_dropout": 0.0},
    }.items():
        dropout = {"condition_dropout": 0.1} if shape else {}
        model = opened(DiTConfig(4, 8, 2, 32, 1, 2, **dropout | shape))
        header = WeightsHeader(
            *(model.config, manifest.autoencoder, 16, manifest.classes if "num_classes" in shape else ()),
            *(64, manifest.digest, "test"),
            labels=manifest.labels if "num_labels" in shape else {},
        )
        (root / "runs" / name).mkdir(parents=True)
        save_weights(str(root / "runs" / name / checkpoint.WEIGHTS), model.state_dict(), header)
    return Tasks(root / "scenes", root / "raw", root / "latents", root / "runs", small_set.autoencoder)


def opened(config: DiTConfig) -> DiT:
    """A model that hears every part of its input."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def lfm(*arguments: object, env: dict[str, str] | None = None, command: click.Command = main) -> Result:
    """Run a command line, in this process: a start of Python and torch for each would take the tests' whole time."""
    result = CliRunner(env=env).invoke(command, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_line(result: Result, *parts: object) -> None:
    """The command ended as a user's mistake must: exit code 2 and one line that holds `parts`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert str(part) in lines[0], lines[0]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_ranks(command: Sequence[object], ranks: int) -> list[subprocess.Popen[str]]:
    """Start a command on some ranks as torchrun would, without its seconds."""
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
    """Wait for all; returns the first rank's result, with what all said on stderr."""
    results = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    return subprocess.CompletedProcess([], results[0][2], results[0][0], "".join(result[1] for result in results))
