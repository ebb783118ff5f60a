"""Which weights are the best so far."""

from __future__ import annotations

from typing import Any

from pipelines.common.config_schema import EvaluationConfig
from pipelines.training.best_weights import BestWeights

SETTINGS: dict[str, Any] = {"reference": "r.safetensors", "every": 5}


def selection(**changes: Any) -> BestWeights:
    found = object.__new__(BestWeights)
    found.evaluation, found.name, found.best = EvaluationConfig(**SETTINGS | changes), "fd-lite", {}
    return found


def test_a_nearer_distance_is_the_best_and_an_equal_one_is_not() -> None:
    chosen = selection()
    assert [chosen.is_best(distance, 10 * (number + 1)) for number, distance in enumerate((3.0, 2.0, 2.0, 2.5, 1.0))] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert chosen.best["fd-lite"] == 1.0 and chosen.best["samples_seen"] == 50


def test_a_record_of_the_future_or_of_another_measure_does_not_count() -> None:
    chosen = selection()
    assert chosen.is_best(1.0, 100)
    again = selection(every=7)
    again.best = dict(chosen.best)
    assert not again.is_best(2.0, 101), "how often it is measured changes no distance"
    assert again.is_best(2.0, 100), "a run that was killed after 100 measures at 100 again"
    for change in ({"num": 2000}, {"guidance_scale": 1.5}, {"reference": "other.safetensors"}):
        other = selection(**change)
        other.best = dict(chosen.best)
        assert other.is_best(2.0, 101), change
