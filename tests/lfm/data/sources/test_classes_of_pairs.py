"""Images with masks or segmentations in folders of classes: where folders are classes, and that annotations are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfm.data import manifest as manifests
from lfm.data.sources.layouts import read
from lfm.data.sources.source import Choices
from lfm.errors import ConfigError
from lfm.types import RawSample
from tests.support.commands import assert_one_line, lfm
from tests.support.image_collections import IDS, photo, write_folder, write_tar, write_zip
from tests.support.images import raw_samples

HOLE = np.zeros(IDS.shape, np.uint8)
HOLE[8:24, 8:40] = 255
CLASSES = ("cat", "dog")


def files_of(image: str, annotation: str, content: np.ndarray, classes: tuple[str, ...] = CLASSES) -> dict:
    """Return three images of each class with their annotations, by patterns of their paths."""
    files: dict = {}
    for place, name in enumerate(classes):
        for number in range(3):
            files[image.format(name, number)] = photo(3 * place + number)
            files[annotation.format(name, number)] = content
    return files


CORRESPONDING = {
    "masks": ("images/{}/{}.jpg", "masks/{}/{}.png", HOLE, None),
    "masks with an end": ("images/{}/{}.jpg", "masks/{}/{}_mask.png", HOLE, None),
    "segmentations": ("images/{}/{}.jpg", "segmentation/{}/{}.png", IDS, None),
    "paired": ("images/{}/{}.jpg", "annotations/{}/{}.png", IDS, None),
    "wrapped": ("photos/images/{}/{}.jpg", "photos/masks/{}/{}.png", HOLE, None),
    "split outside": ("train/images/{}/{}.jpg", "train/masks/{}/{}.png", HOLE, "train"),
    "split inside": ("images/train/{}/{}.jpg", "masks/train/{}/{}.png", HOLE, "train"),
    "split as folder": ("train/{}/{}.jpg", "train_masks/{}/{}_mask.png", HOLE, "train"),
}


@pytest.mark.parametrize("name", CORRESPONDING)
def test_folders_that_images_and_annotations_share_are_classes(name: str, tmp_path: Path) -> None:
    image, annotation, content, split = CORRESPONDING[name]
    write_folder(tmp_path / "source", files_of(image, annotation, content))
    source = read(str(tmp_path / "source"), split=split)
    field = "mask" if content is HOLE else "segmentation"
    assert source.class_names == CLASSES and source.fields == {field} and len(source.items) == 6
    for item in source.items:
        name_of_class = source.class_names[item.class_index]
        assert f"/{name_of_class}/" in item.image and f"/{name_of_class}/" in getattr(item, field)
    none = read(str(tmp_path / "source"), split=split, choices=Choices(classes="none"))
    assert none.class_names == () and none.fields == {field}
    assert not any("classes" in note for note in none.about.notes)


NOT_CORRESPONDING = {
    "folders around both": ("{}/images/{}.jpg", "{}/masks/{}.png", HOLE),
    "masks beside images": ("{}/{}.jpg", "{}/{}_mask.png", HOLE),
    "numbered masks beside images": ("{}/{}.jpg", "{}/{}_mask001.png", HOLE),
    "cities": ("leftImg8bit/{0}/{0}_{1}_leftImg8bit.png", "gtFine/{0}/{0}_{1}_gtFine_labelIds.png", IDS),
    "masks in one folder": ("images/{0}/{0}{1}.jpg", "masks/{0}{1}.png", HOLE),
}


@pytest.mark.parametrize("name", NOT_CORRESPONDING)
@pytest.mark.parametrize("choice", ["folders", "inner-folders"])
def test_other_folders_are_classes_if_the_user_says_so(name: str, choice: str, tmp_path: Path) -> None:
    write_folder(tmp_path, files_of(*NOT_CORRESPONDING[name]))
    source = read(str(tmp_path))
    assert source.class_names == () and any("`classes` folders does" in note for note in source.about.notes)
    chosen = read(str(tmp_path), choices=Choices(classes=choice))
    assert chosen.class_names == CLASSES and chosen.fields == source.fields
    assert [(item.image, item.mask, item.segmentation) for item in chosen.items] == [
        (item.image, item.mask, item.segmentation) for item in source.items
    ]
    assert all(chosen.class_names[item.class_index] in item.image for item in chosen.items)


@pytest.mark.parametrize("classes", [("part_1", "part_2"), ("real/cat", "clipart/dog")])
def test_folders_that_may_be_something_else_are_no_classes(classes: tuple[str, ...], tmp_path: Path) -> None:
    write_folder(tmp_path, files_of("images/{}/{}.jpg", "masks/{}/{}.png", HOLE, classes))
    source = read(str(tmp_path))
    assert source.class_names == () and source.fields == {"mask"}
    assert any("`classes` folders does" in note for note in source.about.notes)


def test_images_of_one_name_in_a_class_are_refused(tmp_path: Path) -> None:
    files = files_of("images/{}/{}.jpg", "masks/{}/{}.png", HOLE)
    write_folder(tmp_path, files | {"photos/cat/0.jpg": photo(9)})
    with pytest.raises(ConfigError, match=r"images/cat/0.jpg and photos/cat/0.jpg are of one name"):
        read(str(tmp_path), choices=Choices(classes="folders"))


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_samples_have_class_and_mask(kind: str, tmp_path: Path) -> None:
    """And a set that was made without the classes grows without them, or says how it would."""
    files, source = files_of("images/{}/{}.jpg", "masks/{}/{}.png", HOLE), tmp_path / f"source.{kind}"
    {"folder": write_folder, "tar": write_tar, "zip": write_zip}[kind](source, files)
    command = ("shard", source, tmp_path / "raw", "--image-size", 48)
    assert lfm(*command).exit_code == 0
    samples: list[RawSample] = list(raw_samples(tmp_path / "raw").values())
    assert sorted(sample.class_index for sample in samples) == [0, 0, 0, 1, 1, 1]
    assert all(np.array_equal(sample.mask, HOLE // 255) for sample in samples)
    manifest = manifests.load(str(tmp_path / "raw"))
    assert [entry.name for entry in manifest.classes] == ["cat", "dog"] and manifest.fields == ("mask",)
    before = ("shard", source, tmp_path / "before", "--image-size", 48)
    assert lfm(*before, "--classes", "none").exit_code == 0
    assert_one_line(lfm(*before), "have mask, and those of", "have class, mask", "or --classes none")
