"""Classes, the null class, and who may be guided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.conditioning import check_class_index, class_condition, drop_class, null_condition
from lfm.errors import ConfigError
from lfm.types import Condition


@given(rows=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=20))
def test_dropped_rows_get_the_null_class_and_others_keep_theirs(rows: list[tuple[int, bool]]) -> None:
    classes, dropped = (torch.tensor(column) for column in zip(*rows, strict=True))
    result = drop_class(classes, dropped, num_classes=10)
    assert result.dtype == torch.int64
    assert result.tolist() == [10 if drop else index for index, drop in rows]


def test_a_condition_of_classes_is_int64() -> None:
    condition = class_condition([0, 3, 9], 10)
    assert condition.class_index is not None and condition.class_index.dtype == torch.int64
    assert condition.class_index.tolist() == [0, 3, 9] and condition.spatial is None


@pytest.mark.parametrize("index", [-1, 10, 12])
def test_an_index_that_is_no_class_is_named(index: int) -> None:
    with pytest.raises(ConfigError, match=f"^class index {index}: the model knows classes 0 to 9$"):
        class_condition([3, index], 10)
    with pytest.raises(ConfigError, match=f"class index {index}"):
        check_class_index(torch.tensor([index]), 10)


def test_a_class_for_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained without classes"):
        class_condition([1], None)


def test_the_null_condition_changes_the_class_alone() -> None:
    condition = Condition(torch.tensor([1, 2]), torch.ones(2, 1, 4, 4))
    null = null_condition(condition, num_classes=10, class_dropout=0.1)
    assert null.class_index is not None and null.class_index.tolist() == [10, 10]
    assert null.spatial is condition.spatial
    assert condition.class_index is not None and condition.class_index.tolist() == [1, 2]


def test_guidance_without_label_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="class_dropout 0: use guidance scale 1"):
        null_condition(Condition(torch.tensor([1])), num_classes=10, class_dropout=0.0)


def test_guidance_of_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="class-conditional"):
        null_condition(Condition(), num_classes=None, class_dropout=0.0)
