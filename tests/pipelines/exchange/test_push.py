"""Tests of `lfm push` and of hf:// URLs, by processes of their own, against a fake of the Hub's HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lfm as library
from lfm.autoencoder import import_diffusers
from lfm.data.versions import Segment, SourceState
from lfm.weights_file import WEIGHTS, SourceRecord, load_weights, save_weights
from tests.support.commands import REPOSITORY, Tasks, assert_one_line, lfm
from tests.support.hub import FakeHub
from tests.support.training_runs import train

LOAD = """
import sys, numpy, lfm
samples = lfm.load(sys.argv[1]).sample([3, 5], class_index=[1, 2], num_steps=2)
numpy.save(sys.argv[2], samples.images)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


def process(hub: FakeHub, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the Hub's environment and an empty cache at `home`."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        **hub.environment(home),
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)


def lfm_process(hub: FakeHub, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return process(hub, home, "-m", "pipelines.cli.main", *arguments, **environment)


def assert_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert exit code 2 and one line without a traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.slow
def test_a_run_is_pushed_and_loaded_by_another_process(hub: FakeHub, experiment: Path, tmp_path: Path) -> None:
    """With a card, whose commands and numbers are those of the run; a second load needs no network."""
    run = tmp_path / "run"
    settings = ("licence=cc-by-4.0", "model.frequency_shift=1", "train.log_every=10")
    assert train(experiment, *settings).returncode == 0
    pushed = lfm_process(hub, tmp_path / "home", "push", run, "me/scenes", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert "licence cc-by-4.0 -> https://huggingface.co/me/scenes" in pushed.stdout and "note" not in pushed.stdout
    files = hub.repositories["me/scenes"]
    assert "me/scenes" in hub.private
    assert {
        WEIGHTS,
        "config.json",
        "README.md",
        "samples.png",
        "loss.png",
        "diffusers/model_index.json",
    } <= files.keys()
    card = files["README.md"].decode()
    for part in ("license: cc-by-4.0", "library_name: lfm", "crescent (", "160", "hf://me/scenes"):
        assert part in card, card
    assert json.loads(files["config.json"])["train"]["num_steps"] == 20

    for number, environment in enumerate(({}, {"HF_HUB_OFFLINE": "1"})):
        num_requests = len(hub.requests)
        out = tmp_path / f"images-{number}.npy"
        loaded = process(hub, tmp_path / "other", "-c", LOAD, "hf://me/scenes", out, **environment)
        assert loaded.returncode == 0, loaded.stderr
        images = library.load(str(run)).sample([3, 5], class_index=[1, 2], num_steps=2).images
        np.testing.assert_array_equal(np.load(out), images)
        assert (len(hub.requests) == num_requests) == bool(environment)

    for name, content in files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with Image.open(tmp_path / "downloaded" / "samples.png") as image:
        assert image.width > 4 * 64
    pipeline = import_diffusers().DiffusionPipeline.from_pretrained(tmp_path / "downloaded" / "diffusers")
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_mistakes_are_one_line(hub: FakeHub, weights: Path, tmp_path: Path) -> None:
    home, push = tmp_path / "home", ("push", weights, "me/mistakes", "--num-samples", 0)
    assert_error(lfm_process(hub, home, *push, HF_TOKEN="hf_wrong"), "me/mistakes", "hf auth login")
    assert_error(lfm_process(hub, home, *push, "--revision", "none"), "has no branch none")
    sample = ("--out", tmp_path / "out", "--seeds", "0-1")
    assert_error(lfm_process(hub, home, "sample", "hf://me/nothing", *sample), "hf://me/nothing: no such repository")
    hub.repositories["me/empty"] = {}
    assert_error(lfm_process(hub, home, "sample", "hf://me/empty", *sample), "contains no weights.safetensors")
    assert_error(lfm_process(hub, home, "sample", "hf://me/empty@v2", *sample), "hf://me/empty: has no revision v2")
    offline = lfm_process(hub, home, "sample", "hf://me/other", *sample, HF_HUB_OFFLINE="1")
    assert_error(offline, "is not in the cache, and the Hub cannot be reached")
    unreachable = lfm_process(hub, home, *push, HF_ENDPOINT="http://127.0.0.1:9")
    assert_error(unreachable, "me/mistakes: cannot be pushed")


def test_a_folder_is_written_instead(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = lfm("push", weights, "me/mine", "--out", out, "--dry-run")
    assert dry.exit_code == 0 and "licence not stated" in dry.output and not out.exists()
    result = lfm("push", weights, "me/mine", "--out", out, "--num-samples", 2)
    assert result.exit_code == 0 and "the card states no licence; set --licence" in result.output, result.stderr
    assert {path.name for path in out.iterdir()} >= {WEIGHTS, "README.md", "samples.png"}
    assert_one_line(lfm("push", weights, "me/mine", "--out", out), "exists already")
    assert_one_line(lfm("push", weights, "mine", "--out", tmp_path / "other"), "REPOSITORY")


def test_the_card_names_source_and_licence(weights: Path, tmp_path: Path) -> None:
    """The licence of the source is carried on, and stands beside another one that the user states."""
    tensors, header = load_weights(str(weights))
    source = SourceRecord("hf://them/base@v1", "ab" * 32, 1000, "openrail")
    save_weights(str(weights / WEIGHTS), tensors, replace(header, initialized_from=source))
    for flags, licence in (((), "openrail"), (("--licence", "mit"), "mit")):
        out = tmp_path / licence
        assert lfm("push", weights, "me/mine", "--out", out, "--num-samples", 0, *flags).exit_code == 0
        card = (out / "README.md").read_text()
        assert f"license: {licence}" in card and "base_model: them/base" in card
        assert "Their licence: openrail" in card and "ab" * 32 in card


def test_the_card_lists_the_versions_of_data_that_grew(weights: Path, tmp_path: Path) -> None:
    """With the samples seen of each, and the flag that repeats them; a run of one version has neither."""
    tensors, header = load_weights(str(weights))
    states = [SourceState(digest=letter * 64, num_samples=size) for letter, size in (("a", 32), ("b", 40))]
    states.append(states[1].model_copy(update={"num_samples": 39, "num_drops": 1, "drops": "c"}))
    history = tuple(
        Segment(first_sample=first, sources=(state,)) for first, state in zip((0, 24, 40), states, strict=True)
    )
    for number, part in enumerate((history, history[:1])):
        config = {"data": {"shards": "x", "sources": []}}
        save_weights(str(weights / WEIGHTS), tensors, replace(header, data_history=part, config=config))
        assert load_weights(str(weights))[1].data_history == part
        out = tmp_path / str(number)
        result = lfm("push", weights, "me/mine", "--out", out, "--num-samples", 0)
        assert result.exit_code == 0, result.stderr
    card, of_one_version = ((tmp_path / name / "README.md").read_text() for name in ("0", "1"))
    for line in (
        f"| versions for samples seen 0 to 24 | latents `{'a' * 12}`, 32 samples |",
        f"| versions for samples seen 24 to 40 | latents `{'b' * 12}`, 40 samples |",
        f"| versions for samples seen 40 to 64 | latents `{'b' * 12}`, 39 samples, some withdrawn |",
        "--repeat-data weights.safetensors",
    ):
        assert line in card, card
    assert "versions" not in of_one_version and "--repeat-data" not in of_one_version


@pytest.mark.parametrize("task", ["none", "class", "inpaint", "semantic", "both"])
def test_every_task_has_a_card(tasks: Tasks, tmp_path: Path, task: str) -> None:
    out = tmp_path / "out"
    result = lfm("push", tasks.runs / task, "me/mine", "--out", out, "--num-samples", 2)
    assert result.exit_code == 0, result.stderr
    card = (out / "README.md").read_text()
    by_images = task in ("inpaint", "semantic", "both")
    assert ("image-to-image" in card) == by_images and (out / "samples.png").exists() != by_images
    loaded, _ = load_weights(str(out))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_weights(str(tasks.runs / task))[0].items())
