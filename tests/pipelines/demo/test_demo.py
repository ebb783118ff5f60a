"""The demo: its commands are valid, and its score is the share of images with the requested class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lfm.synthetic.scenes import CLASS_NAMES, SEGMENT_NAMES, draw_scene
from pipelines.cli.main import main
from pipelines.common import image_files
from pipelines.demo import demo, draw_scenes
from pipelines.demo.demo_options import ScenesConfig
from tests.support.commands import lfm


def test_every_command_of_the_demo_is_one_that_the_command_line_accepts(tmp_path: Path) -> None:
    stages = demo.commands(tmp_path)
    assert list(stages) == ["scenes", "shard", "encode", "train", "sample"]
    for name, command in stages.items():
        if name == "train":
            program, script = command[0], command[command.index("--config") - 1]
            assert Path(program).name == "deepspeed" and Path(script).is_file()
            continue
        program, stage, *arguments = command
        assert Path(program).name == "lfm" and stage == name
        with main.make_context("lfm", [stage, *arguments]) as context:
            stage_command = main.commands[stage]
            stage_command.make_context(stage, list(arguments), parent=context)


def test_each_stage_reads_what_the_one_before_it_wrote(tmp_path: Path) -> None:
    stages = demo.commands(tmp_path)
    written = {name: Path(stages[name][at]) for name, at in (("scenes", 2), ("shard", 3), ("encode", 3))}
    assert Path(stages["shard"][2]) == written["scenes"] / "images"
    assert Path(stages["encode"][2]) == written["shard"]
    assert f"data.shards={written['encode']}" in stages["train"]
    assert f"run={stages['sample'][2]}" in stages["train"]


@pytest.mark.parametrize("shift", [0, 1])
def test_the_score_is_the_share_of_images_with_the_requested_class(tmp_path: Path, shift: int) -> None:
    scenes = [draw_scene(0, index, 64) for index in range(20)]
    entries = []
    for index, scene in enumerate(scenes):
        image_files.save(scene.image, tmp_path / f"{index}.png")
        requested = (scene.class_index + shift * (index % 2)) % len(CLASS_NAMES)
        entries.append({"file": f"{index}.png", "class_index": requested})
    (tmp_path / "samples.json").write_text(json.dumps({"pictures": entries}))
    assert demo.recognised_share(tmp_path) == pytest.approx(0.5 if shift else 1)


def test_scenes_are_written_with_classes_segmentations_and_masks(tmp_path: Path) -> None:
    draw_scenes.run(ScenesConfig(str(tmp_path), num=6, image_size=16, seed=3))
    scene = draw_scene(3, 4, 16)
    name = f"{CLASS_NAMES[scene.class_index]}/000004.png"
    expected = {"images": scene.image, "segmentations": scene.segmentation, "masks": 255 * scene.mask}
    for folder, pixels in expected.items():
        with image_files.Image.open(tmp_path / folder / name) as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert (tmp_path / "labels.txt").read_text().split("\n") == list(SEGMENT_NAMES)
    assert len(list((tmp_path / "images").rglob("*.png"))) == 6


def test_dead_leaves_need_no_labels_and_an_unknown_kind_is_named(tmp_path: Path) -> None:
    assert lfm("scenes", tmp_path / "leaves", "--kind", "leaves", "--num", 2, "--image-size", 8).exit_code == 0
    assert [path.name for path in (tmp_path / "leaves").iterdir()] == ["images"]
    result = lfm("scenes", tmp_path / "other", "--kind", "leafs")
    assert result.exit_code == 2 and "--kind" in result.stderr and "leaves" in result.stderr
