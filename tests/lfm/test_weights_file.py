"""Tests of weights files: what was saved is loaded, and anything else is refused by one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm import storage
from lfm.errors import CheckpointError
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import WEIGHTS, WeightsHeader, load_header, load_weights, save_weights
from tests.support.models import WEIGHTS_HEADER

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(float("nan")), "t": torch.ones(4, 3).t()}


def saved(folder: Path, header: WeightsHeader = WEIGHTS_HEADER) -> Path:
    save_weights(str(folder / WEIGHTS), TENSORS, header)
    return folder / WEIGHTS


@settings(max_examples=20, deadline=None)
@given(
    samples_seen=st.integers(0, 2**62),
    scale=st.floats(1e-9, 1e6),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    dropout=st.floats(0, 0.9),
)
def test_a_header_survives_its_json(samples_seen: int, scale: float, name: str, dropout: float) -> None:
    record = WEIGHTS_HEADER.autoencoder.model_copy(update={"scale_factor": scale, "name": name})
    model = DiTConfig(4, 8, 2, 32, 1, 2, num_classes=2, condition_dropout=dropout)
    header = dataclasses.replace(WEIGHTS_HEADER, samples_seen=samples_seen, autoencoder=record, model=model)
    assert "\n" not in header.to_json()
    assert WeightsHeader.from_json(header.to_json()) == header


def test_weights_survive_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for place in (path, tmp_path):
        tensors, header = load_weights(str(place))
        assert header == load_header(str(place)) == WEIGHTS_HEADER
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, TENSORS[name], equal_nan=True, atol=0, rtol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == [WEIGHTS]


def test_weights_are_as_readable_as_any_file(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    assert saved(tmp_path).stat().st_mode & 0o777 == 0o666 & ~umask


def test_weights_truncated_anywhere_are_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(content), 53), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            load_weights(str(path))
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        try:
            assert load_header(str(path)) == WEIGHTS_HEADER  # the end of the file is not looked at
        except CheckpointError as own_error:
            assert str(own_error).startswith(str(path)) and "\n" not in str(own_error)


@pytest.mark.parametrize("load", [load_weights, load_header])
def test_weights_that_are_missing_or_not_ours_are_one_line(tmp_path: Path, load: Callable[[str], object]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").touch()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for name, message in (
        ("", "contains no weights.safetensors; train first"),
        ("nowhere", "no such file or folder; name a run folder"),
        ("x.safetensors", "no such file or folder; name a run folder"),
        ("file", "is no weights file; "),
        ("shards", "contains no weights.safetensors, but shards; "),
        ("begun", "contains no weights.safetensors yet: training writes it with its first checkpoint"),
    ):
        place = tmp_path / name
        with pytest.raises(CheckpointError, match=f"^{place}: {message}"):
            load(str(place))
    save_file(TENSORS | {"t": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="no lfm header"):
        load(str(tmp_path))
    (tmp_path / WEIGHTS).write_text("this is a text and no weights file")
    with pytest.raises(CheckpointError):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content.pop("image_size"),
        lambda content: content.update(unknown=1),
        lambda content: content["model"].update(unknown=1),
        lambda content: content["model"].update(hidden_size=33),
        lambda content: content["model"].update(backbone="other"),
        lambda content: content["autoencoder"].pop("content_hash"),
        lambda content: content["autoencoder"].update(scale_factor="x"),
        lambda content: content.update(classes=[{"index": 0}]),
    ],
    ids=[
        "no model",
        "no image size",
        "unknown key",
        "unknown model key",
        "wrong model",
        "unknown backbone",
        "no hash",
        "text",
        "no name",
    ],
)
def test_a_header_of_another_version_is_one_line_naming_the_file(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    content = json.loads(WEIGHTS_HEADER.to_json())
    change(content)
    path = tmp_path / WEIGHTS
    save_file({"a": torch.ones(1)}, path, {"lfm": json.dumps(content)})
    for load in (load_weights, load_header):
        with pytest.raises(CheckpointError) as error:
            load(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", '{"model": 3}'])
def test_a_header_that_is_no_header_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / WEIGHTS
    save_file({"a": torch.ones(1)}, path, {"lfm": text})
    for load in (load_weights, load_header):
        with pytest.raises(CheckpointError) as error:
            load(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_header_without_a_backbone_is_of_the_dit() -> None:
    """Weights files from before there was more than one backbone do not name it."""
    content = json.loads(WEIGHTS_HEADER.to_json())
    assert content["model"].pop("backbone") == "dit"
    assert WeightsHeader.from_json(json.dumps(content)) == WEIGHTS_HEADER


def test_weights_are_read_from_a_url(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    storage.write_bytes(f"{url}/{WEIGHTS}", saved(tmp_path).read_bytes())
    tensors, header = load_weights(url)
    assert header == WEIGHTS_HEADER and tensors.keys() == TENSORS.keys()
    assert load_header(url) == WEIGHTS_HEADER
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, TENSORS[name], equal_nan=True, atol=0, rtol=0)
