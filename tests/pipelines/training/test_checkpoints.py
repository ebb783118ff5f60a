"""Tests of checkpoints on a slow disk and on a full one: training goes on while they are written."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import slow_disk
from tests.support.commands import finish, start_ranks
from tests.support.training_runs import assert_same_weights, losses, train, zero


def start_on_slow_disk(
    config: Path, *overrides: str, seconds: float = 0.0, full_from: int = 0, ranks: int = 1
) -> list[subprocess.Popen[str]]:
    settings = [part for override in overrides for part in ("--set", override)]
    return start_ranks([sys.executable, slow_disk.__file__, seconds, full_from, "--config", config, *settings], ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_training_goes_on_while_a_checkpoint_is_written(
    experiment: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    settings = (zero(stage), "train.num_steps=60", "train.checkpoint_every=30")
    seconds = 2.0
    result = finish(start_on_slow_disk(experiment, *settings, seconds=seconds, ranks=ranks))
    assert result.returncode == 0, result.stderr
    published = re.findall(r"published samples-(\d+) (\d+)", result.stdout)
    assert [int(samples) for samples, _ in published] == [240, 480]
    steps = int(published[0][1]) - 30
    line = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][30]
    stall = 8 / line["goodput"] - 8 / line["samples_per_second"]
    print(f"{steps} steps while a checkpoint was written in {seconds} s, which stopped training for {stall:.3f} s")
    assert steps >= 10 and stall < seconds / 2
    assert train(experiment, f"run={tmp_path / 'fast'}", *settings, ranks=ranks).returncode == 0
    assert_same_weights(tmp_path / "run", tmp_path / "fast")
    for path in (tmp_path / "fast" / "checkpoints" / "samples-000000000240").glob("*-0*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "fast")).read_bytes(), path.name


@pytest.mark.slow
def test_a_run_killed_between_copy_and_publication_resumes_from_the_checkpoint_before(
    experiment: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    processes = start_on_slow_disk(experiment, seconds=5.0, ranks=2)
    while not (log.exists() and len(log.read_text().splitlines()) >= 12) and processes[0].poll() is None:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [path.name for path in (run / "checkpoints").glob("samples-*")] == ["samples-000000000040"]
    (run / "weights.safetensors").write_bytes(bytes(100))
    result = train(experiment, ranks=2)
    assert "weights.safetensors: " in result.stderr and "taken from samples-000000000040" in result.stderr
    assert result.returncode == 0 and "from samples-000000000040" in result.stdout, result.stderr
    assert train(experiment, f"run={tmp_path / 'whole'}", ranks=2).returncode == 0
    assert_same_weights(run, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "steps"), [(1, 1000), (2, 1000), (2, 10)])
def test_a_full_disk_ends_training_with_one_line(experiment: Path, tmp_path: Path, ranks: int, steps: int) -> None:
    """At a later step, or at the end of training."""
    settings = ("train.checkpoint_every=5", f"train.num_steps={steps}")
    processes = start_on_slow_disk(experiment, *settings, full_from=80, ranks=ranks)
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(errors) == 1 and "No space left on device" in errors[0], stderr
        assert "Traceback" not in stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("samples-*")] == ["samples-000000000040"]
    assert len(losses(tmp_path / "run")) < 50
