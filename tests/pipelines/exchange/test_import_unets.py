"""Tests of `lfm import` with checkpoints of the paper's ADM U-Nets in both published forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfm as library
from lfm.types import Condition
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.published_unet_forms import Recorder, Shape, edm_forward, guided_forward

EDM = Shape(num_classes=5, head_channels=16)
INPAINTING = Shape(in_channels=9, heads=4)


def save_checkpoint(shape: Shape, path: Path, prefix: str) -> Recorder:
    """Save a checkpoint with random weights as the paper's scripts do, of several GPUs where there is a prefix."""
    recorder = Recorder()
    state, time = torch.randn(2, shape.in_channels, shape.size, shape.size), torch.rand(2)
    classes = torch.tensor([0, 1]) if shape.num_classes else None
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
