"""`lfm compare`: paired runs, their report, and the mistakes that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.comparison import comparison_report
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, lfm
from tests.support.training_runs import YAML


@pytest.fixture
def configs(small_set: SmallSet, tmp_path: Path) -> tuple[Path, Path]:
    """An experiment that is validated, and one with a higher learning rate."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    deepspeed = REPOSITORY / "configs" / "deepspeed"
    first.write_text(YAML.format(run=tmp_path / "unused", latents=small_set.latents, deepspeed=deepspeed))
    second.write_text("extends: first.yaml\ntrain: {learning_rate: 4.0e-3}\n")
    return first, second


MEASURED = ("--set", "train.validate_every=2", "--set", "data.held_back=1", "--set", "train.num_steps=6")


@pytest.mark.slow
def test_two_configurations_are_trained_in_pairs_and_compared(configs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", *configs, "--out", out, "--seeds", 2, "--jobs", 2, "--num-gpus", 1, *MEASURED)
    result = lfm(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "compare.json").read_text())
    assert report["metrics"] == ["validation_loss"] and report["seeds"] == 2
    first, second = report["configurations"]
    assert first["seeds"] == second["seeds"] == [0, 1] and second["not_paired"] is None
    assert first["validation_loss"]["difference"] is None
    pairs = zip(first["validation_loss"]["final"], second["validation_loss"]["final"], strict=True)
    assert second["validation_loss"]["difference"]["values"] == pytest.approx([b - a for a, b in pairs])
    assert first["training_flops"] == second["training_flops"] > 0
    assert all(len(curve["samples"]) == 3 for curve in second["validation_loss"]["curves"])
    assert (out / "compare.png").stat().st_size > 10_000 and "validation_loss" in (out / "compare.txt").read_text()

    # What is trained is not trained again, and another configuration does not fit the runs.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert lfm(*arguments).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert_one_line(lfm(*arguments, "--set", "train.ema_decay=0.5"), "train.ema_decay 0.99, now 0.5", "--out")


def test_the_plan_says_which_runs_are_pairs(configs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other_draws.yaml"
    other.write_text("extends: first.yaml\ntrain: {seed: 10}\n")
    for key, value in (("where", "width > 1"), ("balance", "0.5")):
        (tmp_path / f"other_{key}.yaml").write_text(f"extends: first.yaml\ndata: {{{key}: {value}}}\n")
    others = other, tmp_path / "other_where.yaml", tmp_path / "other_balance.yaml"
    result = lfm("compare", *configs, *others, "--out", tmp_path / "out", "--dry-run", *MEASURED)
    assert result.exit_code == 0, result.output
    assert "second: seeds 0, 1, 2; 6 steps of 8; paired with the first" in result.output
    assert "other_draws: seeds 10, 11, 12; 6 steps of 8; not paired: train.seed differs" in result.output
    for key in ("where", "balance"):
        assert f"other_{key}: seeds 0, 1, 2; 6 steps of 8; not paired: data.{key} differs" in result.output
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_anything_is_trained(configs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = configs
    out = ("--out", tmp_path / "out")
    assert_one_line(lfm("compare", first, second, *out), "first.yaml", "measures nothing", "train.validate_every")
    assert_one_line(lfm("compare", first, first, *out, *MEASURED), "two files are called first")
    assert_one_line(lfm("compare", first, tmp_path / "none.yaml", *out, *MEASURED), "none.yaml")
    assert_one_line(lfm("compare", first, *out, "--set", "train.steps=3"), "train.steps")


@pytest.mark.slow
def test_a_training_that_fails_is_named_with_its_message(configs: tuple[Path, Path], tmp_path: Path) -> None:
    configs[1].write_text("extends: first.yaml\ndata: {shards: nowhere}\n")
    result = lfm("compare", *configs, "--out", tmp_path / "out", "--seeds", 1, "--num-gpus", 1, *MEASURED)
    assert_one_line(result, "second, seed 0: nowhere", "output.txt", "run the same command to resume")


def test_seconds_count_all_time() -> None:
    """In logs of before, the only rate counted all time."""
    log = [
        {"samples_seen": 8, "samples_per_second": 4.0, "validation_loss": 2.0},
        {"samples_seen": 16, "samples_per_second": 8.0, "goodput": 2.0, "validation_loss": 1.0},
    ]
    by_samples, by_seconds = comparison_report._curves("validation_loss", log)
    assert by_samples == [(8.0, 2.0), (16.0, 1.0)] and by_seconds == [(2.0, 2.0), (6.0, 1.0)]
