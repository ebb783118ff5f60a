"""Tests of `lfm likelihood`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm import weights_file
from lfm.data import manifest as manifests
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet, Tasks, assert_one_line, lfm
from tests.support.models import randomized_dit


def test_likelihoods_do_not_depend_on_the_batch_size(small_set: SmallSet, tasks: Tasks, tmp_path: Path) -> None:
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = randomized_dit(DiTConfig(4, 8, 4, 16, 1, 2, num_classes=8, condition_dropout=0.1))
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    save_weights(str(tmp_path / weights_file.WEIGHTS), model.state_dict(), header)
    common = ("likelihood", tmp_path, small_set.latents, "--solver", "heun", "--num-steps", 3, "--rows", "0-4,30")
    bits = {}
    for batch_size in (1, 6):
        out = tmp_path / f"{batch_size}.json"
        result = lfm(*common, "--out", out, "--batch-size", batch_size)
        assert result.exit_code == 0 and "bits per dimension, 6 network evaluations" in result.stdout, result.stderr
        bits[batch_size] = json.loads(out.read_text())["each"]
        assert json.loads(out.read_text())["settings"]["precision"] == "fp32"
    assert list(bits[1]) == ["0", "1", "2", "3", "4", "30"]
    assert list(bits[1].values()) == pytest.approx(list(bits[6].values()), abs=1e-4)
    assert len({round(value, 6) for value in bits[1].values()}) == 6
    rounded = tmp_path / "rounded.json"
    assert lfm(*common, "--out", rounded, "--precision", "bf16").exit_code == 0
    content = json.loads(rounded.read_text())
    assert content["settings"]["precision"] == "bf16"
    assert content["each"] != bits[6]
    assert list(content["each"].values()) == pytest.approx(list(bits[6].values()), rel=0.05)
    assert lfm(*common, "--dry-run").exit_code == 0
    assert_one_line(lfm(*common, "--estimator", "x"), "--estimator x: unknown; one of hutchinson, exact")
    assert_one_line(lfm("likelihood", tmp_path, small_set.latents, "--rows", 40), "--rows 40: out of range")
    assert_one_line(
        lfm("likelihood", tmp_path, small_set.latents, "--rows", 40, "--dry-run"), "--rows 40: out of range"
    )
    assert_one_line(lfm("likelihood", tmp_path, small_set.raw), "holds raw shards")
    assert_one_line(lfm(*common, "--out", tmp_path), "--out", "is a folder")
    assert_one_line(lfm("likelihood", tasks.runs / "inpaint", small_set.latents), "no masks")
