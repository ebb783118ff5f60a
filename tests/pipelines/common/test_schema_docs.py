"""Every key of the experiment schema is documented."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from pipelines.common.experiment import config_schema, data_section

SECTIONS = [
    config_schema.ExperimentConfig,
    data_section.SourceConfig,
    data_section.StageConfig,
    data_section.DataConfig,
    config_schema.FlowConfig,
    config_schema.TrainConfig,
    config_schema.EvaluationConfig,
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_a_docstring(section: type[BaseModel]) -> None:
    missing = [name for name, field in section.model_fields.items() if not field.description]
    assert not missing
    assert (section.__doc__ or "").endswith(".")
