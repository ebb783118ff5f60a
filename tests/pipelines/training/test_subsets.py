"""Training on the samples that a condition on columns holds for: the plan, resuming, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from lfm.data.manifest import INDEX
from tests.support.columns import with_scores
from tests.support.commands import SmallSet, assert_one_line
from tests.support.training_runs import assert_same_weights, plan, train


def test_the_plan_says_what_a_subset_costs(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """Samples, shards and bytes of a pass; passes of a mixture count the selected samples."""
    manifest = with_scores(small_set.latents, tmp_path / "latents")
    shards = f"data.shards={tmp_path / 'latents'}"
    first = manifest.shards[0].samples
    one_shard = plan(experiment, shards, f"data.where=score < {first}")
    assert one_shard.exit_code == 0, one_shard.output
    assert f"{first} of {manifest.num_samples} samples" in one_shard.output
    assert f"a pass reads 1 of {len(manifest.shards)} shards" in one_shard.output
    part = f"{{shards: {tmp_path / 'latents'}, where: score < 10, name: part}}"
    mixed = f"data={{window: 2, sources: [{part}, {{shards: {small_set.latents}}}]}}"
    result = plan(experiment, mixed)
    assert "10 of 40 samples" in result.output and "passes over 10" in result.output, result.output


def test_mistakes_are_one_line(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """Each names the key and the known columns, or the repair."""
    with_scores(small_set.latents, tmp_path / "latents")
    shards = f"data.shards={tmp_path / 'latents'}"
    for where, words in (
        ("scor < 3", ("data.where", "no column is called scor", "width (int)", "score (float)")),
        ("score < 0", ("data.where", "none of the 40 samples", "score (float)")),
        ("class < 3", ("data.where", "class is text")),
        ("score <", ("data.where", "cannot be read")),
    ):
        assert_one_line(plan(experiment, shards, f"data.where={where}"), *words)
    both = f"data={{sources: [{{shards: {small_set.latents}}}], where: width > 1}}"
    assert_one_line(plan(experiment, both), "where: write it into the source")
    old = shutil.copytree(small_set.latents, tmp_path / "old")
    manifests.publish(str(old), manifests.load(str(old)).model_copy(update={"columns": None}))
    assert_one_line(plan(experiment, f"data.shards={old}", "data.where=width > 1"), "no index of columns", "lfm encode")
    (tmp_path / "latents" / INDEX).unlink()
    assert_one_line(plan(experiment, shards, "data.where=width > 1"), INDEX)


@pytest.mark.slow
def test_a_subset_resumes_and_another_one_is_a_named_change(
    experiment: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    """Stopped and resumed equals never stopped; another expression or index is refused by its key."""
    with_scores(small_set.latents, tmp_path / "latents")
    subset = (f"data.shards={tmp_path / 'latents'}", "data.where=score >= 7 and score != 20", "train.schedule=constant")
    whole, parts = (f"run={tmp_path / name}" for name in ("whole", "parts"))
    assert train(experiment, *subset, whole).returncode == 0
    assert train(experiment, *subset, parts, "train.num_steps=10").returncode == 0
    assert train(experiment, *subset, parts).returncode == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    more = "train.num_steps=30"
    assert plan(experiment, *subset, parts, more).exit_code == 0
    other = (subset[0], "data.where=score > 7", subset[2])
    assert_one_line(plan(experiment, *other, parts, more), "data.where (score >= 7", "allow-changes")
    with_scores(small_set.latents, tmp_path / "latents", factor=2)
    assert_one_line(plan(experiment, *subset, parts, more), "data.where (the index of columns", "allow-changes")
