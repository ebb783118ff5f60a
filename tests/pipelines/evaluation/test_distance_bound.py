"""Tests of `lfm evaluate --bound`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lfm.weights_file import WEIGHTS, load_weights, save_weights
from tests.support.commands import SmallSet, Tasks, assert_one_line, lfm
from tests.support.images import random_images


def test_the_command_writes_every_term_with_its_error(weights: Path, small_set: SmallSet, tmp_path: Path) -> None:
    command = ("evaluate", weights, "--bound", small_set.raw, "--autoencoder", small_set.autoencoder, "--out", tmp_path)
    result = lfm(*command)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "bound.json").read_text())
    terms = report["terms"]
    assert (terms["reconstruction"]["kind"], terms["decoder"]["kind"]) == ("unbiased", "lower")
    assert {term["kind"] for term in terms["error"]} == {"upper"}
    assert {term["kind"] for term in terms["velocity"]} == {"lower"}
    assert len(terms["error"]) == 10 and all(term["standard_error"] > 0 for term in terms["error"])
    assert report["bound"]["by_time"] > terms["reconstruction"]["value"]
    assert report["settings"]["num"] == 40
    tensors, header = load_weights(str(weights))
    in_bf16 = dataclasses.replace(header, config={"train": {"precision": "bf16"}})
    save_weights(str(weights / WEIGHTS), tensors, in_bf16)
    assert lfm(*command).exit_code == 0
    assert json.loads((tmp_path / "bound.json").read_text())["terms"] == terms, "always computed in float32"
    assert_one_line(lfm(*command, "--metrics", "kid"), "--metrics", "--bound")


@pytest.mark.parametrize("task", ["none", "inpaint", "semantic", "both"])
def test_models_of_every_task_have_a_bound(tasks: Tasks, tmp_path: Path, task: str) -> None:
    options = ("--bound", tasks.raw, "--autoencoder", tasks.autoencoder, "--out", tmp_path)
    assert lfm("evaluate", tasks.runs / task, *options).exit_code == 0
    assert json.loads((tmp_path / "bound.json").read_text())["bound"]["by_time"] > 0


def test_images_without_the_models_conditions_are_refused(
    weights: Path, small_set: SmallSet, tasks: Tasks, tmp_path: Path
) -> None:
    options = ("--bound", small_set.raw, "--autoencoder", tasks.autoencoder, "--out", tmp_path)
    assert_one_line(lfm("evaluate", tasks.runs / "inpaint", *options), "--bound", "takes mask")
    options = ("--bound", random_images(tmp_path / "images"), "--autoencoder", tasks.autoencoder, "--out", tmp_path)
    assert_one_line(lfm("evaluate", weights, *options), "000: has no class_index")
