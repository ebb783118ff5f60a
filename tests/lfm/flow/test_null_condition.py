"""Tests of conditions, their dropout, and the null condition of guidance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.errors import ConfigError
from lfm.flow.null_condition import check_class_index, class_condition, drop_condition, null_condition
from lfm.types import Condition


def everything(rows: int) -> Condition:
    """Return a condition with all fields, none of them null."""
    return Condition(
        torch.arange(rows) % 10, torch.rand(rows, 3, 4, 4) + 2, torch.arange(rows)[:, None, None].expand(-1, 8, 8) % 5
    )


@given(dropped=st.lists(st.booleans(), min_size=1, max_size=20))
def test_dropped_rows_get_the_null_condition_and_others_do_not_change(dropped: list[bool]) -> None:
    before = everything(len(dropped))
    after = drop_condition(before, torch.tensor(dropped), num_classes=10, num_labels=5)
    empty = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 4, 4)  # no mean, and all is missing
    for row, drop in enumerate(dropped):
        one, other = before.rows(torch.tensor(row)), after.rows(torch.tensor(row))
        for name, null in (
            ("class_index", torch.tensor(10)),
            ("spatial", empty),
            ("segmentation", torch.full((8, 8), 5)),
        ):
            was, now = getattr(one, name), getattr(other, name)
            assert now.dtype == was.dtype and torch.equal(now, null if drop else was)


@given(rows=st.integers(1, 5), parts=st.sets(st.sampled_from(["class_index", "spatial", "segmentation"]), min_size=1))
def test_the_null_condition_has_the_fields_of_the_condition(rows: int, parts: set[str]) -> None:
    full = everything(rows)
    condition = Condition(**{name: getattr(full, name) for name in parts})
    null = null_condition(condition, 0.1, num_classes=10, num_labels=5)
    assert {name for name in ("class_index", "spatial", "segmentation") if getattr(null, name) is not None} == parts
    again = null_condition(null, 0.1, num_classes=10, num_labels=5)
    for name in parts:
        assert not torch.equal(getattr(null, name), getattr(condition, name))
        assert torch.equal(getattr(again, name), getattr(null, name))


def test_a_condition_of_classes_is_int64() -> None:
    condition = class_condition([0, 3, 9], 10)
    assert condition.class_index is not None and condition.class_index.dtype == torch.int64
    assert condition.class_index.tolist() == [0, 3, 9] and condition.spatial is None


@pytest.mark.parametrize("index", [-1, 10, 12])
def test_an_index_that_is_not_a_class_is_refused_by_name(index: int) -> None:
    with pytest.raises(ConfigError, match=f"^`class_index` {index}: the model knows classes 0 to 9$"):
        class_condition([3, index], 10)
    with pytest.raises(ConfigError, match=f"`class_index` {index}"):
        check_class_index(torch.tensor([index]), 10)


def test_a_class_for_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained without classes"):
        class_condition([1], None)


@pytest.mark.parametrize("name", ["class_index", "spatial", "segmentation"])
def test_guidance_without_dropout_is_refused_for_every_task(name: str) -> None:
    with pytest.raises(ConfigError, match="condition_dropout 0; set it to 1"):
        null_condition(Condition(**{name: getattr(everything(2), name)}), 0.0, num_classes=10, num_labels=5)


def test_guidance_of_a_model_without_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="conditional"):
        null_condition(Condition(), 0.0)
