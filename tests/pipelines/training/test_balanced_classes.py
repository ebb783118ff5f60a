"""Training with balanced classes: the plan, resuming, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lfm.data import manifest as manifests
from lfm.data.columns.column_index import write_index
from lfm.data.manifest import INDEX
from tests.support.columns import with_scores
from tests.support.commands import SmallSet, assert_one_line
from tests.support.training_runs import assert_same_weights, losses, plan, train


@pytest.fixture
def subset(small_set: SmallSet, tmp_path: Path) -> tuple[str, str]:
    """A copy of the small set, and a condition on a column that it has there."""
    with_scores(small_set.latents, tmp_path / "latents")
    return str(tmp_path / "latents"), "score < 25"


def test_the_plan_lists_shares_and_passes_of_classes(experiment: Path, small_set: SmallSet) -> None:
    before = plan(experiment)
    assert before.exit_code == 0 and "balanced" not in before.output
    assert plan(experiment, "data.balance=0").output == before.output
    classes = manifests.load(str(small_set.latents)).classes
    assert len(classes) == 8 and len({entry.count for entry in classes}) > 2
    alike = plan(experiment, "data.balance=1")
    assert "8 classes, balanced with 1:" in alike.output, alike.output
    for entry in classes:
        share = f"{entry.name}: 12.50% ({entry.count / 40:.2%} of the data)"
        assert f"  {share}, 20 samples, {20 / entry.count:.2f} passes over {entry.count}\n" in alike.output
    warned = plan(experiment, "data.balance=0.5", "data.warn_passes=2")
    rarest = min(classes, key=lambda entry: entry.count)
    assert f"each sample of class {rarest.name} is read " in warned.output and "lower balance" in warned.output


def test_a_source_of_a_mixture_is_balanced_by_itself(
    experiment: Path, small_set: SmallSet, subset: tuple[str, str]
) -> None:
    shards, where = subset
    columns = pq.read_table(Path(shards) / INDEX).to_pydict()
    names = sorted({name for name, score in zip(columns["class"], columns["score"], strict=True) if score < 25})
    part = f"{{shards: {shards}, where: {where}, name: part, weight: 3, balance: 1"
    mixture = f"data={{window: 2, sources: [{part}}}, {{shards: {small_set.latents}, weight: 1, name: whole}}]}}"
    result = plan(experiment, mixture)
    assert "  part: 75.00%" in result.output and "  whole: 25.00%" in result.output, result.output
    assert f"{shards}: {len(names)} classes, balanced with 1:" in result.output
    assert f"{small_set.latents}: {len(names)} classes" not in result.output
    merged = mixture.replace(part, f"{part}, classes: {{{names[1]}: {names[0]}}}")
    assert f"{shards}: {len(names) - 1} classes, balanced with 1:" in plan(experiment, merged).output


def test_mistakes_are_one_line(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    one, balance = f"data.shards={small_set.latents}", "data.balance=0.5"
    assert_one_line(plan(experiment, one, "data.balance=2"), "data.balance: 2", "at most 1")
    both = f"data={{sources: [{{shards: {small_set.latents}}}], balance: 0.5}}"
    assert_one_line(plan(experiment, both), "balance: write it into the source")
    manifest = manifests.load(str(small_set.latents))

    def changed(name: str, **update: object) -> str:
        folder = shutil.copytree(small_set.latents, tmp_path / name)
        manifests.publish(str(folder), manifest.model_copy(update=update))
        return f"data.shards={folder}"

    no_classes = ("condition=none", "condition_dropout=0", balance)
    assert_one_line(plan(experiment, changed("bare", classes=()), *no_classes), "data.balance", "bare has no classes")
    assert_one_line(plan(experiment, changed("old", columns=None), balance), "no index of columns", "lfm encode")
    names = [entry.model_copy(update={"name": f"new {entry.index}"}) for entry in manifest.classes]
    assert_one_line(plan(experiment, changed("other", classes=tuple(names)), balance), "is not of these samples")
    short = changed("short")
    assert manifest.columns is not None
    row = {"key": ["0"], "class": [manifest.classes[0].name], "source": ["a"], "width": [1], "height": [1]}
    record = write_index(short.partition("=")[2], [row], manifest.columns.types)
    manifests.publish(short.partition("=")[2], manifest.model_copy(update={"columns": record}))
    assert_one_line(plan(experiment, short, balance), "is not of these samples")


def test_faults_of_sources_are_one_line(
    experiment: Path, small_set: SmallSet, subset: tuple[str, str], tmp_path: Path
) -> None:
    """Each names the source or the folder, and what to change."""
    shards, _ = subset
    whole = f"{{shards: {small_set.latents}, name: whole"

    def mixed(part: str, first: str = f"{whole}}}") -> str:
        return f"data={{window: 2, sources: [{first}, {{shards: {shards}, name: part, balance: 1{part}}}]}}"

    manifest = manifests.load(shards)
    loud = tuple(entry.model_copy(update={"name": entry.name.upper()}) for entry in manifest.classes)
    clash = shutil.copytree(small_set.latents, tmp_path / "clash")
    manifests.publish(str(clash), manifests.load(str(clash)).model_copy(update={"classes": loud}))
    last = manifest.num_samples - manifest.shards[-1].samples
    held_back = ("data.held_back=1", "train.validate_every=5")
    for overrides, *words in (
        ((mixed(", where: scor > 1"),), "data.sources part: where", "no column is called scor"),
        ((mixed(", where: score < 0"),), "data.sources part: where", shards, "none of the 40 samples"),
        ((mixed(", weight: 0", f"{whole}, weight: 1}}"),), "data.sources.1.weight: 0", "greater than 0"),
        ((mixed("", f"{{shards: {clash}}}"),), "data.sources clash and part", "differ in spelling only", "in classes"),
        ((mixed(f", where: score >= {last}"), *held_back), "data.sources part", "nothing is left to train on"),
        (
            (f"data.shards={shards}", f"data.where=score >= {last}", "data.balance=1", *held_back),
            shards,
            "where selects none of the rest",
        ),
    ):
        assert_one_line(plan(experiment, *overrides), *words)
    assert plan(experiment, mixed("")).exit_code == 0
    shutil.rmtree(shards)
    assert_one_line(plan(experiment, mixed("")), shards, "no such folder")


@pytest.mark.slow
def test_a_balanced_training_resumes_and_another_balance_is_a_named_change(
    experiment: Path, subset: tuple[str, str], tmp_path: Path
) -> None:
    """Stopped and resumed equals never stopped; another power is refused by its key."""
    data = f"data.shards={subset[0]}", f"data.where={subset[1]}"
    settings = (*data, "data.balance=0.5", "train.schedule=constant")
    whole, parts = (f"run={tmp_path / name}" for name in ("whole", "parts"))
    assert train(experiment, *settings, whole).returncode == 0
    assert train(experiment, *settings, parts, "train.num_steps=10").returncode == 0
    assert train(experiment, *settings, parts).returncode == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    other = (*data, "data.balance=0.25", settings[-1], parts, "train.num_steps=30")
    assert_one_line(plan(experiment, *other), "data.balance (0.5, now 0.25)", "allow-changes")
