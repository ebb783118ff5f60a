"""The page on fine-tuning: each of its commands runs, in its order, on weights of published names and a tiny size."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lfm.data import manifest as manifests
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from lfm.weights_file import load_weights
from pipelines.cli import model_commands
from tests.support.commands import REPOSITORY, SmallSet, finish, lfm, start_ranks
from tests.support.published import published_state
from tests.support.training_runs import SCRIPT

PAGE = REPOSITORY / "docs" / "fine-tuning.md"
CONFIG = REPOSITORY / "configs" / "pictures_256_finetune.yaml"


@pytest.mark.slow
def test_every_command_of_the_page_runs(small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    published = DiT(DiTConfig(4, 8, 2, 32, 2, 2, num_classes=1000, condition_dropout=0.1, time_scale=1.0))
    torch.save({"ema": published_state(published, variance=True)}, "DiT-XL-2-256x256.pt")
    classes = manifests.load(str(small_set.latents), "latents").classes
    Path("classes.yaml").write_text("\n".join(f"{entry.name}: {entry.index + 100}" for entry in classes))
    text = CONFIG.read_text().replace("extends: parts/", f"extends: {CONFIG.parent}/parts/")
    for key, value in (
        ("shards: .*", f"shards: {small_set.latents}"),
        ("size: XL", "hidden_size: 32\n  depth: 2\n  num_heads: 2"),
        ("num_steps: .*", "num_steps: 2\n  warmup_steps: 1"),
        ("global_batch: .*", "global_batch: 8"),
        ("precision: bf16", "precision: fp32"),
        ("deepspeed: (.*)", rf"deepspeed: {CONFIG.parent}/\2"),
    ):
        text = re.sub(f"^( *){key}$", rf"\1{value}", text, flags=re.MULTILINE)
    (Path("configs")).mkdir()
    (Path("configs") / CONFIG.name).write_text(text)
    commands = [
        shlex.split(line) for line in re.findall(r"^    ((?:lfm|deepspeed) .*)$", PAGE.read_text(), re.MULTILINE)
    ]
    assert len(commands) == 6
    for words in commands:
        if words[1] == "import":
            words = [*words, "--num-heads", "2"]
            words[words.index("--autoencoder") + 1] = str(small_set.autoencoder)
        if words[0] == "lfm":
            seeds = ["--seeds", "0-0", "--num-steps", "2"] if words[1] == "sample" else []
            result = lfm(*words[1:], *seeds)
            assert result.exit_code == 0, result.output
        elif "--dry-run" in words:
            result = lfm(*words[2:], command=model_commands.train)
            assert result.exit_code == 0 and "8 classes: 8 taken" in result.stdout, result.output
        else:
            ended = finish(start_ranks([sys.executable, SCRIPT, *words[2:]], 1))
            assert ended.returncode == 0, ended.stderr
    _, header = load_weights("tuned.safetensors")
    assert header.prediction == "noise" and header.base is None and header.initialized_from is not None
