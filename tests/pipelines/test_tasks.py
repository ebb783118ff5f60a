"""Tests of tasks with segmentations and masks, from training to images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lfm import weights_file
from lfm.models import registry
from tests.support.commands import REPOSITORY, Tasks, lfm


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["semantic", "class+inpaint"])
def test_a_run_is_trained_with_its_segmentation_encoder_and_sampled(
    tasks: Tasks, tmp_path: Path, condition: str
) -> None:
    settings = {
        "run": tmp_path / "run",
        "data.shards": tasks.latents,
        "condition": condition,
        "model.size": "null",
        "model.hidden_size": 32,
        "model.depth": 1,
        "model.num_heads": 2,
        "train.num_steps": 3,
        "train.global_batch": 8,
        "train.learning_rate": 0.01,
        "train.warmup_steps": 0,
        "train.ema_decay": 0,
    }
    command = [sys.executable, "launch/train.py", "--config", "configs/demo.yaml"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    weights, header = weights_file.load_weights(str(tmp_path / "run"))
    torch.manual_seed(0)  # as in the training stage, so that these are the initial weights
    initial = registry.build_network(header.model).state_dict()
    encoder = [name for name in weights if name.startswith("segmentation_embedding")]
    assert len(encoder) == (3 if condition == "semantic" else 0)
    assert all((weights[name] - initial[name]).abs().max() > 1e-3 for name in [*encoder, "patch_embedding.weight"])
    (next_line,) = [line for line in result.stdout.splitlines() if line.startswith("next: lfm sample")]
    assert next_line.endswith(" --out DIR --shards RAW_SHARDS")  # of the latents, holes cannot be put back
    flags = ("--shards", tasks.raw, "--seeds", "0-3", "--guidance-scale", 2, "--num-steps", 2)
    result = lfm("sample", tmp_path / "run", "--out", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.stderr
