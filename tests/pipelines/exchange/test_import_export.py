"""Checkpoints of others in, ours out, and both ways again."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lfm as library
from lfm import weights_file
from lfm.autoencoder import import_diffusers
from lfm.conversion import published_checkpoints
from lfm.conversion.to_diffusers import to_diffusers
from lfm.data import manifest as manifests
from lfm.errors import ConfigError
from lfm.flow.guidance import Guidance
from lfm.models.dit import DiT
from lfm.models.dit_config import DiTConfig
from lfm.models.noise_prediction import NUM_DIFFUSION_STEPS, NoisePrediction
from lfm.solvers import Solving
from lfm.types import Condition
from lfm.weights_file import WeightsHeader, save_weights
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.models import randomized_dit
from tests.support.recorded_values import CONFIG, FOLDER, recorded

PAPERS = FOLDER / "dit_class_model.pth"
SHAPE = DiTConfig(4, 8, 2, 32, 2, 2, num_classes=8, condition_dropout=0.1, time_scale=1.0)


def published_state(model: DiT, *, variance: bool) -> dict[str, Tensor]:
    """A model as DiT and SiT save theirs: other names, the position among the weights, a variance beside the mean."""
    config, state = model.config, {}
    for name, value in model.state_dict().items():
        if variance and name.startswith("final.linear"):
            parts = value.unflatten(0, (config.patch_size**2, config.latent_channels))
            value = torch.cat([parts, torch.randn_like(parts)], 1).flatten(0, 1)
        for theirs, ours in list(published_checkpoints.NAMES.items())[::-1]:
            name = name.replace(ours, theirs, 1) if ours else name
        state[name] = value
    return state | {"pos_embed": model.position[None]}


def inputs() -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    return torch.randn(5, 4, 8, 8), torch.rand(5), Condition(torch.tensor([0, 3, 7, 8, 8]))


@pytest.fixture
def run(small_set: SmallSet, tmp_path: Path) -> Path:
    """A run whose model diffusers can express."""
    manifest = manifests.load(str(small_set.latents), "latents")
    assert manifest.autoencoder is not None
    model = randomized_dit(DiTConfig(4, 8, 2, 32, 2, 2, num_classes=8, condition_dropout=0.1, frequency_shift=1)).eval()
    header = WeightsHeader(model.config, manifest.autoencoder, 16, manifest.classes, 64, manifest.digest, "test")
    (tmp_path / "run").mkdir()
    save_weights(str(tmp_path / "run" / weights_file.WEIGHTS), model.state_dict(), header)
    return tmp_path / "run"


@pytest.mark.parametrize("prefix", ["module.", ""])
@torch.no_grad()
def test_the_papers_checkpoint_gives_the_papers_outputs(small_set: SmallSet, tmp_path: Path, prefix: str) -> None:
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
def test_without_classes_the_null_class_becomes_part_of_the_time() -> None:
    state, theirs = torch.load(PAPERS, weights_only=True), recorded("dit_class_io")
    weights, config = published_checkpoints.from_state_dict(state, "lfm", num_heads=4, num_classes=0)
    assert config.num_classes is None and config.condition_dropout == 0
    model = DiT(config).eval()
    model.load_state_dict(weights)
    torch.testing.assert_close(model(theirs["x"], theirs["t"], Condition()), theirs["out_y_none"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_sit_is_turned_exactly() -> None:
    theirs, (state, time, condition) = randomized_dit(SHAPE).eval(), inputs()
    weights, config = published_checkpoints.from_state_dict(published_state(theirs, variance=True), "sit", num_heads=2)
    assert config == SHAPE
    ours = DiT(config).eval()
    ours.load_state_dict(weights)
    torch.testing.assert_close(ours(state, time, condition), -theirs(state, 1 - time, condition), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dit_predicts_noise_and_is_converted_as_it_samples(small_set: SmallSet, tmp_path: Path) -> None:
    theirs = randomized_dit(SHAPE).eval()
    torch.save({"ema": published_state(theirs, variance=True), "model": {}}, tmp_path / "DiT.pt")
    flags = ("--from", "dit", "--num-heads", 2, "--autoencoder", small_set.autoencoder)
    result = lfm("import", tmp_path / "DiT.pt", tmp_path / "run", *flags)
    assert result.exit_code == 0 and "converted to a velocity while sampling" in result.stdout, result.stderr
    network = library.load(str(tmp_path / "run")).network
    assert isinstance(network, NoisePrediction)
    state, _, condition = inputs()
    torch.testing.assert_close(
        network.network(state, torch.full((5,), 7.0), condition), theirs(state, torch.full((5,), 7.0), condition)
    )


class NoiseOfNormalData(nn.Module):
    """The best prediction of the noise where data are normal with this spread, of a step between whole ones too."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, state: Tensor, step: Tensor, condition: Condition) -> Tensor:
        kept = (1 - torch.linspace(1e-4, 0.02, NUM_DIFFUSION_STEPS, dtype=torch.float64)).cumprod(0)
        log_ratio = np.interp(step.double(), range(NUM_DIFFUSION_STEPS), ((1 - kept) / kept).log() / 2)
        data_share = (1 + torch.from_numpy(np.exp(2 * log_ratio))).rsqrt().view(-1, 1, 1, 1)
        noise_share = (1 - data_share**2).sqrt()
        return noise_share * state / ((data_share * self.spread) ** 2 + noise_share**2)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_a_prediction_of_noise_leads_where_the_velocity_does(spread: float) -> None:
    state, time = torch.randn(40, 1, 2, 2), torch.linspace(0.02, 0.99, 40)
    found = NoisePrediction(NoiseOfNormalData(spread))(state, time, Condition())
    t = time.view(-1, 1, 1, 1)
    slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
    torch.testing.assert_close(found.float(), slope * state, atol=1e-3, rtol=1e-3)
    ends = NoisePrediction(NoiseOfNormalData(spread))(state[:2], torch.tensor([0.0, 1.0]), Condition())
    assert ends.isfinite().all()


def test_import_then_export_then_import_is_the_identity(run: Path, small_set: SmallSet, tmp_path: Path) -> None:
    torch.save(published_state(randomized_dit(SHAPE).eval(), variance=False), tmp_path / "theirs.pt")
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
def test_diffusers_alone_makes_our_images(
    run: Path, small_set: SmallSet, tmp_path: Path, guidance_scale: float, papers: bool
) -> None:
    if papers:  # time is not scaled, and its frequencies are not those of diffusers
        torch.save(published_state(randomized_dit(SHAPE).eval(), variance=False), tmp_path / "theirs.pt")
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frequency_shift": 0}, "other time frequencies; train with model.frequency_shift: 1"),
        ({"condition_channels": 5}, "condition_channels 5: diffusers' DiTTransformer2DModel has no such part"),
        ({"num_labels": 3}, "num_labels 3: diffusers"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0: diffusers"),
        ({"num_classes": 1001}, "num_classes 1001"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(change: dict, said: str) -> None:
    shape = {"num_classes": 8, "condition_dropout": 0.1, "frequency_shift": 1} | change
    config = DiTConfig(4, 8, 2, 32, 2, 2, **shape)
    with pytest.raises(ConfigError, match=said):
        to_diffusers(DiT(config).state_dict(), config)


def test_mistakes_are_one_line_and_write_nothing(run: Path, small_set: SmallSet, tmp_path: Path) -> None:
    theirs = published_state(randomized_dit(SHAPE).eval(), variance=False)
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
    for name, flags, said in (
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
        assert_one_line(lfm("import", tmp_path / name, dest, *flags), said)
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
