"""Tests of training a part: what is frozen, what is saved, resuming, and putting the part together with its base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lfm as library
from lfm.weights_file import load_weights
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.sources import save_source
from tests.support.training_runs import assert_same_weights, losses, plan, train, zero

STEADY = ("train.schedule=constant", "train.warmup_steps=0")
LORA = "train.trainable=[adapters, scales, conditions]"


@pytest.fixture
def source(small_set: SmallSet, tmp_path: Path) -> Path:
    """A run of random weights of the experiment's network, with other classes."""
    return save_source(small_set, tmp_path / "source", ("first", "star"))


@pytest.mark.slow
def test_a_run_of_adapters_resumes_under_every_stage_and_is_put_together_with_its_base(
    experiment: Path, source: Path, tmp_path: Path
) -> None:
    """Ranks and stages change the result by rounding; the same ones resume bit for bit."""
    options = ("--initialize-from", source)
    settings = (*STEADY, LORA, "train.adapter_rank=2", "train.checkpoint_every=5", "train.num_steps=10")
    runs = {stage: tmp_path / f"zero{stage}" for stage in (1, 3)}
    for stage, run in runs.items():
        ranks = 1 if stage == 1 else 2
        result = train(experiment, f"run={run}", *settings, zero(stage), ranks=ranks, options=options)
        assert result.returncode == 0, result.stderr
    for stage, copied in ((3, 3), (2, 1)):
        resumed = shutil.copytree(runs[copied], tmp_path / f"resumed{stage}")
        shutil.rmtree(resumed / "checkpoints" / "samples-000000000080")
        result = train(experiment, f"run={resumed}", *settings, zero(stage), ranks=2)
        assert result.returncode == 0 and "from samples-000000000040" in result.stdout, result.stderr
        assert losses(resumed) == pytest.approx(losses(runs[1]), abs=1e-4)
    assert_same_weights(runs[3], tmp_path / "resumed3")

    part, base = load_file(runs[1] / "weights.safetensors"), load_weights(str(source))[0]
    trained = {name for name in part if name.rpartition(".")[2] in ("low_rank_up", "low_rank_down", "scale")}
    assert {name.partition(".")[0] for name in part.keys() - trained} == {"class_embedding", "patch_embedding"}, (
        "the first layer is one of the conditions"
    )
    master = load_file(runs[1] / "checkpoints" / "samples-000000000080" / "master-00000.safetensors")
    assert master.keys() == part.keys(), "what is frozen has no state"
    merged, header = load_weights(str(runs[1]))
    assert merged.keys() == base.keys() and header.base is None
    assert not torch.equal(merged["blocks.0.mlp.0.weight"], base["blocks.0.mlp.0.weight"])
    assert torch.equal(merged["time_embedding.mlp.0.weight"], base["time_embedding.mlp.0.weight"])

    for flags, name in (((), "part"), (("--merge",), "whole")):
        exported = lfm("export", runs[1], tmp_path / f"{name}.safetensors", "--to", "safetensors", *flags)
        assert exported.exit_code == 0, exported.output
    images = [
        library.load(str(tmp_path / name)).sample([0], num_steps=2).images for name in ("zero1", "part.safetensors")
    ]
    sampled = lfm("sample", runs[1], "--out", tmp_path / "samples", "--seeds", "0-0", "--num-steps", 2)
    assert sampled.exit_code == 0, sampled.output
    shutil.move(source, tmp_path / "moved")
    images.append(library.load(str(tmp_path / "whole.safetensors")).sample([0], num_steps=2).images)
    assert all((image == images[0]).all() for image in images), "the merged file needs no base"
    assert_one_line(lfm("sample", runs[1], "--out", tmp_path / "s"), "needs the weights", str(source))


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["norms_and_biases", "blocks.1.mlp.*"])
def test_what_is_frozen_stays_as_it_is(experiment: Path, source: Path, tmp_path: Path, selection: str) -> None:
    settings = (*STEADY, f"train.trainable=['{selection}']", "train.num_steps=2")
    assert train(experiment, *settings, options=("--initialize-from", source)).returncode == 0
    part, (base, _) = load_file(tmp_path / "run" / "weights.safetensors"), load_weights(str(source))
    expected = {
        name
        for name, value in base.items()
        if (value.ndim == 1 if selection == "norms_and_biases" else name.startswith("blocks.1.mlp."))
    }
    assert part.keys() == expected | {"class_embedding.table.weight"}, "the rows of new classes are not in the base"
    whole, _ = load_weights(str(tmp_path / "run"))
    assert {name for name, value in whole.items() if not torch.equal(value, base[name])} == part.keys()


def test_parts_that_cannot_be_trained_are_one_line(experiment: Path, source: Path) -> None:
    options = ("--initialize-from", source)
    for overrides, *words in (
        (("train.trainable=[atention]",), "train.trainable atention", "attention, norms_and_biases"),
        (("train.trainable=[all, adapters]",), "train.trainable", "leave out the other parts"),
        (("train.trainable=[adapters]", "train.optimizer=muon"), "train.optimizer muon"),
        (("train.trainable=[adapters]", "train.ema_sigma_rel=[0.1]"), "train.ema_sigma_rel"),
    ):
        assert_one_line(plan(experiment, *overrides, options=options), *words)
    assert_one_line(plan(experiment, "train.trainable=[adapters]"), "train.trainable", "--initialize-from")
    shown = plan(experiment, "train.trainable=[adapters]", options=options)
    assert "trains adapters:" in shown.stdout and "the rest is frozen" in shown.stdout, shown.output
