"""What `--dry-run` says that a training will take."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from lfm.world import World
from pipelines.common.experiment import config_file
from pipelines.training import forecast
from pipelines.training import train as stage
from pipelines.training.forecast import logged_rate
from pipelines.training.training_log import LOG
from tests.support.commands import assert_one_line, lfm
from tests.support.training_runs import plan, train, zero


def bytes_of(text: str, name: str) -> float:
    """Return the size that follows a name in a plan, in bytes."""
    found = re.search(rf"{name}:? ([\d.e+]+) (GB|MB)", text)
    assert found, f"{name} in {text}"
    return float(found[1]) * {"GB": 1e9, "MB": 1e6}[found[2]]


def test_a_dry_run_forecasts_the_memory_by_part(experiment: Path) -> None:
    model = ("model.hidden_size=512", "model.depth=4")
    one, four = (plan(experiment, *model, options=("--ranks", number)).stdout for number in (1, 4))
    assert "memory of the rank, forecast:" in one and "memory of the largest of 4 ranks, forecast:" in four
    for name in ("masters", "moments", "averages"):
        assert bytes_of(four, name) == pytest.approx(bytes_of(one, name) / 4, rel=0.01)
    assert bytes_of(four, "weights") == bytes_of(one, "weights")
    assert bytes_of(one, "process") == pytest.approx(0.508e9)
    assert bytes_of(one, "activations:") > bytes_of(one, "as configured,")
    sharded = plan(experiment, *model, zero(3), options=("--ranks", "4")).stdout
    assert bytes_of(sharded, "weights") == pytest.approx(bytes_of(one, "weights") / 4, rel=0.01)


def test_the_part_that_is_trained_decides_the_state(experiment: Path, weights: Path) -> None:
    settings = ("train.trainable=[adapters]", "model.depth=1", "model.frequency_shift=0")
    part = plan(experiment, *settings, options=("--initialize-from", weights))
    assert part.exit_code == 0, part.output
    whole = plan(experiment, "model.depth=1").stdout
    assert bytes_of(part.stdout, "masters") < 0.5 * bytes_of(whole, "masters")
    assert bytes_of(part.stdout, "checkpoint copy") < 0.5 * bytes_of(whole, "checkpoint copy")


def test_lfm_train_plans_for_the_processes_that_it_would_start(experiment: Path) -> None:
    planned = lfm("train", "--config", experiment, "--dry-run", "--num-gpus", "2")
    assert "on 2 ranks, ZeRO 1" in planned.stdout
    assert_one_line(lfm("train", "--config", experiment, "--dry-run", "--num-gpus", "3"), "3 ranks")
    assert_one_line(lfm("train", "--config", experiment, "--ranks", "2", "--num-gpus", "1"), "--ranks", "--dry-run")
    assert_one_line(lfm("train", "--config", experiment, "--rate", "2", "--num-gpus", "1"), "--rate", "--dry-run")


def hours_of(text: str) -> float:
    found = re.search(r"time, forecast: ([\d.e+-]+) h", text)
    assert found, text
    return float(found[1])


def test_the_hours_are_those_of_the_given_rate(experiment: Path) -> None:
    text = plan(experiment, "train.num_steps=9000").stdout
    assert "72,000 samples at 100 samples/s (given)" in text
    assert hours_of(text) == pytest.approx(72_000 / 100 / 3600, rel=0.01)


def test_the_rate_is_measured_by_passes_of_the_network(experiment: Path) -> None:
    text = stage.run(config_file.load(str(experiment)), World(), dry_run=True).plan
    rate = re.search(r"at ([\d,.e+]+) samples/s \(passes on this device", text)
    assert rate and hours_of(text) == pytest.approx(160 / float(rate[1].replace(",", "")) / 3600, rel=0.05)


def test_a_network_that_the_gpu_cannot_hold_has_no_rate(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(forecast, "measured_rate", fail)
    text = stage.run(config_file.load(str(experiment)), World(), dry_run=True).plan
    assert "time: unknown" in text and "memory of the rank, forecast" in text


@pytest.mark.slow
def test_the_disk_space_is_that_of_the_run_and_a_resumed_run_has_a_rate(experiment: Path, tmp_path: Path) -> None:
    settings = ("model.hidden_size=128", "model.depth=8", "train.ema_sigma_rel=[0.1,0.2]", "train.ema_snapshots=3")
    settings += ("train.num_steps=6", "train.checkpoint_every=2", "train.warmup_steps=0")
    result = train(experiment, *settings)
    assert result.returncode == 0, result.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    resumed = plan(experiment, *settings, "train.num_steps=12", options=("--allow-changes",)).stdout
    assert bytes_of(resumed, "disk of the run, forecast") == pytest.approx(size, rel=0.05)
    config = config_file.load(str(experiment), (*settings, "train.num_steps=12"))
    text = stage.run(config, World(), dry_run=True, allow_changes=True).plan
    rate = logged_rate(tmp_path / "run")
    assert rate and "for 48 samples at" in text and "(of the run so far)" in text
    assert hours_of(text) == pytest.approx(48 / rate / 3600, rel=0.02)


def test_the_rate_of_a_run_is_that_of_its_last_lines(tmp_path: Path) -> None:
    assert logged_rate(tmp_path) is None
    lines = [json.dumps({"goodput": rate}) for rate in (1000.0, *[10.0, 30.0] * 50)]
    (tmp_path / LOG).write_text("\n".join([*lines, '{"good']))
    assert math.isclose(logged_rate(tmp_path) or 0, 15, rel_tol=0.02)
