"""Tests of every option of model and flow at once: alike on one and two ranks, uninterrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lfm.weights_file import load_weights
from tests.support.commands import REPOSITORY, assert_one_line
from tests.support.models import SMALL_OPTIONS
from tests.support.training_runs import assert_same_weights, losses, plan, train

MODEL = (
    "position=rope",
    "norm=rms",
    "mlp=swiglu",
    "qk_norm=true",
    "token_dropout=0.5",
    "activation_checkpointing=2",
    "internal_head=true",
    "latent_head=true",
    "value_residual=true",
)
FLOW = ("time=logit_normal", "time_shift=2.0", "direction_weight=1.0", "coupling_group=4", "internal_weight=0.5")
FLOW += ("layer_sync_weight=0.2", "layer_sync_blocks=[0, 1]", "latent_weight=0.5")
OPTIONS = [f"model.{option}" for option in MODEL] + [f"flow.{option}" for option in FLOW]
OPTIONS += ["condition=none", "condition_dropout=0", "train.schedule=constant", "train.optimizer=muon"]


@pytest.mark.slow
def test_all_options_train_alike_on_any_ranks_and_resume(experiment: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str, ranks: int = 1) -> Path:
        result = train(experiment, *OPTIONS, f"run={tmp_path / name}", *overrides, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    alone = run("alone")
    shared = run("shared", "train.micro_batch=2", ranks=2)
    sharded = run("sharded", f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / 'zero3.json'}", ranks=2)
    run("stopped", "train.num_steps=10")
    stopped = run("stopped")
    curve = torch.tensor(losses(alone))
    assert curve[-1] < curve[0]
    for other in (shared, sharded):
        torch.testing.assert_close(torch.tensor(losses(other)), curve, atol=1e-4, rtol=0)
    assert_same_weights(alone, stopped)
    model = load_weights(str(alone))[1].model
    assert (model.position, model.norm, model.mlp, model.qk_norm) == ("rope", "rms", "swiglu", True)
    assert model.token_dropout == 0.5 and model.activation_checkpointing == 2


@pytest.mark.slow
def test_muon_updates_kernels_alike_on_any_ranks_and_resumes(experiment: Path, tmp_path: Path) -> None:
    settings = (f"model={json.dumps(SMALL_OPTIONS['unet'])}", "train.optimizer=muon", "train.num_steps=6")
    settings += ("train.warmup_steps=0", "train.schedule=constant", "train.log_every=1")

    def run(name: str, *overrides: str, ranks: int = 1) -> Path:
        result = train(experiment, *settings, f"run={tmp_path / name}", *overrides, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    alone = run("alone")
    sharded = run("sharded", f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / 'zero3.json'}", ranks=2)
    run("stopped", "train.num_steps=4")
    torch.testing.assert_close(torch.tensor(losses(sharded)), torch.tensor(losses(alone)), atol=1e-4, rtol=0)
    assert_same_weights(alone, run("stopped"))


@pytest.mark.slow
def test_rates_by_width_train_alike_at_any_stage_and_resume(experiment: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str, ranks: int = 1) -> Path:
        settings = ("train.reference_width=8", "train.weight_decay=0.1", "train.num_steps=6")
        settings += ("train.schedule=constant", "train.warmup_steps=0", "train.log_every=1")
        result = train(experiment, *settings, f"run={tmp_path / name}", *overrides, ranks=ranks)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    alone = run("alone")
    sharded = run("sharded", f"deepspeed={REPOSITORY / 'configs' / 'deepspeed' / 'zero3.json'}", ranks=2)
    torch.testing.assert_close(torch.tensor(losses(sharded)), torch.tensor(losses(alone)), atol=1e-4, rtol=0)
    run("stopped", "train.num_steps=3")
    assert_same_weights(alone, run("stopped"))
    refused = plan(experiment, "train.reference_width=8", "train.optimizer=muon", f"run={tmp_path / 'refused'}")
    assert_one_line(refused, "train.reference_width 8", "adamw")
