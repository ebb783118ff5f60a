"""An image of `lfm sample` says how it was made, and the command that it prints makes it again, byte for byte."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from pipelines.common import image_files
from tests.support.commands import Tasks, assert_one_line, lfm

STEPS = ("--num-steps", "2")


def make_again(image: Path, out: Path) -> Path:
    """Run the command that `lfm inspect` prints for an image, and return the image that it makes."""
    inspected = lfm("inspect", image)
    assert inspected.exit_code == 0, inspected.output
    (line,) = (line for line in inspected.stdout.splitlines() if "again" in line)
    program, *arguments = shlex.split(line.split("again", 1)[1])
    assert program == "lfm"
    made = lfm(*(str(out) if argument == "OUT" else argument for argument in arguments))
    assert made.exit_code == 0, made.output
    (again,) = out.glob("0*.png")
    return again


@pytest.mark.parametrize(
    ("task", "options", "file"),
    [
        ("none", (), "000002.png"),
        ("class", ("--guidance-scale", "1,2.5", "--guidance-interval", "0.1,0.9"), "000003-2.5.png"),
        ("class", ("--class", "star,disc", "--solver", "dopri5", "--rtol", "1e-3"), "000001.png"),
        ("inpaint", ("--shards", "{raw}", "--no-composite"), "000003.png"),
        ("both", ("--shards", "{raw}", "--rows", "1,5"), "000003.png"),
        ("semantic", ("--shards", "{raw}", "--rows", "2-4", "--time-shift", "2"), "000001.png"),
    ],
)
def test_the_command_of_an_image_makes_it_again(
    task: str, options: tuple[str, ...], file: str, tasks: Tasks, tmp_path: Path
) -> None:
    steps = () if "--solver" in options else STEPS
    options = tuple(option.format(raw=tasks.raw) for option in options)
    first = tmp_path / "first"
    # one image at a time: kernels for batches of other sizes may round otherwise
    made = lfm("sample", tasks.runs / task, "--out", first, "--seeds", "0-3", "--batch-size", "1", *steps, *options)
    assert made.exit_code == 0, made.output
    again = make_again(first / file, tmp_path / "again")
    assert again.read_bytes() == (first / file).read_bytes()


def test_files_with_spaces_are_quoted(tasks: Tasks, tmp_path: Path) -> None:
    (segmentation,) = sorted(tasks.scenes.rglob("segmentations/**/*.png"))[:1]
    copy = tmp_path / "a map.png"
    copy.write_bytes(segmentation.read_bytes())
    common = ("--out", tmp_path / "first", "--seeds", "4", "--crop", "centre", *STEPS)
    assert lfm("sample", tasks.runs / "semantic", "--segmentation", copy, *common).exit_code == 0
    image = tmp_path / "first" / "000004.png"
    assert f"'{copy}'" in lfm("inspect", image).stdout
    assert make_again(image, tmp_path / "again").read_bytes() == image.read_bytes()


def test_the_report_names_class_seed_and_weights(tasks: Tasks, tmp_path: Path) -> None:
    lfm("sample", tasks.runs / "class", "--out", tmp_path / "out", "--seeds", "7", "--class", "star", *STEPS)
    report = lfm("inspect", tmp_path / "out" / "000007.png").stdout
    for part in ("seed 7", "class    star", f"weights  {tasks.runs / 'class'}", "4 network evaluations", "digest"):
        assert part in report


@pytest.mark.parametrize("note", [None, [], {"digest": "x"}, {"options": {"run": "x", "no_option": 1}}, {"options": 3}])
def test_other_images_are_one_line(note: object, tmp_path: Path) -> None:
    image_files.save(np.zeros((4, 4, 3), np.uint8), tmp_path / "image.png", note=note)
    assert_one_line(lfm("inspect", tmp_path / "image.png"), "image.png", "does not say how it was made")


def test_a_file_that_is_no_png_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"GIF89a")
    assert_one_line(lfm("inspect", tmp_path / "image.png"), "does not say how it was made")
    assert_one_line(lfm("inspect", tmp_path / "missing.png"), "missing.png")
    (tmp_path / "photo.jpg").write_bytes(b"GIF89a")
    assert_one_line(lfm("inspect", tmp_path / "photo.jpg"), "photo.jpg", "PNGs of `lfm sample`", "name their folder")
