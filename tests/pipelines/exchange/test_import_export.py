"""Tests of `lfm import` and `lfm export`: the networks compute the same, and mistakes write nothing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm as library
from lfm import weights_file
from lfm.autoencoder import import_diffusers
from lfm.data import manifest as manifests
from lfm.flow.guidance import Guidance
from lfm.models.dit_config import DiTConfig
from lfm.models.noise_prediction import NoisePrediction
from lfm.solvers import Solving
from lfm.types import Condition
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.models import randomized_dit
from tests.support.published import PUBLISHED_DIT, published_inputs, published_state
from tests.support.recorded_values import CONFIG, FOLDER, recorded

PAPERS = FOLDER / "dit_class_model.pth"


@pytest.fixture
def run(small_set: SmallSet, tmp_path: Path) -> Path:
    """Return a run whose model diffusers can express."""
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = randomized_dit(DiTConfig(4, 8, 2, 32, 2, 2, num_classes=8, condition_dropout=0.1, frequency_shift=1)).eval()
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    (tmp_path / "run").mkdir()
    save_weights(str(tmp_path / "run" / weights_file.WEIGHTS), model.state_dict(), header)
    return tmp_path / "run"


@pytest.mark.parametrize("prefix", ["module.", ""])
@torch.no_grad()
def test_the_checkpoint_of_the_paper_has_its_outputs(small_set: SmallSet, tmp_path: Path, prefix: str) -> None:
    state = torch.load(PAPERS, weights_only=True)
    torch.save({prefix + name.removeprefix("module."): value for name, value in state.items()}, tmp_path / "theirs.pth")
    flags = ("--from", "lfm", "--num-heads", 4, "--autoencoder", small_set.autoencoder)
    result = lfm("import", tmp_path / "theirs.pth", tmp_path / "run", *flags)
    assert result.exit_code == 0, result.stderr
    model = library.load(str(tmp_path / "run"))
    assert model.header.model == CONFIG
    theirs = recorded("dit_class_io")
    out = model.network(theirs["x"], theirs["t"], Condition(theirs["y"]))
    torch.testing.assert_close(out, theirs["out"], atol=1e-5, rtol=0)
    assert lfm("sample", tmp_path / "run", "--out", tmp_path / "out", "--seeds", "0-1", "--num-steps", 1).exit_code == 0


@torch.no_grad()
def test_a_noise_predicting_dit_is_converted_while_sampling(small_set: SmallSet, tmp_path: Path) -> None:
    theirs = randomized_dit(PUBLISHED_DIT).eval()
    torch.save({"ema": published_state(theirs, variance=True), "model": {}}, tmp_path / "DiT.pt")
    flags = ("--from", "dit", "--num-heads", 2, "--autoencoder", small_set.autoencoder)
    result = lfm("import", tmp_path / "DiT.pt", tmp_path / "run", *flags)
    assert result.exit_code == 0 and "converted to a velocity while sampling" in result.stdout, result.stderr
    network = library.load(str(tmp_path / "run")).network
    assert isinstance(network, NoisePrediction)
    state, _, condition = published_inputs()
    torch.testing.assert_close(
        network.network(state, torch.full((5,), 7.0), condition), theirs(state, torch.full((5,), 7.0), condition)
    )


def test_import_then_export_then_import_is_the_identity(run: Path, small_set: SmallSet, tmp_path: Path) -> None:
    torch.save(published_state(randomized_dit(PUBLISHED_DIT).eval(), variance=False), tmp_path / "theirs.pt")
    flags = ("--from", "lfm", "--num-heads", 2, "--autoencoder", small_set.autoencoder)
    assert lfm("import", tmp_path / "theirs.pt", tmp_path / "one", *flags).exit_code == 0
    for source, again in ((tmp_path / "one", tmp_path / "two"), (run, tmp_path / "three")):
        file = tmp_path / f"{again.name}.safetensors"
        assert lfm("export", source, file, "--to", "safetensors").exit_code == 0
        assert lfm("import", file, again, "--from", "lfm").exit_code == 0
        assert (again / weights_file.WEIGHTS).read_bytes() == (source / weights_file.WEIGHTS).read_bytes()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("papers", [False, True])
@torch.no_grad()
def test_the_exported_pipeline_makes_the_same_images(
    run: Path, small_set: SmallSet, tmp_path: Path, guidance_scale: float, papers: bool
) -> None:
    if papers:  # time is not scaled, and its frequencies are not those of diffusers
        torch.save(published_state(randomized_dit(PUBLISHED_DIT).eval(), variance=False), tmp_path / "theirs.pt")
        flags = ("--from", "lfm", "--num-heads", 2, "--autoencoder", small_set.autoencoder)
        run = tmp_path / "imported"
        assert lfm("import", tmp_path / "theirs.pt", run, *flags).exit_code == 0
    result = lfm("export", run, tmp_path / "pipeline", "--to", "diffusers")
    assert result.exit_code == 0, result.stderr
    pipeline = import_diffusers().DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert papers or pipeline.get_label_ids(["heart"]) == [3]
    classes, steps = [3, 0, 7], 20
    theirs = pipeline(
        classes, guidance_scale, torch.Generator().manual_seed(5), num_inference_steps=steps, output_type="np"
    ).images
    model = library.load(str(run))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    velocity = model.velocity(Condition(torch.tensor(classes)), 3, Guidance(guidance_scale))
    ours = model.decode(Solving("euler", num_steps=steps)(velocity, noise))
    assert abs(np.round(theirs * 255) - ours).max() <= 1
    assert ours.std() > 5


def test_mistakes_are_one_line_and_write_nothing(run: Path, small_set: SmallSet, tmp_path: Path) -> None:
    theirs = published_state(randomized_dit(PUBLISHED_DIT).eval(), variance=False)
    codec, dest = ("--autoencoder", small_set.autoencoder), tmp_path / "dest"
    for name, content in {
        "ours.pt": theirs,
        "nothing.pt": {"a": torch.zeros(1)},
        "part.pt": {name: value for name, value in theirs.items() if "fc2" not in name},
        "state.pt": {"args": Namespace(x=1)},
        "list.pt": [1, 2],
    }.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name, flags, message in (
        ("ours.pt", ("--from", "sdxl"), "--from sdxl: unknown; one of lfm, dit, sit"),
        ("ours.pt", ("--from", "lfm", *codec), "--num-heads: no published model has width 32 and depth 2; set it"),
        ("ours.pt", ("--from", "lfm", "--num-heads", 2, "--num-classes", 5, *codec), "has 9 rows"),
        (
            "nothing.pt",
            ("--from", "sit"),
            "missing weight patch_embedding.weight: not a checkpoint of sit; check --from",
        ),
        ("part.pt", ("--from", "lfm", "--num-heads", 2), "is not a checkpoint of --from lfm"),
        ("state.pt", ("--from", "lfm"), "holds more than tensors"),
        ("list.pt", ("--from", "lfm"), "holds no weights by name"),
        ("junk.pt", ("--from", "lfm"), "junk.pt"),
        ("none.pt", ("--from", "lfm"), "none.pt"),
    ):
        assert_one_line(lfm("import", tmp_path / name, dest, *flags), message)
    assert_one_line(lfm("export", run, dest, "--to", "onnx"), "--to onnx: unknown; one of safetensors, diffusers")
    assert_one_line(lfm("export", run, dest, "--to", "safetensors"), "must end with .safetensors")
    assert_one_line(lfm("export", run, run, "--to", "diffusers"), "exists already")
    assert_one_line(lfm("import", tmp_path / "ours.pt", run, "--from", "lfm", *codec), "exists already")
    for command in (
        ("export", run, dest, "--to", "diffusers"),
        ("import", tmp_path / "ours.pt", dest, "--from", "lfm"),
    ):
        flags = ("--num-heads", 2, *codec) if command[0] == "import" else ()
        assert str(dest) in lfm(*command, *flags, "--dry-run").stdout
    assert not dest.exists()
