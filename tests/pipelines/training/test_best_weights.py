"""Tests of the record of the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.common.experiment.config_schema import EvaluationConfig
from pipelines.training.measurement.best_weights import BestRecord


def open_record(folder: Path, **changes: Any) -> BestRecord:
    settings: dict[str, Any] = {"reference": "r.safetensors", "every": 5}
    return BestRecord(str(folder / "best.json"), "fd-lite", EvaluationConfig(**settings | changes))


def test_only_a_smaller_distance_is_the_best(tmp_path: Path) -> None:
    record = open_record(tmp_path)
    decisions = [record.update(distance, 10 * number) for number, distance in enumerate((3.0, 2.0, 2.0, 2.5, 1.0), 1)]
    assert decisions == [True, True, False, False, True]
    assert record.content["fd-lite"] == 1.0 and record.content["samples_seen"] == 50


def test_a_record_is_read_by_the_next_process(tmp_path: Path) -> None:
    record = open_record(tmp_path)
    record.update(1.0, 100)
    record.save()
    resumed = open_record(tmp_path, every=7)
    assert not resumed.update(2.0, 101), "the interval changes no distance"
    assert resumed.update(0.5, 101)


def test_a_record_of_samples_to_come_is_replaced(tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint measures the same weights again."""
    record = open_record(tmp_path)
    record.update(1.0, 100)
    record.save()
    assert open_record(tmp_path).update(2.0, 100)
    assert open_record(tmp_path).update(2.0, 60)


@pytest.mark.parametrize("change", [{"num": 2000}, {"guidance_scale": 1.5}, {"reference": "other.safetensors"}])
def test_a_record_of_another_measurement_is_replaced(tmp_path: Path, change: dict[str, Any]) -> None:
    record = open_record(tmp_path)
    record.update(1.0, 100)
    record.save()
    assert open_record(tmp_path, **change).update(2.0, 101)


@pytest.mark.parametrize("content", ["[]", "{}", '{"fd-lite": 0.1}'])
def test_an_incomplete_record_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "best.json").write_text(content)
    assert open_record(tmp_path).update(2.0, 10)
