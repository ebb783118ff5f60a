"""The page makes the images of `lfm sample`, whose notes and archive say how."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lfm import weights_file
from lfm.errors import CheckpointError, ConfigError, LfmError
from pipelines.web.image_maker import ImageMaker, PageImages, PageRequest
from tests.support.commands import Tasks, lfm

CPU = torch.device("cpu")


def ignore(share: float) -> None:
    """Report progress to nobody."""


def make(folder: Path, run: Path, **options: Any) -> PageImages:
    folder.mkdir()
    request = PageRequest(run=str(run), **{"seeds": "0-2", "num_steps": 2} | options)
    return ImageMaker(CPU).make(request, folder, ignore)


def inputs(tasks: Tasks) -> dict[str, np.ndarray]:
    """Return an image, a mask and a segmentation of 16 pixels, as the page reads them."""
    name = sorted((tasks.scenes / "images").rglob("*.png"))[0].relative_to(tasks.scenes / "images")
    image, mask, ids = (
        np.asarray(Image.open(tasks.scenes / kind / name)) for kind in ("images", "masks", "segmentations")
    )
    return {"image": image, "mask": (mask > 127).astype(np.uint8), "segmentation": ids}


@pytest.mark.parametrize(
    ("task", "names", "options"),
    [
        ("none", (), {"solver": "sde"}),
        ("none", (), {"solver": "dopri5"}),
        ("class", (), {"classes": (6, 2), "guidance_scale": 2.5}),
        ("inpaint", ("image", "mask"), {"composite": False}),
        ("both", ("image", "mask"), {"classes": (1,), "precision": "bf16"}),
        ("semantic", ("segmentation",), {"guidance_scale": 2.0}),
    ],
)
def test_images_and_notes_are_those_of_lfm_sample(
    tasks: Tasks, tmp_path: Path, task: str, names: tuple[str, ...], options: dict[str, Any]
) -> None:
    arrays = {name: array for name, array in inputs(tasks).items() if name in names}
    page = make(tmp_path / "page", tasks.runs / task, **options, **arrays)
    with zipfile.ZipFile(page.archive) as archive:
        archive.extractall(tmp_path)
    flags: list[object] = ["--seeds", "0-2"]
    flags += [part for name in names for part in (f"--{name}", f"{tmp_path / name}.png")]
    if options.get("solver") != "dopri5":
        flags += ["--num-steps", 2]
    for key in ("solver", "guidance_scale", "precision"):
        flags += [f"--{key.replace('_', '-')}", options[key]] if key in options else []
    flags += ["--no-composite"] if not options.get("composite", True) else []
    classes = options.get("classes", (None,))
    assert page.num_columns == (len(classes) if "classes" in options else None)
    for column, index in enumerate(classes):
        out = tmp_path / f"sample-{index}"
        chosen = [] if index is None else ["--class-index", index]
        result = lfm("sample", tasks.runs / task, "--out", out, *flags, *chosen)
        assert result.exit_code == 0, result.output
        for seed, (path, caption) in enumerate(page.images[column :: len(classes)]):
            assert caption.startswith(f"seed {seed}")
            own, other = Image.open(path), Image.open(out / f"{seed:06d}.png")
            assert np.array_equal(np.asarray(own), np.asarray(other))
            if not names:  # the names of inputs are those in the archive
                assert own.info == other.info


def test_the_archive_repeats_its_images(tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {name: inputs(tasks)[name] for name in ("image", "mask")}
    page = make(tmp_path / "page", tasks.runs / "inpaint", seeds="5", trajectory=True, **arrays)
    with zipfile.ZipFile(page.archive) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert sorted(names) == ["000005.png", "image.png", "mask.png", "record.json", "trajectory.png"]
    monkeypatch.chdir(tmp_path)
    report = lfm("inspect", "000005.png").stdout
    line = report.split("lfm sample ")[1].replace("OUT", "again").split()
    assert lfm("sample", *line).exit_code == 0
    assert (tmp_path / "again" / "000005.png").read_bytes() == (tmp_path / "000005.png").read_bytes()


def test_progress_is_monotone_and_ends_at_one(tasks: Tasks, tmp_path: Path) -> None:
    shares: list[float] = []
    request = PageRequest(str(tasks.runs / "class"), "0-4", classes=(0, 3), num_steps=3)
    ImageMaker(CPU, batch_size=2).make(request, tmp_path, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 2 * 3 * 3


def test_what_progress_raises_ends_the_work(tasks: Tasks, tmp_path: Path) -> None:
    def stop(share: float) -> None:
        raise LfmError("stopped")

    with pytest.raises(LfmError, match="stopped"):
        ImageMaker(CPU).make(PageRequest(str(tasks.runs / "none"), "0"), tmp_path, stop)
    assert not list(tmp_path.glob("0*.png"))


def test_a_model_is_loaded_once_until_its_run_is_trained_further(tasks: Tasks, tmp_path: Path) -> None:
    maker, run = ImageMaker(CPU), str(tmp_path)
    weights, header = weights_file.load_weights(str(tasks.runs / "none"))
    path = str(tmp_path / weights_file.WEIGHTS)
    weights_file.save_weights(path, weights, header)
    maker.prepare(run)
    options = {"precision": None, "autoencoder": None, "device": CPU}
    first = maker.load(run, **options)
    assert maker.load(run, **options) is first
    assert maker.load(run, **options | {"precision": "bf16"}).precision == "bf16"
    weights_file.save_weights(path, weights, dataclasses.replace(header, samples_seen=header.samples_seen + 1))
    assert maker.load(run, **options).header.samples_seen == header.samples_seen + 1


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("class", {"classes": ()}, "at least one class"),
        ("class", {"classes": (0, 1), "seeds": "0-200"}, "402 images: the page makes at most 256"),
        ("none", {"seeds": "a"}, "`seeds` a"),
        ("none", {"num_steps": 0}, "`num_steps` 0: must be at least 1"),
        ("none", {"solver": "torchdiffeq-dopri5", "trajectory": True}, "does not show its steps"),
        ("undropped", {"guidance_scale": 2.0}, "condition_dropout"),
    ],
)
def test_mistakes_are_one_line(tasks: Tasks, tmp_path: Path, task: str, options: dict[str, Any], message: str) -> None:
    arrays = {name: inputs(tasks)[name] for name in ("image", "mask")} if task == "undropped" else {}
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "page", tasks.runs / task, **options, **arrays)


def test_a_run_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        make(tmp_path / "page", tmp_path / "gone")
