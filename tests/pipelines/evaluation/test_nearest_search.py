"""Tests of `lfm evaluate RUN --nearest LATENTS`: models whose images are copies of training samples, or are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import Tensor

from lfm.data import manifest as manifests
from lfm.data.versions import Segment, SourceState
from lfm.errors import ConfigError
from lfm.inference.trained_model import TrainedModel
from lfm.types import SolverResult
from lfm.weights_file import WEIGHTS, load_weights, save_weights
from lfm.world import World
from pipelines.evaluation import evaluate as stage
from pipelines.evaluation import nearest_search
from pipelines.evaluation.evaluation_options import EvaluateConfig
from pipelines.evaluation.latent_sets import MIRROR, LatentSet, open_latents
from tests.support.commands import ALONE, SmallSet, Tasks, assert_one_line
from tests.support.feature_networks import trust
from tests.support.feature_networks import trusting_lfm as lfm
from tests.support.growing_latents import first_version, grow
from tests.support.images import random_images

NUM = 12
SPACES = ("features", "latents")


@pytest.fixture
def run(weights: Path) -> Path:
    """A run that held back the last of the three shards, of 8 samples; the others hold 16 each."""
    tensors, header = load_weights(str(weights))
    save_weights(str(weights / WEIGHTS), tensors, dataclasses.replace(header, config={"data": {"held_back": 1}}))
    return weights


def training_latents(small_set: SmallSet, view: str = "latent.npy") -> Tensor:
    """Return the scaled means of the first two shards, float32 (32, 4, 8, 8)."""
    latents = LatentSet(str(small_set.latents), manifests.load(str(small_set.latents), "latents"))
    return torch.cat([latents.read(block, view) for block in range(2)])


def generate(monkeypatch: pytest.MonkeyPatch, latents: Tensor) -> None:
    """Let models generate these latents, the seed's row of them, with a little noise."""

    def solve(model: TrainedModel, seeds: Sequence[int], *_: Any, **options: Any) -> SolverResult:
        noise = torch.randn(len(seeds), *latents.shape[1:], generator=torch.Generator().manual_seed(seeds[0]))
        return SolverResult(latents[list(seeds)] + 1e-3 * noise, torch.ones(len(seeds), dtype=torch.int64))

    monkeypatch.setattr(TrainedModel, "solve", solve)


def config(run: Path, reference: Path, small_set: SmallSet, out: Path, **changes: Any) -> EvaluateConfig:
    settings = {"num": NUM, "num_steps": 1, "autoencoder": str(small_set.autoencoder)}
    settings |= {"nearest": str(small_set.latents)} | changes
    return EvaluateConfig((str(run),), (str(reference),), str(out), **trust(reference), **settings)


def evaluate(run: Path, reference: Path, small_set: SmallSet, out: Path, *options: object) -> Result:
    paths = ("--reference", reference, "--autoencoder", small_set.autoencoder, "--out", out)
    return lfm("evaluate", run, *paths, "--num", NUM, "--num-steps", 1, *options)


def row(out: Path) -> dict[str, Any]:
    """Read the only run's part of the report."""
    (row,) = json.loads((out / "report.json").read_text())["rows"]
    return row


@pytest.mark.parametrize("view", ["latent.npy", MIRROR])
def test_copies_of_training_samples_are_found(
    run: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    """Copies of samples 20 to 31 or of their mirror images, with the shards that the run itself held back."""
    generate(monkeypatch, training_latents(small_set, view)[20:])
    result = evaluate(run, reference, small_set, tmp_path, "--nearest", small_set.latents)
    assert result.exit_code == 0, result.stderr
    values = row(tmp_path)
    assert (values["metrics"]["memorised-features"], values["metrics"]["memorised-latents"]) == (100, 100)
    assert values["metrics"]["ratio-latents"] < 0.1
    assert not any("farther" in warning for warning in values["warnings"])
    for shown in values["nearest"]["shown"]:
        for space in SPACES:
            assert shown[space]["training_sample"] == f"000001.tar, row {shown['seed'] + 4}"
    assert values["nearest"]["latents"]["nearest"] == pytest.approx(1e-3, rel=0.3), "a distance per value"
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["metrics"]["memorised-latents"] == {"unit": "%", "better": "lower"}
    assert [content["settings"]["nearest"][name]["count"] for name in ("training", "held_back")] == [32, 8]
    text = (tmp_path / "report.txt").read_text()
    assert "one of 32 training samples than 1% of 8 held-back images" in text and "8 held-back images are few" in text
    assert "memorised-latents (%)" in text and "higher is better" in text and "ratio-latents" in text
    with Image.open(tmp_path / "nearest.png") as image:
        assert image.width > 3 * 64 and image.height > 3 * 64, "12 images in rows of 4"


def test_images_of_an_untrained_model_are_no_copies(
    run: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    values = stage.run(config(run, reference, small_set, tmp_path), ALONE).report["rows"][0]
    assert values["metrics"]["memorised-latents"] == 0
    assert values["metrics"]["ratio-latents"] > 0.8
    assert any("memorised-latents: generated images are farther" in warning for warning in values["warnings"])


def test_the_search_holds_one_block_and_resumes(
    run: Path, reference: Path, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted after the first shard, and reads the second one alone when it goes on."""
    monkeypatch.setattr("lfm.data.evaluation_images.FILES_PER_BLOCK", 5)
    generate(monkeypatch, training_latents(small_set)[10:])
    whole = stage.run(config(run, reference, small_set, tmp_path / "whole"), ALONE).report
    save, read = nearest_search._save, LatentSet.read

    def save_once(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    parts = config(run, reference, small_set, tmp_path / "parts")
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(nearest_search, "_save", save_once)
        stage.run(parts, ALONE)
    reads: list[int] = []

    def recorded_read(latents: LatentSet, block: int, view: str = "latent.npy") -> Tensor:
        reads.append(latents.manifest.shards[block].samples)
        return read(latents, block, view)

    monkeypatch.setattr(LatentSet, "read", recorded_read)
    resumed = stage.run(parts, ALONE).report
    assert reads == [16, 16, 8], "the second shard in two views, and the held-back one"
    assert resumed["rows"][0]["nearest"] == whole["rows"][0]["nearest"]
    assert len(list((tmp_path / "whole").glob("blocks-*/*"))) == 3
    (state,) = (tmp_path / "parts").glob("nearest-*.safetensors")
    for damaged in (state.read_bytes()[:-9], b""):
        state.write_bytes(damaged)
        reads.clear()
        assert stage.run(parts, ALONE).report["rows"] == resumed["rows"]
        assert reads == [16, 16, 8] * 2, "the search begins again"


def test_several_ranks_share_the_features_and_the_last_one_searches(
    run: Path, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    alone = stage.run(config(run, reference, small_set, tmp_path / "one"), ALONE).report
    for rank in range(2):
        result = stage.run(config(run, reference, small_set, tmp_path / "two", batch_size=3), World(rank, rank, 2))
        assert bool(result.report) == (rank == 1)
        assert len(list((tmp_path / "two").glob("latents-*/*"))) == (2, 3)[rank]
    for space in SPACES:
        measures = (report["rows"][0]["nearest"][space] for report in (alone, result.report))
        assert next(measures) == pytest.approx(next(measures), rel=1e-4)


def test_what_cannot_be_compared_is_refused_before_any_work(
    run: Path, tasks: Tasks, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    none = tmp_path / "none"
    tensors, header = load_weights(str(run))
    none.mkdir()
    save_weights(str(none / WEIGHTS), tensors, dataclasses.replace(header, config={}))
    nearest = ("--nearest", small_set.latents)
    for target, options, parts in (
        (none, nearest, ("data.held_back", "--held-back")),
        (run, ("--held-back", small_set.latents), ("--held-back", "--nearest")),
        (run, (*nearest, "--held-back", small_set.latents), ("--held-back", "holds the latents of --nearest")),
        (run, ("--nearest", small_set.raw), (small_set.raw, "raw shards", "latent ones")),
        (run, ("--metrics", "memorised-latents"), ("memorised-latents", "--nearest")),
        (run, ("--nearest", tasks.latents), ("data.held_back", "--held-back")),
    ):
        assert_one_line(evaluate(target, reference, small_set, out, *options), *parts)
    images = lfm("evaluate", random_images(tmp_path / "images"), "--reference", reference, "--out", out, *nearest)
    assert_one_line(images, "--nearest", "is for runs")
    assert_one_line(lfm("evaluate", run, "--bound", small_set.raw, "--out", out, *nearest), "--nearest", "--bound")
    changed = dataclasses.replace(header, autoencoder=header.autoencoder.model_copy(update={"scale_factor": 0.5}))
    save_weights(str(none / WEIGHTS), tensors, changed)
    assert_one_line(evaluate(none, reference, small_set, out, *nearest), small_set.latents, "another autoencoder")
    assert not out.exists()


def test_a_source_of_a_mixture_is_split_as_in_training(run: Path, small_set: SmallSet) -> None:
    """It is recognised by its location; shards that were left out are neither training samples nor held back."""
    _, header = load_weights(str(run))
    source = {"shards": f"{small_set.latents}/", "skip_shards": ["000000.tar"]}
    mixture = {"data": {"held_back": 1, "sources": [{"shards": "elsewhere"}, source]}}
    mixed = dataclasses.replace(header, config=mixture, manifest_digest="of the mixture")
    latents = str(small_set.latents)
    training, held_back = open_latents(latents, None, {"mixed": mixed}, None)
    assert (training.counts, held_back.counts) == ((16,), (8,))
    assert training.key(3) == "000001.tar, row 3"
    assert torch.equal(training.pick([3]), training.read(0)[3:4])
    with pytest.raises(ConfigError, match="mixed and other were trained on different shards"):
        open_latents(latents, None, {"mixed": mixed, "other": header}, None)
    re_encoded = dataclasses.replace(header, manifest_digest="of other latents")
    with pytest.raises(ConfigError, match="held none of it back"):
        open_latents(latents, None, {"re-encoded": re_encoded}, None)


def test_shards_held_back_are_those_of_the_version_that_a_run_began_with(
    run: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    """Whether the latents have grown since the run, during it, or before it."""
    _, header = load_weights(str(run))
    versions = [
        first_version(small_set.latents, tmp_path / "latents", 2),
        grow(small_set.latents, tmp_path / "latents", 3),
    ]
    history = tuple(
        Segment(first_sample=32 * number, sources=(SourceState(digest=each.digest, num_samples=each.num_samples),))
        for number, each in enumerate(versions)
    )
    for seen, shards in ((history[:1], [[0], [1]]), (history, [[0, 2], [1]]), (history[1:], [[0, 1], [2]])):
        own = dataclasses.replace(header, manifest_digest=seen[-1].sources[0].digest, data_history=seen)
        parts = open_latents(str(tmp_path / "latents"), None, {"run": own}, None)
        assert [[int(shard.name[:6]) for shard in part.manifest.shards] for part in parts] == shards


def test_other_latents_calibrate_the_threshold_instead_of_the_runs_own(
    run: Path, tasks: Tasks, reference: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    """The run's own held-back shard is still no training sample."""
    both = config(run, reference, small_set, tmp_path / "out", held_back=str(tasks.latents))
    plan = stage.run(dataclasses.replace(both, dry_run=True), ALONE).plan
    assert f"32 training samples of {small_set.latents}" in plan and f"20 held-back images of {tasks.latents}" in plan
    content = stage.run(both, ALONE).report
    assert [content["settings"]["nearest"][name]["count"] for name in ("training", "held_back")] == [32, 20]
    with pytest.raises(ConfigError, match="other images, settings or metrics"):
        stage.run(dataclasses.replace(both, held_back=None), ALONE)
