"""Trainings whose latents grow or lose samples: resuming, repeating from the record, plans and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.dropped import Drop, DroppedSample, add_drop
from lfm.data.versions import digests
from tests.support.commands import SmallSet, assert_one_line
from tests.support.growing_latents import first_version, grow
from tests.support.training_runs import assert_same_weights, losses, plan, train

STEADY = ("train.schedule=constant", "data.window=1")


def drop(folder: Path, *places: tuple[int, int]) -> None:
    """Withdraw samples by shard and row."""
    samples = [DroppedSample(key=f"{shard:06d}{row:06d}", shard=f"{shard:06d}.tar", row=row) for shard, row in places]
    add_drop(str(folder), Drop(reason="withdrawn", samples=tuple(samples)))


def state_of_newest(run: Path) -> dict[str, Any]:
    """Return the state of a run's newest checkpoint."""
    return json.loads((sorted((run / "checkpoints").iterdir())[-1] / "state.json").read_text())


def train_to(experiment: Path, *overrides: str, **how: Any) -> None:
    result = train(experiment, *overrides, *STEADY, **how)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("new_samples", ["next_pass", "at_once"])
def test_a_grown_training_is_what_its_record_says(
    experiment: Path, small_set: SmallSet, tmp_path: Path, new_samples: str
) -> None:
    """Trained, grown, resumed; killed and resumed; on other ranks; and once more from nothing by the record."""
    latents = tmp_path / "latents"
    first_version(small_set.latents, latents, 2)
    data = (f"data.shards={latents}", f"data.new_samples={new_samples}")
    whole, parts, repeated = (tmp_path / name for name in ("whole", "parts", "repeated"))
    train_to(experiment, *data, f"run={whole}", "train.num_steps=10")
    shutil.copytree(whole, parts)
    grow(small_set.latents, latents, 3)
    drop(latents, (0, 3), (2, 1))
    train_to(experiment, *data, f"run={whole}", "train.num_steps=20")
    train_to(experiment, *data, f"run={parts}", "train.num_steps=15")
    shutil.copytree(parts, tmp_path / "moved")
    train_to(experiment, *data, f"run={parts}", "train.num_steps=20")
    assert_same_weights(whole, parts)
    assert losses(whole) == losses(parts)
    train_to(experiment, *data, f"run={tmp_path / 'moved'}", "train.num_steps=20", ranks=2)
    assert losses(tmp_path / "moved") == pytest.approx(losses(whole), abs=1e-5)

    history = state_of_newest(whole)["data_history"]
    assert [segment["first_sample"] for segment in history] == [0, 80]
    assert [segment["sources"][0]["digest"] for segment in history] == digests(manifests.load(str(latents)))
    assert [segment["sources"][0]["num_samples"] for segment in history] == [32, 38]
    versions = [json.loads(line).get("data_versions") for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [number for number, version in enumerate(versions) if version] == [0, 10]

    drop(latents, (1, 1))  # later changes are not part of the record
    train_to(experiment, *data, f"run={repeated}", "train.num_steps=7", options=("--repeat-data", whole))
    train_to(experiment, *data, f"run={repeated}", "train.num_steps=20", options=("--repeat-data", whole))
    assert_same_weights(whole, repeated)
    assert losses(whole) == losses(repeated)
    assert state_of_newest(repeated)["data_history"] == history


@pytest.mark.slow
def test_resuming_with_grown_data_says_what_it_does(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """The plan lists versions; a set can stay as it was; other latents, classes and records are refused in one line."""
    latents = tmp_path / "latents"
    before = first_version(small_set.latents, latents, 2)
    data = (f"data.shards={latents}", *STEADY, "train.num_steps=20")
    train_to(experiment, data[0], "train.num_steps=5")
    assert "version" not in plan(experiment, *data).output
    after = grow(small_set.latents, latents, 3)
    grown = plan(experiment, *data)
    assert f"{latents}: version {before.digest[:12]} from sample 0 on: 32 samples\n" in grown.output, grown.output
    assert f"{latents}: version {after.digest[:12]} from sample 40 on: 40 samples\n" in grown.output
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.json"
    state = storage.read_json(str(checkpoint))
    older = {name: value for name, value in state.items() if name != "data_history"}
    storage.write_json(str(checkpoint), older, sealed=True)
    assert plan(experiment, *data).output == grown.output
    storage.write_json(str(checkpoint), state, sealed=True)
    left_out = plan(experiment, *data, "data.new_samples=left_out")
    assert "version" not in left_out.output and "32 samples in" in left_out.output, left_out.output
    drop(latents, (0, 0), (2, 0))
    dropped = plan(experiment, *data).output
    assert "from sample 40 on: 38 samples, 2 samples dropped" in dropped, dropped
    kept = plan(experiment, *data, "data.new_samples=left_out").output
    assert f"version {before.digest[:12]} from sample 40 on: 31 samples" in kept, kept

    more = after.classes[-1].model_copy(update={"index": len(after.classes), "name": "new"})
    manifests.publish(str(latents), after.model_copy(update={"classes": (*after.classes, more)}))
    assert_one_line(plan(experiment, *data), latents, "has 9 classes", "trained with 8", "--initialize-from")
    assert_one_line(plan(experiment, *data, options=("--repeat-data", small_set.latents)), "weights.safetensors")
    manifests.publish(str(latents), after.model_copy(update={"versions": ()}))
    assert_one_line(plan(experiment, *data), latents, "other latents than")
    manifests.publish(str(latents), after)
    (latents / "dropped.json").write_text("[]")
    assert_one_line(plan(experiment, *data), "dropped.json", "no list of dropped samples")


@pytest.mark.slow
def test_sources_of_a_mixture_and_balanced_classes_grow(experiment: Path, small_set: SmallSet, tmp_path: Path) -> None:
    """One source grows, one is balanced and grows, one stays; resumed equals repeated from nothing."""
    for name in ("one", "two"):
        first_version(small_set.latents, tmp_path / name, 2)
    sources = f"{{shards: {tmp_path / 'one'}, where: width > 0}}, {{shards: {tmp_path / 'two'}, balance: 0.5}}"
    data = f"data={{window: 1, sources: [{sources}, {{shards: {small_set.latents}, name: three}}], held_back: 1}}"
    run, parts, repeated = (tmp_path / name for name in ("run", "parts", "repeated"))
    steady = (data, "data.allow_leaks=true", "train.schedule=constant", "train.validate_every=100")
    result = train(experiment, *steady, f"run={run}", "train.num_steps=5")
    assert result.returncode == 0, result.stderr
    for name in ("one", "two"):
        grow(small_set.latents, tmp_path / name, 3)
    drop(tmp_path / "two", (0, 1))
    shutil.copytree(run, parts)
    for arguments in ((run, "train.num_steps=15"), (parts, "train.num_steps=10"), (parts, "train.num_steps=15")):
        result = train(experiment, *steady, f"run={arguments[0]}", arguments[1])
        assert result.returncode == 0, result.stderr
    assert_same_weights(run, parts)
    result = train(
        experiment,
        *steady,
        f"run={repeated}",
        "train.num_steps=15",
        options=("--repeat-data", run / "checkpoints" / "samples-000000000120"),
    )
    assert result.returncode == 0, result.stderr
    assert_same_weights(run, repeated)
    assert losses(run) == losses(repeated)
