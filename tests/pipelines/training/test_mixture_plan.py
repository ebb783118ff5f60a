"""Training on several data sets: the plan, mistakes in the configuration, and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from tests.support.commands import SmallSet, assert_one_line
from tests.support.training_runs import assert_same_weights, losses, plan, train


def sources(*each: str) -> str:
    """Return the override that mixes sources, each written as the items of a YAML mapping."""
    return f"data={{window: 2, sources: [{', '.join('{' + source + '}' for source in each)}]}}"


def copy_with_classes(folder: Path, target: Path, *names: str) -> Path:
    """Copy latents, and name their classes anew."""
    shutil.copytree(folder, target)
    manifest = manifests.load(str(target))
    renamed = zip(manifest.classes, names, strict=False)
    classes = tuple(entry.model_copy(update={"name": name}) for entry, name in renamed)
    manifests.publish(str(target), manifest.model_copy(update={"classes": classes}))
    return target


@pytest.fixture
def two(small_set: SmallSet, tmp_path: Path) -> list[Path]:
    """The folder of the small set, and a copy of it with two of its classes renamed."""
    names = [entry.name for entry in manifests.load(str(small_set.latents)).classes]
    return [small_set.latents, copy_with_classes(small_set.latents, tmp_path / "other", "new 1", "new 2", *names[2:])]


def test_the_plan_lists_samples_and_passes_by_source_and_stage(experiment: Path, two: list[Path]) -> None:
    mixture = sources(f"shards: {two[0]}, weight: 3, name: drawn", f"shards: {two[1]}, weight: 1")
    result = plan(experiment, mixture, "data.stages=[{samples_seen: 80, weights: {drawn: 0, other: 0.5}}]")
    assert result.exit_code == 0, result.output
    for line in (
        f"80 samples in {two[0]}, {two[1]}; 20 steps of 8",
        "from sample 0 to 80:",
        "  drawn: 75.00%, 60 samples, 1.50 passes over 40",
        "  other: 25.00%, 20 samples, 0.50 passes over 40",
        "from sample 80 to 160:",
        "  drawn: 0.00%, 0 samples, 0.00 passes over 40",
        "  other: 100.00%, 80 samples, 2.00 passes over 40",
        "drawn: 60 samples, 1.50 passes over 40 in all",
        "other: 100 samples, 2.50 passes over 40 in all",
        "10 classes",
        "of drawn, ",
    ):
        assert line in result.output, line
    assert "warning" not in result.output
    repeated = plan(experiment, mixture, "data.warn_passes=2")
    assert "warning: drawn: each of its samples is read 3 times, more than data.warn_passes 2" in repeated.output


def test_weights_follow_the_number_of_samples(experiment: Path, two: list[Path]) -> None:
    for first, second, share in (
        ("", "", "50.00%"),
        ("repeat: 3", "", "75.00%"),
        ("num_samples: 10", "", "20.00%"),
        ("weight: 0.7", "weight: 0.3", "70.00%"),
    ):
        mixture = sources(f"shards: {two[0]}, name: one, {first}", f"shards: {two[1]}, {second}")
        assert f"  one: {share}, " in plan(experiment, mixture).output


def test_every_mistake_in_a_mixture_is_one_line(experiment: Path, two: list[Path], tmp_path: Path) -> None:
    one, other = f"shards: {two[0]}, name: one", f"shards: {two[1]}"
    no_classes = copy_with_classes(two[0], tmp_path / "no-classes")
    weighted = sources(f"{one}, weight: 1", f"{other}, weight: 1")
    for overrides, *words in (
        ((sources(one, f"shards: {tmp_path / 'vanished'}"),), f"{tmp_path / 'vanished'}", "no such folder"),
        ((sources(f"{one}, weight: 0", f"{other}, weight: 1"),), "data.sources.0.weight: 0", "greater than 0"),
        ((sources(f"{one}, weigth: 1", other),), "data.sources.0.weigth: unknown key", "did you mean 'weight'?"),
        ((sources(f"{one}, weight: 1", other),), "one or other has no weight"),
        ((sources(f"{one}, weight: 1, repeat: 2", f"{other}, weight: 1"),), "one has weight and repeat"),
        ((sources(one, f"{other}, name: one"),), "two are called one"),
        (("data.sources=[]", "data.shards=null"), "set either shards", "or sources"),
        ((f"data.sources=[{{{one}}}]",), "set either shards", "or sources"),
        ((sources(one, other), "data.skip_shards=[a]"), "skip_shards: name them in the source"),
        ((sources(one, f"{other}, skip_shards: [nope.tar]"),), f"{two[1]}: no shard nope.tar"),
        (
            (sources(one, f"{other}, skip_shards: [000000.tar, 000001.tar, 000002.tar]"),),
            f"{two[1]}: holds no latents to train on",
        ),
        ((sources(one, f"{other}, classes: {{nothing: square}}"),), "data.sources other: classes", "no class nothing"),
        ((sources(one, other), "data.held_back=3", "train.validate_every=5"), "3 shards in", "data.held_back 3"),
        ((sources(one, other), "data.stages=[{samples_seen: 8, weights: {one: 1}}]"), "every source a weight"),
        ((weighted, "data.stages=[{samples_seen: 8, weights: {two: 1}}]"), "no source is called two", "one, other"),
        ((weighted, "data.stages=[{samples_seen: 8, weights: {one: 0, other: 0}}]"), "every weight is 0"),
        ((weighted, "data.stages=[{samples_seen: 8, weights: {one: -1}}]"), "data.stages.0.weights.one", "at least 0"),
        ((weighted, "data.stages=[{samples_seen: 0, weights: {one: 1}}]"), "data.stages.0.samples_seen"),
        (
            (weighted, "data.stages=[{samples_seen: 8, weights: {one: 2}}, {samples_seen: 8, weights: {one: 1}}]"),
            "each must begin at more samples_seen",
        ),
        (
            (sources(one, f"shards: {no_classes}"), "condition_dropout=0"),
            "no-classes has no classes",
            "condition_dropout",
        ),
    ):
        assert_one_line(plan(experiment, *overrides), *words)
    assert (
        "no class: no-classes serves the null condition"
        in plan(experiment, sources(one, f"shards: {no_classes}")).output
    )


@pytest.mark.slow
def test_a_mixture_resumes_as_if_it_had_not_been_interrupted(experiment: Path, two: list[Path], tmp_path: Path) -> None:
    mixture = (
        sources(f"shards: {two[0]}, weight: 0.7, name: one", f"shards: {two[1]}, weight: 0.3, name: other"),
        "data.stages=[{samples_seen: 60, weights: {other: 2}}]",
        "train.schedule=constant",
    )
    whole, parts = (f"run={tmp_path / name}" for name in ("whole", "parts"))
    assert train(experiment, *mixture, whole).returncode == 0
    first = train(experiment, *mixture, parts, "train.num_steps=10")
    assert first.returncode == 0 and "from sample 60 to 80:" in first.stdout
    moved = tmp_path / "moved"
    shutil.move(two[1], moved)
    assert train(experiment, mixture[0].replace(str(two[1]), str(moved)), *mixture[1:], parts).returncode == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    heavier = mixture[0].replace("0.7", "0.8").replace(str(two[1]), str(moved))
    assert_one_line(
        plan(experiment, heavier, *mixture[1:], parts, "train.num_steps=30"), "data.sources", "allow-changes"
    )
    one_less = sources(f"shards: {two[0]}, weight: 1")
    assert_one_line(plan(experiment, one_less, parts, "train.num_steps=30"), "other latents")
