"""The JSON schema of an experiment's YAML file, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from lfm.models.registry import BACKBONES
from pipelines.common.experiment.config_schema import ExperimentConfig
from pipelines.common.options import field_descriptions


def json_schema() -> dict[str, Any]:
    """Return the schema. No key is required in it, since a file may extend another one that has it."""
    schema = ExperimentConfig.model_json_schema()
    names = {"type": "array", "items": {"type": "string"}}
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, names],
        "description": "File or files, relative to this one, whose keys this file adds to or replaces.",
    }
    for options in (backbone.options for backbone in BACKBONES.values()):
        for key, text in field_descriptions(options).items():
            schema["$defs"][options.__name__]["properties"][key].setdefault("description", text)
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lfm experiment", **schema}
