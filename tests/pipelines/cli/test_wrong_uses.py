"""Wrong uses of commands end in one line that names the file or flag and the repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import Tasks, assert_one_line, lfm

WRONG_USES = [
    ("shard {images} {file}", "{file}: is a file"),
    ("shard {images} {new} --sheet {folder}", "--sheet {folder}: must be a file name that ends with .png"),
    ("encode {latents} {new}", "holds latent shards, raw ones are needed"),
    ("encode {raw} {file}", "{file}: is a file"),
    ("encode {raw} {new} --autoencoder nowhere", "autoencoder nowhere: no such folder; name one, or an id of the Hub"),
    ("inspect {runs}/class", "{runs}/class: is a run; `lfm status` describes it"),
    ("inspect {raw} --out {folder}", "--out {folder}: must be a file name that ends with .png"),
    ("inspect {raw} --out {file}/sheet.png", "{file}/sheet.png: is a file, or lies below one"),
    ("train --config {file}x --dry-run", "{file}x: cannot be read: no such file"),
    ("sample {runs}/class --out {file}", "{file}: is a file"),
    (
        "sample {runs}/class --out {new} --guidance internal --guidance-scale 2",
        "class: was trained without model.internal",
    ),
    (
        "sample {runs}/class --out {new} --guidance sparse --guidance-scale 2",
        "class: was trained without model.token_dr",
    ),
    ("reference {runs}/class {new}.safetensors", "{runs}/class: is a run, and holds no images"),
    ("reference {file} {new}.safetensors", "{file}: is a file, where a folder is needed"),
    ("compare {file}x demo --out {new}", "{file}x: cannot be read: no such file"),
    ("compare demo dem --out {new}", "dem: neither a file nor the name of a shipped experiment; did you mean demo?"),
    ("ema {new} --sigma-rel 0.1", "{new}: no such folder; name the run folder of a training"),
    ("push {runs}/class me", "REPOSITORY me: must be USER/NAME, such as me/flowers"),
    ("import {new} {new}2 --from dit", "{new}: no such file; name the file of a checkpoint"),
    ("scenes {raw} --num 2", "{raw}: holds images of other settings, or other files"),
    ("scenes {file} --num 2", "{file}: is a file"),
]


@pytest.mark.parametrize(("command", "message"), WRONG_USES, ids=[command for command, _ in WRONG_USES])
def test_a_wrong_use_is_one_line(tasks: Tasks, tmp_path: Path, command: str, message: str) -> None:
    places = {"images": tasks.scenes / "images", "raw": tasks.raw, "latents": tasks.latents, "runs": tasks.runs}
    places |= {"file": tmp_path / "file.txt", "folder": tmp_path / "folder", "new": tmp_path / "new"}
    places["file"].write_text("text")
    places["folder"].mkdir()
    result = lfm(*(word.format(**places) for word in command.split()))
    assert_one_line(result, message.format(**places))
    assert places["file"].read_text() == "text" and not list(places["folder"].iterdir())


def test_scenes_resume_in_their_own_folder_alone(tmp_path: Path) -> None:
    command = ("scenes", tmp_path / "scenes", "--image-size", 8)
    for num in (3, 3, 5):  # the same command, and one that draws more
        assert lfm(*command, "--num", num).exit_code == 0
    for other in (("--num", 2), ("--num", 9, "--seed", 1), ("--num", 9, "--kind", "leaves")):
        assert_one_line(lfm(*command, *other), tmp_path / "scenes", "choose another folder")
    assert len(list((tmp_path / "scenes" / "images").rglob("*.png"))) == 5


def test_a_model_with_masks_is_evaluated_on_pairs(tasks: Tasks, tmp_path: Path) -> None:
    reference = tmp_path / "reference.safetensors"
    made = lfm("reference", tasks.raw, reference)
    assert made.exit_code == 0, made.stderr
    result = lfm("evaluate", tasks.runs / "inpaint", "--reference", reference, "--out", tmp_path / "out", "--num", 4)
    assert_one_line(result, tasks.runs / "inpaint", "name raw shards that have these with --pairs")
