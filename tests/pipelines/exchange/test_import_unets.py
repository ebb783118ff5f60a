"""Tests of `lfm import` with checkpoints of the paper's ADM U-Nets in both published forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, interpolate, one_hot

import lfm as library
from lfm.inference.condition_inputs import encode_conditions
from lfm.types import Condition
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.published_unet_forms import Recorder, Shape, edm_forward, guided_forward

EDM = Shape(num_classes=5, head_channels=16)
INPAINTING = Shape(in_channels=9, heads=4)
SEMANTIC = Shape(in_channels=8, heads=4)
NUM_LABELS = 3


def save_checkpoint(shape: Shape, path: Path, prefix: str) -> Recorder:
    """Save a checkpoint with random weights as the paper's scripts do, of several GPUs where there is a prefix."""
    recorder = Recorder()
    state, time = torch.randn(2, shape.in_channels, shape.size, shape.size), torch.rand(2)
    classes = torch.tensor([0, 0]) if shape.num_classes else None
    (guided_forward if shape.heads else edm_forward)(recorder, shape, time, state, classes)
    torch.save({prefix + name: value.float() for name, value in recorder.weights.items()}, path)
    return recorder


@pytest.mark.parametrize("prefix", ["module.", ""])
@torch.no_grad()
def test_a_class_conditional_edm_checkpoint(small_set: SmallSet, tmp_path: Path, prefix: str) -> None:
    recorder = save_checkpoint(EDM, tmp_path / "adm.pth", prefix)
    flags = ("--from", "lfm", "--num-heads", 4, "--autoencoder", small_set.autoencoder)
    result = lfm("import", tmp_path / "adm.pth", tmp_path / "run", *flags)
    assert result.exit_code == 0, result.stderr
    model = library.load(str(tmp_path / "run"))
    state, time = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.4, 1.0])
    expected = edm_forward(recorder, EDM, time, state, torch.tensor([4, 0, -1]))
    velocity = model.network(state, time, Condition(torch.tensor([4, 0, 5])))
    torch.testing.assert_close(velocity, expected.float(), atol=1e-4, rtol=1e-4)
    sampled = lfm(
        "sample", tmp_path / "run", "--out", tmp_path / "out", "--seeds", "0-1", "--num-steps", 1, "--guidance-scale", 2
    )
    assert sampled.exit_code == 0, sampled.stderr

    result = lfm("import", tmp_path / "adm.pth", tmp_path / "unconditional", *flags, "--num-classes", 0)
    assert result.exit_code == 0, result.stderr
    null = library.load(str(tmp_path / "unconditional")).network(state[2:], time[2:], Condition())
    torch.testing.assert_close(null, expected[2:].float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_inpainting_checkpoint_of_guided_diffusions_form(small_set: SmallSet, tmp_path: Path) -> None:
    recorder = save_checkpoint(INPAINTING, tmp_path / "inpaint.pth", "module.")
    flags = ("--from", "lfm", "--autoencoder", small_set.autoencoder)
    assert_one_line(lfm("import", tmp_path / "inpaint.pth", tmp_path / "run", *flags), "--image-size")
    result = lfm("import", tmp_path / "inpaint.pth", tmp_path / "run", *flags, "--image-size", 16)
    assert result.exit_code == 0, result.stderr
    model = library.load(str(tmp_path / "run"))
    assert model.header.model.condition_channels == 5
    state, time = torch.randn(2, 9, 8, 8), torch.tensor([0.3, 0.8])
    velocity = model.network(state[:, :4], time, Condition(spatial=state[:, 4:]))
    torch.testing.assert_close(
        velocity, guided_forward(recorder, INPAINTING, time, state).float(), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_an_inpainting_checkpoint_gets_black_pixels_and_a_mask_of_minus_one_and_one(
    small_set: SmallSet, tmp_path: Path
) -> None:
    save_checkpoint(INPAINTING, tmp_path / "inpaint.pth", "")
    flags = ("--from", "lfm", "--autoencoder", small_set.autoencoder, "--image-size", 16)
    result = lfm("import", tmp_path / "inpaint.pth", tmp_path / "run", *flags)
    assert "missing pixels are black" in result.stdout and "-1 or 1 at the nearest pixel" in result.stdout
    model = library.load(str(tmp_path / "run"))
    factor = model.autoencoder.downsample_factor
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[:, 3:9, 2:12] = 1
    spatial = encode_conditions(model.header, model.autoencoder, images=image, masks=mask).spatial
    assert spatial is not None
    black = torch.from_numpy(image * (1 - mask[..., None])).permute(0, 3, 1, 2)
    expected = (model.autoencoder.encode(black).mean - model.autoencoder.shift) * model.autoencoder.scale_factor
    torch.testing.assert_close(spatial[:, :4], expected)
    nearest = interpolate(torch.from_numpy(mask)[:, None].float(), size=(16 // factor, 16 // factor), mode="nearest")
    assert torch.equal(spatial[:, 4:], 2 * nearest - 1)


@torch.no_grad()
def test_a_semantic_checkpoint_with_its_rescaler_takes_segmentations(small_set: SmallSet, tmp_path: Path) -> None:
    recorder = save_checkpoint(SEMANTIC, tmp_path / "semantic.pth", "module.")
    rescaler = torch.randn(4, NUM_LABELS, 1, 1)
    torch.save({"module.channel_mapper.weight": rescaler}, tmp_path / "cond_stage_model.pth")
    flags = ("--from", "lfm", "--autoencoder", small_set.autoencoder, "--image-size", 16)
    result = lfm("import", tmp_path / "semantic.pth", tmp_path / "alone", *flags)
    assert result.exit_code == 0 and "--rescaler" in result.stdout, result.stdout
    assert library.load(str(tmp_path / "alone")).header.model.condition_channels == 4
    flags += ("--rescaler", tmp_path / "cond_stage_model.pth")
    result = lfm("import", tmp_path / "semantic.pth", tmp_path / "run", *flags)
    assert result.exit_code == 0, result.stderr
    model = library.load(str(tmp_path / "run"))
    assert (model.header.model.num_labels, model.header.model.condition_channels) == (NUM_LABELS, 0)
    state, time, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.randint(NUM_LABELS, (2, 16, 16))
    rescaled = one_hot(labels, NUM_LABELS).permute(0, 3, 1, 2).float()
    while rescaled.shape[-1] > 8:  # as the paper's code halves it
        rescaled = interpolate(rescaled, scale_factor=0.5, mode="bilinear")
    expected = guided_forward(recorder, SEMANTIC, time, torch.cat([state, conv2d(rescaled, rescaler)], 1))
    velocity = model.network(state, time, Condition(segmentation=labels))
    torch.testing.assert_close(velocity, expected.float(), atol=1e-4, rtol=1e-4)
    images = model.sample([0], segmentations=labels[:1].numpy().astype(np.uint8), num_steps=1).images
    assert images.shape == (1, 16, 16, 3)


@torch.no_grad()
def test_the_only_class_of_a_checkpoint_without_a_null_class_is_no_condition(
    small_set: SmallSet, tmp_path: Path
) -> None:
    shape = Shape(heads=4, num_classes=1)
    recorder = save_checkpoint(shape, tmp_path / "adm.pth", "module.")
    flags = ("--from", "lfm", "--autoencoder", small_set.autoencoder, "--image-size", 16)
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    expected = guided_forward(recorder, shape, time, state, torch.tensor([0, 0])).float()
    for name, more in (("default", ()), ("zero", ("--num-classes", 0))):
        result = lfm("import", tmp_path / "adm.pth", tmp_path / name, *flags, *more)
        assert result.exit_code == 0, result.stderr
        velocity = library.load(str(tmp_path / name)).network(state, time, Condition())
        torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)


def test_mistakes_are_one_line(small_set: SmallSet, tmp_path: Path) -> None:
    recorder = save_checkpoint(EDM, tmp_path / "adm.pth", "")
    flags = ("--from", "lfm", "--num-heads", 4, "--autoencoder", small_set.autoencoder)
    assert_one_line(
        lfm("import", tmp_path / "adm.pth", tmp_path / "run", *flags, "--num-classes", 7), "--num-classes 7"
    )
    assert_one_line(lfm("import", tmp_path / "adm.pth", tmp_path / "run", *flags, "--image-size", 32), "size")
    del recorder.weights["out_norm.weight"]
    torch.save(recorder.weights, tmp_path / "part.pth")
    assert_one_line(lfm("import", tmp_path / "part.pth", tmp_path / "run", *flags), "part.pth", "output_norm.weight")
    torch.save(recorder.weights | {"extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    assert_one_line(lfm("import", tmp_path / "more.pth", tmp_path / "run", *flags), "more.pth", "extra.weight")
    assert not (tmp_path / "run").exists()
