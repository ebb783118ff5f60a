"""TensorBoard and W&B during a training: what they wrote is read back from their files."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import REPOSITORY
from tests.support.training_runs import train

pytest.importorskip("tensorboard", reason="the extra monitors is not installed")
pytest.importorskip("wandb", reason="the extra monitors is not installed")

STEPS = [40, 80]  # samples seen at the validations


def tensorboard_run(folder: Path) -> Any:
    """Read the event files of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
        return run.Reload()


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Read the rows of an offline run of W&B; nested keys are joined by dots."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, rows = DataStore(), []
    store.open_for_scan(str(file))
    while data := store.scan_data():
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    store.close()
    return rows


@pytest.mark.slow
def test_tensorboard_and_wandb_get_figures_and_previews(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the JSON of the page on training."""
    (settings,) = re.findall(r"```json\n(.*?)```", (REPOSITORY / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "monitors.json").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    shorter = ("train.num_steps=10", "train.log_every=5", "train.validate_every=5", "data.held_back=1")
    result = train(experiment, *shorter, f"deepspeed={tmp_path / 'monitors.json'}")
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    previews = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "run" / "previews").iterdir())]
    assert [line["samples_seen"] for line in log] == STEPS and len(previews) == 2

    board = tensorboard_run(tmp_path / "runs" / "tensorboard" / "mine")
    for name in ("loss", "loss_velocity", "validation_loss", "learning_rate"):
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == STEPS
        assert [event.value for event in events] == pytest.approx([line[name] for line in log])
    images = board.Images("train/preview")
    assert [image.step for image in images] == STEPS
    for image, preview in zip(images, previews, strict=True):
        (tmp_path / "read.png").write_bytes(image.encoded_image_string)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "read.png")), preview)

    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    rows = {row["_step"]: row for row in wandb_history(file)}
    for line, preview in zip(log, previews, strict=True):
        row = rows[line["samples_seen"]]
        assert row["train/validation_loss"] == pytest.approx(line["validation_loss"])
        assert row["train/loss"] == pytest.approx(line["loss"])
        shown = row.get("train/preview") or {
            key.removeprefix("train/preview."): value for key, value in row.items() if key.startswith("train/preview.")
        }
        assert np.array_equal(np.asarray(Image.open(run / "files" / shown["path"])), preview)


@pytest.mark.slow
def test_wandb_without_an_account_is_one_line(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"zero_optimization": {"stage": 1}, "wandb": {"enabled": True}}
    (tmp_path / "monitors.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    result = train(experiment, f"deepspeed={tmp_path / 'monitors.json'}")
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "No API key configured" in line and "WANDB_MODE=offline" in line
