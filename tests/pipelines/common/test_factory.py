"""What the factory decides by the machine."""

from __future__ import annotations

import shutil

import pytest
import torch

from pipelines.common import config_schema, factory
from tests.support.commands import REPOSITORY


@pytest.mark.parametrize(
    ("key", "cuda", "compiler", "expected"),
    [
        (None, False, True, False),
        (None, True, True, True),
        (None, True, False, False),
        (False, True, True, False),
        (True, False, False, True),
    ],
)
def test_blocks_are_compiled_by_default_on_a_gpu_with_a_c_compiler(
    key: bool | None, cuda: bool, compiler: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    overrides = () if key is None else (f"model.compile={str(key).lower()}",)
    config = config_schema.load(str(REPOSITORY / "configs" / "demo.yaml"), overrides)
    assert factory.compiles_blocks(config) is expected
