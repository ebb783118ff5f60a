"""`lfm inspect` of several folders and of an experiment: shares, columns, and samples that occur twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from tests.support.columns import with_scores
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.training_runs import plan


def with_shards(folder: Path, target: Path, *numbers: int) -> Path:
    """Copy some shards of latents, in this order."""
    shutil.copytree(folder, target)
    manifest = manifests.load(str(folder))
    shards = tuple(manifest.shards[number] for number in numbers)
    manifests.publish(str(target), manifest.model_copy(update={"shards": shards, "columns": None}))
    return target


@pytest.fixture
def part(small_set: SmallSet, tmp_path: Path) -> Path:
    """The last shard of the small set, of 8 samples, and then the first one, of 16."""
    return with_shards(small_set.latents, tmp_path / "part", 2, 0)


def test_folders_are_described_with_the_samples_that_they_share(
    small_set: SmallSet, part: Path, tmp_path: Path
) -> None:
    with_scores(small_set.latents, tmp_path / "scored")
    result = lfm("inspect", tmp_path / "scored", part)
    assert result.exit_code == 0, result.output
    for line in (
        f"{tmp_path / 'scored'}: latents shards: 40 samples of 16 x 16 pixels in 3 shards",
        "  column score (float): 0 ",
        f"{part}: latents shards: 24 samples",
        "scored: 62.50% of the samples",
        "part: 37.50% of the samples",
        "8 classes",
        "(2 of scored, 2 of part)",
        "scored and part: 24 samples in common (60.00% and 100.00% of the different ones), such as ",
    ):
        assert line in result.stdout, line
    example = result.stdout.splitlines()[-1].partition("such as ")[2].split(" and ")
    assert example == [
        each.replace(str(part), str(tmp_path / "scored")).replace(str(tmp_path / "scored"), str(base))
        for each, base in zip([example[0]] * 2, (tmp_path / "scored", part), strict=True)
    ]
    other = with_shards(small_set.latents, tmp_path / "other", 1)
    assert "other and part: no sample in common" in lfm("inspect", other, part).stdout


def test_copies_within_a_folder_are_counted(small_set: SmallSet, tmp_path: Path) -> None:
    folder = with_shards(small_set.latents, tmp_path / "twice", 0, 1)
    shutil.copyfile(folder / "000000.tar", folder / "000001.tar")
    manifest = manifests.load(str(folder))
    first = manifest.shards[0]
    shards = first, first.model_copy(update={"name": "000001.tar"})
    manifests.publish(str(folder), manifest.model_copy(update={"shards": shards}))
    assert "twice: 16 of 32 samples are copies of others in it" in lfm("inspect", folder, small_set.latents).stdout


def test_an_experiment_is_described_with_its_leaks(
    experiment: Path, small_set: SmallSet, part: Path, tmp_path: Path
) -> None:
    """The shard that one source trains on and the other one holds back is a mistake in training as well."""
    data = (
        f"data:\n  window: 2\n  held_back: 1\n  sources: [{{shards: {small_set.latents}, name: whole, weight: 3}}, "
        f"{{shards: {part}, weight: 1, balance: 0}}]\n"
    )
    text = experiment.read_text().replace(f"data:\n  shards: {small_set.latents}\n  window: 2\n", data)
    experiment.write_text(text.replace("train:\n", "train:\n  validate_every: 5\n"))
    assert_one_line(
        plan(experiment), "data.held_back 1", small_set.latents / "000002.tar", part / "000002.tar", "data.allow_leaks"
    )
    allowed = plan(experiment, "data.allow_leaks=true")
    assert allowed.exit_code == 0, allowed.output
    assert f"40 samples in {small_set.latents}, {part} (24 more are held back)" in allowed.output
    result = lfm("inspect", experiment)
    assert result.exit_code == 0, result.output
    shards, first = manifests.load(str(small_set.latents)).shards, manifests.load(str(small_set.latents)).classes[0]
    whole, other = sum(shard.class_counts[0] for shard in shards[:2]), shards[2].class_counts[0]
    for line in (
        "24 samples in 2 shards are held back: the last 1 of each source; below are the 40 to train on",
        "  whole: 75.00%, 120 samples, 3.75 passes over 32",
        "8 classes",
        f"  {first.name}: {whole + other:,} ({whole} of whole",
        "whole and part: no sample in common",
        "training and held back: 24 samples in common (60.00% and 100.00% of the different ones), such as ",
    ):
        assert line in result.stdout, line


def test_an_experiment_of_one_subset(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """Only the selected samples are compared."""
    with_scores(small_set.latents, tmp_path / "latents")
    where = f"{tmp_path / 'latents'}\n  where: score < 36 and score != 3\n  held_back: 1\n"
    text = experiment.read_text().replace(f"{small_set.latents}\n", where)
    experiment.write_text(text.replace("train:\n", "train:\n  validate_every: 5\n"))
    result = lfm("inspect", experiment)
    assert result.exit_code == 0, result.output
    assert "31 of 32 samples" in result.stdout and "training and held back: no sample in common" in result.stdout


def test_mistakes_are_one_line(experiment: Path, small_set: SmallSet, part: Path, tmp_path: Path) -> None:
    assert_one_line(lfm("inspect", small_set.latents, part, "--plan"), "--plan", "one folder")
    assert_one_line(lfm("inspect", experiment, part), experiment, "names its latents itself")
    assert_one_line(lfm("inspect", small_set.latents, small_set.raw), small_set.raw, "holds raw shards")
    assert_one_line(lfm("inspect", small_set.latents, tmp_path / "vanished"), tmp_path / "vanished", "no such folder")
    content = bytearray((part / "000002.tar").read_bytes())
    (part / "000002.tar").write_bytes(content[: len(content) // 2])
    assert_one_line(lfm("inspect", small_set.latents, part), part / "000002.tar")
