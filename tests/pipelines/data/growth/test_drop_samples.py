"""`lfm data drop`: what is listed, what is left out from then on, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lfm.data import manifest as manifests
from lfm.data.dropped import load_drops
from lfm.data.manifest import DROPPED, INDEX
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.images import folder_contents, raw_samples
from tests.support.training_runs import plan


@pytest.fixture
def latents(small_set: SmallSet, tmp_path: Path) -> Path:
    return shutil.copytree(small_set.latents, tmp_path / "latents")


def test_samples_are_withdrawn_by_key_and_condition(latents: Path, experiment: Path, tmp_path: Path) -> None:
    """Listed with a reason, left out of trainings and lists; no other file changes, and again adds nothing."""
    rows = pq.read_table(latents / INDEX).to_pydict()
    contents = folder_contents(latents)
    (tmp_path / "keys.txt").write_text(f"{rows['key'][7]}\n{rows['key'][20]}\n")
    command = ("data", "drop", latents, rows["key"][0], "--keys-file", tmp_path / "keys.txt", "--reason", "no consent")
    assert "3 samples withdrawn" in lfm(*command, "--dry-run").output and folder_contents(latents) == contents
    assert "3 samples withdrawn" in lfm(*command).output
    named = rows["class"][1]
    numbers = [number for number, name in enumerate(rows["class"]) if name == named]
    result = lfm("data", "drop", latents, "--where", f"class == '{named}'")
    num_new = len({*numbers} - {0, 7, 20})
    total = len({*numbers} | {0, 7, 20})
    assert f"{num_new} samples withdrawn" in result.output and f"{total} of 40 in all" in result.output
    assert "0 samples withdrawn" in lfm(*command).output
    drops = load_drops(str(latents))
    assert [(drop.reason, len(drop.samples)) for drop in drops] == [("no consent", 3), ("", num_new)]
    dropped = [sample for drop in drops for sample in drop.samples]
    assert {sample.key for sample in dropped} == {rows["key"][number] for number in {*numbers, 0, 7, 20}}
    starts = {"000000.tar": 0, "000001.tar": 16, "000002.tar": 32}
    assert all(rows["key"][starts[sample.shard] + sample.row] == sample.key for sample in dropped)
    assert {name: content for name, content in folder_contents(latents).items() if name != DROPPED} == contents

    planned = plan(experiment, f"data.shards={latents}").output
    assert f"{40 - total} samples, {total} samples dropped" in planned, planned
    balanced = plan(experiment, f"data.shards={latents}", "data.balance=1").output
    assert "7 classes, balanced" in balanced and f"  {named}:" not in balanced, balanced
    described = lfm("inspect", latents, "--out", tmp_path / "sheet.png").output
    assert "3 samples dropped: no consent" in described and f"{num_new} samples dropped\n" in described
    order = lfm("inspect", latents, "--plan", "--num", 40 - total).output.splitlines()
    read = {line.split(": ")[1].split(", ")[1] for line in order}
    assert len(read) == 40 - total
    assert not read & {f"{sample.shard} row {sample.row}" for sample in dropped}


def test_raw_samples_are_withdrawn_by_their_source(small_set: SmallSet, tmp_path: Path) -> None:
    raw = shutil.copytree(small_set.raw, tmp_path / "raw")
    name, sample = next(iter(raw_samples(raw).items()))
    assert "1 samples withdrawn" in lfm("data", "drop", raw, "--where", f"source == '{name}'").output
    assert [each.key for drop in load_drops(str(raw)) for each in drop.samples] == [sample.key]


def test_mistakes_are_one_line(latents: Path, tmp_path: Path) -> None:
    command = ("data", "drop", latents)
    for arguments, *words in (
        ((), "KEYS", "--where"),
        (("12",), "12: is no key", "12 digits"),
        (("000009000000",), "000009.tar", "no such shard"),
        (("000000000999",), "000000.tar", "has no sample 000000000999"),
        (("--keys-file", tmp_path / "none.txt"), "--keys-file", "no such file"),
        (("--where", "clas == 'a'"), "--where", "no column is called clas"),
        (("--where", "width > 0"), "no sample would be left"),
    ):
        assert_one_line(lfm(*command, *arguments), *words)
    assert not (latents / DROPPED).exists()
    assert manifests.load(str(latents)).num_samples == 40
