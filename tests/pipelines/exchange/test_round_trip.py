"""A published checkpoint on its way: imported, fine-tuned to other classes and another size, sampled, exported to diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import lfm as library
from lfm.autoencoder import import_diffusers
from lfm.conversion.to_diffusers import NUM_DIFFUSION_STEPS, STRIDE
from lfm.models.dit_config import DiTConfig
from lfm.models.noise_prediction import NoisePrediction
from lfm.types import Condition
from tests.support.commands import REPOSITORY, SmallSet, lfm
from tests.support.models import randomized_dit
from tests.support.published import published_state
from tests.support.training_runs import train

CLASSES = ("cross", "disc", "heart")
YAML = f"""
run: tuned
condition: class
condition_dropout: 0.1
data: {{shards: latents}}
model: {{hidden_size: 32, depth: 2, num_heads: 2, patch_size: 2, time_scale: 1, frequency_shift: 0}}
train: {{num_steps: 3, global_batch: 4, learning_rate: 1.0e-3, gradient_clipping: 1.0}}
deepspeed: {REPOSITORY}/configs/deepspeed/zero1.json
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["dit", "sit"])
def test_a_published_checkpoint_comes_back(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    published = randomized_dit(DiTConfig(4, 4, 2, 32, 2, 2, num_classes=1000, condition_dropout=0.1, time_scale=1.0))
    torch.save({"ema": published_state(published, variance=True)}, "published.pt")
    imports = ("import", "published.pt", "published", "--from", source, "--autoencoder", small_set.autoencoder)
    assert lfm(*imports, "--num-heads", 2).exit_code == 0
    for name in CLASSES:
        shutil.copytree(small_set.images / name, Path("images") / name)
    assert lfm("shard", "images", "raw", "--image-size", 16).exit_code == 0
    assert lfm("encode", "raw", "latents", "--autoencoder", small_set.autoencoder).exit_code == 0
    Path("tuned.yaml").write_text(YAML)
    Path("classes.csv").write_text("cross,100\ndisc,200,300\nheart,400\n")
    options = ("--initialize-from", "published", "--class-map", "classes.csv")
    result = train(tmp_path / "tuned.yaml", options=options)
    assert result.returncode == 0 and "4 x 4" in result.stdout, result.stderr
    assert lfm("sample", "tuned", "--out", "samples", "--seeds", "0-2", "--num-steps", 2).exit_code == 0
    exported = lfm("export", "tuned", "pipeline", "--to", "diffusers")
    assert exported.exit_code == 0, exported.stderr

    pipeline = import_diffusers().DiffusionPipeline.from_pretrained("pipeline")
    assert pipeline.labels.keys() == set(CLASSES)
    images = pipeline(class_labels=[0, 2], num_inference_steps=10, guidance_scale=1.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    model = library.load("tuned")
    assert len(model.header.classes) == 3
    network, steps = model.network, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    if source == "dit":
        assert isinstance(network, NoisePrediction)
        network, steps = network.network, torch.arange(0, NUM_DIFFUSION_STEPS, STRIDE)[[0, 1, 20, 44, 49]]
    state, classes = torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 2, 0, 2])
    with torch.no_grad():
        ours = network(state, steps.float(), Condition(classes))
        theirs = pipeline.transformer(state, timestep=steps, class_labels=classes).sample
    torch.testing.assert_close(theirs, ours.reshape(theirs.shape), atol=2e-5, rtol=0)
