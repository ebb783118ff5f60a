"""Fixtures: a small data set made by the stages themselves (scenes, raw shards, latents), and untrained models for it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from lfm import weights_file
from lfm.data import manifest as manifests
from lfm.models import registry
from lfm.models.dit_config import DiTConfig
from lfm.synthetic.scenes import SEGMENT_NAMES
from lfm.weights_file import WeightsHeader, save_weights
from pipelines.data import encode, shard
from pipelines.demo import draw_scenes
from tests.support.commands import ALONE, REPOSITORY, SmallSet, Tasks, make_autoencoder
from tests.support.models import randomized_dit
from tests.support.training_runs import YAML


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests, so that no process is left alone with one of them at the end."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(autouse=True)
def _this_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test that would replace this process by another program, as `lfm train` does, fail instead."""

    def refuse(program: str, *_: object) -> None:
        raise AssertionError(f"the process of the tests would become {program}")

    monkeypatch.setattr(os, "execve", refuse)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    """40 scenes of 16 pixels in 3 raw shards, and their latents (4, 8, 8) with flips."""
    root = tmp_path_factory.mktemp("small")
    autoencoder = make_autoencoder(root / "autoencoder", seed=0)
    draw_scenes.run(draw_scenes.ScenesConfig(str(root / "scenes"), num=40, image_size=16))
    images, raw, latents = root / "scenes" / "images", root / "raw", root / "latents"
    shard.run(shard.ShardConfig(str(images), str(raw), image_size=16, samples_per_shard=16))
    encode.run(encode.EncodeConfig(str(raw), str(latents), str(autoencoder), flips=True), ALONE)
    return SmallSet(images, raw, latents, autoencoder)


@pytest.fixture
def weights(small_set: SmallSet, tmp_path: Path) -> Path:
    """An untrained class-conditional model for the small set's latents, as a run folder."""
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = registry.build_network(DiTConfig(4, 8, 2, 32, 1, 2, num_classes=8, condition_dropout=0.1))
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(str(folder / weights_file.WEIGHTS), model.state_dict(), header)
    return folder


@pytest.fixture(scope="session")
def tasks(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    root = tmp_path_factory.mktemp("tasks")
    draw_scenes.run(draw_scenes.ScenesConfig(str(root / "scenes"), num=20, image_size=16))
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
        model = randomized_dit(DiTConfig(4, 8, 2, 32, 1, 2, **dropout | shape))
        header = WeightsHeader(
            *(model.config, manifest.autoencoder, 16, manifest.classes if "num_classes" in shape else ()),
            *(64, manifest.digest, "test"),
            labels=manifest.labels if "num_labels" in shape else {},
        )
        (root / "runs" / name).mkdir(parents=True)
        save_weights(str(root / "runs" / name / weights_file.WEIGHTS), model.state_dict(), header)
    return Tasks(root / "scenes", root / "raw", root / "latents", root / "runs", small_set.autoencoder)


@pytest.fixture
def experiment(small_set: SmallSet, tmp_path: Path) -> Path:
    """A small experiment's YAML; its run folder is tmp_path/run."""
    path = tmp_path / "small.yaml"
    folders = {"run": tmp_path / "run", "latents": small_set.latents, "deepspeed": REPOSITORY / "configs" / "deepspeed"}
    path.write_text(YAML.format(**folders))
    return path
