"""Tests of `lfm likelihood`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lfm import weights_file
from lfm.data import manifest as manifests
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet, Tasks, assert_one_line, lfm
from tests.support.models import randomized_dit


@pytest.fixture
def run(small_set: SmallSet, tmp_path: Path) -> Path:
    """A class-conditional model whose weights have no zeros."""
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = randomized_dit(DiTConfig(4, 8, 4, 16, 1, 2, num_classes=8, condition_dropout=0.1))
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    save_weights(str(tmp_path / weights_file.WEIGHTS), model.state_dict(), header)
    return tmp_path


@pytest.fixture
def command(run: Path, small_set: SmallSet) -> tuple[object, ...]:
    """`lfm likelihood` of six latents."""
    return ("likelihood", run, small_set.latents, "--solver", "heun", "--num-steps", 3, "--rows", "0-4,30")


def written(command: tuple[object, ...], out: Path, *options: object) -> dict[str, Any]:
    """Run the command with some options, and return the file that it wrote."""
    result = lfm(*command, "--out", out, *options)
    assert result.exit_code == 0 and "bits per dimension, 6 network evaluations" in result.stdout, result.stderr
    return json.loads(out.read_text())


def test_likelihoods_do_not_depend_on_the_batch_size(command: tuple[object, ...], tmp_path: Path) -> None:
    alone, together = (written(command, tmp_path / f"{size}.json", "--batch-size", size)["each"] for size in (1, 6))
    assert list(alone) == ["0", "1", "2", "3", "4", "30"]
    assert list(alone.values()) == pytest.approx(list(together.values()), abs=1e-4)
    assert len({round(value, 6) for value in alone.values()}) == 6


def test_the_precision_is_chosen_and_recorded(command: tuple[object, ...], tmp_path: Path) -> None:
    full = written(command, tmp_path / "full.json")
    rounded = written(command, tmp_path / "rounded.json", "--precision", "bf16")
    assert (full["settings"]["precision"], rounded["settings"]["precision"]) == ("fp32", "bf16")
    assert rounded["each"] != full["each"]
    assert list(rounded["each"].values()) == pytest.approx(list(full["each"].values()), rel=0.05)


def test_wrong_options_are_refused(
    command: tuple[object, ...], run: Path, small_set: SmallSet, tasks: Tasks, tmp_path: Path
) -> None:
    assert lfm(*command, "--dry-run").exit_code == 0
    assert_one_line(lfm(*command, "--estimator", "x"), "--estimator x: unknown; one of hutchinson, exact")
    beyond = ("likelihood", run, small_set.latents, "--rows", 40)
    assert_one_line(lfm(*beyond), "--rows 40: out of range")
    assert_one_line(lfm(*beyond, "--dry-run"), "--rows 40: out of range")
    assert_one_line(lfm("likelihood", run, small_set.raw), "holds raw shards")
    large = shutil.copytree(small_set.latents, tmp_path / "large")
    manifest = manifests.load(str(large), "latents")
    manifests.publish(str(large), manifest.model_copy(update={"image_size": 32}))
    assert_one_line(lfm("likelihood", run, large), f"{large}: its latents are of images of 32 pixels", "makes 16")
    assert_one_line(lfm(*command, "--out", tmp_path), "--out", "is a folder")
    assert_one_line(lfm("likelihood", tasks.runs / "inpaint", small_set.latents), "no masks")
