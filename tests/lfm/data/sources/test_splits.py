"""Splits of collections: in folders, in archives and by the names of files; what a message advises works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm.data.sources import readers
from lfm.data.sources.layouts import read
from lfm.data.sources.source import Choices, Source
from lfm.errors import ConfigError
from tests.support.commands import lfm
from tests.support.image_collections import photo, photos, write_folder, write_parquet, write_tar, write_zip

Write = Callable[[Path], Path]  # writes below a folder, and returns the path to read

SPLITS = photos(*(f"{split}/{name}/0.jpg" for split in ("train", "test") for name in ("cat", "dog")))
IN_CLASSES = photos(*(f"{name}/{split}/0.jpg" for split in ("train", "test") for name in ("cat", "dog")))
SAMPLES = {
    f"{split}/{number}.{end}": content
    for split in ("train", "test")
    for number, (label, image) in enumerate([("cat", photo(1)), ("dog", photo(2))])
    for end, content in (("jpg", image), ("cls", label))
}


def below(folder: str, files: dict) -> dict:
    """Return the files of a folder by their paths in it."""
    return {name[len(folder) + 1 :]: content for name, content in files.items() if name.startswith(f"{folder}/")}


def in_folder(files: dict) -> Write:
    def write(root: Path) -> Path:
        write_folder(root, files)
        return root

    return write


def in_archive(name: str, files: dict) -> Write:
    def write(root: Path) -> Path:
        (write_zip if name.endswith(".zip") else write_tar)(root / name, files)
        return root / name

    return write


def in_archives(suffix: str, files: dict) -> Write:
    def write(root: Path) -> Path:
        for split in ("train", "test"):
            in_archive(f"{split}{suffix}", below(split, files))(root)
        return root

    return write


def in_tables(root: Path) -> Path:
    for split in ("train", "test"):
        images = {"image": [np.asarray(photo(1)), np.asarray(photo(2))], "label": ["cat", "dog"]}
        write_parquet(root / "data" / f"{split}-00000-of-00001.parquet", images)
    return root


PLACES: dict[str, Write] = {
    "folders": in_folder(SPLITS),
    "folders in a wrapper": in_folder({f"data/{name}": content for name, content in SPLITS.items()}),
    "folders in classes": in_folder(IN_CLASSES),
    "a tar": in_archive("a.tar", SPLITS),
    "a tar that is called like its splits": in_archive("a_train_test.tar", SPLITS),
    "a tar of classes": in_archive("a.tar", IN_CLASSES),
    "a tar of samples": in_archive("a.tar", SAMPLES),
    "a zip": in_archive("a.zip", SPLITS),
    "a zip of classes": in_archive("a.zip", IN_CLASSES),
    "a tar for each": in_archives(".tar", SPLITS),
    "a tar of samples for each": in_archives("-000.tar", SAMPLES),
    "a zip for each": in_archives(".zip", SPLITS),
    "a table for each": in_tables,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_split_must_be_chosen_wherever_it_is(place: str, tmp_path: Path) -> None:
    root = str(PLACES[place](tmp_path))
    advice = r"holds the splits test, train; choose one with `split`, for example train$"
    with pytest.raises(ConfigError, match=advice):
        read(root)
    for split in ("train", "test", "TEST"):
        source = read(root, split=split)
        assert (source.class_names, len(source.items)) == (("cat", "dog"), 2)
        assert source.about.splits.startswith(f"{split.lower()} of test, train")
        assert source.about.other_splits == {"train", "test"} - {split.lower()}
    with pytest.raises(ConfigError, match=r"holds the splits test, train|`split` nope: .* choose test or train"):
        read(root, split="nope")


NONE: dict[str, Write] = {
    "folders": in_folder(below("train", SPLITS)),
    "a tar": in_archive("a.tar", below("train", SPLITS)),
    "a tar of samples": in_archive("a.tar", below("train", SAMPLES)),
    "a zip": in_archive("a.zip", below("train", SPLITS)),
}


@pytest.mark.parametrize("place", NONE)
def test_a_split_where_there_is_none_is_refused(place: str, tmp_path: Path) -> None:
    root = str(NONE[place](tmp_path))
    with pytest.raises(ConfigError, match=r"`split` train: no such split; it has none; leave it out$"):
        read(root, split="train")
    assert read(root).class_names == ("cat", "dog")


ADVISED = {
    "beside classes": ("train/cat/0.jpg", "train/dog/0.jpg", "test/cat/0.jpg", "cat/0.jpg"),
    "beside an image": ("train/cat/0.jpg", "train/dog/0.jpg", "test/cat/0.jpg", "sample.jpg"),
    "called images": ("train_images/0.jpg", "test_images/0.jpg"),
    "called set": ("train_set/cat/0.jpg", "train_set/dog/0.jpg", "test_set/cat/0.jpg"),
    "of a name": ("cars_train/0.jpg", "cars_test/0.jpg", "more/0.jpg"),
    "for training and validation": ("train_val/cat/0.jpg", "train_val/dog/0.jpg", "test/0.jpg"),
    "alone beside classes": ("train/0.jpg", "cat/0.jpg", "dog/0.jpg"),
}


@pytest.mark.parametrize("name", ADVISED)
def test_the_split_that_is_advised_is_the_one_for_training_and_works(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, photos(*ADVISED[name]))
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path))
    advised = re.search(r"choose `split` (\w+) to read that folder alone, or `classes` folders", str(error.value))
    assert advised and "train" in advised[1]
    source = read(str(tmp_path), split=advised[1])
    assert {item.image for item in source.items} == set(below(advised[1], photos(*ADVISED[name])))
    assert advised[1] in source.about.splits


def test_folders_beside_a_split_are_read_when_it_is_moved_away(tmp_path: Path) -> None:
    write_folder(tmp_path, photos("test/0.jpg", "cat/0.jpg", "dog/0.jpg"))
    with pytest.raises(ConfigError, match=r"or move test elsewhere to read the others$"):
        read(str(tmp_path))
    (tmp_path / "test" / "0.jpg").unlink()
    assert read(str(tmp_path)).class_names == ("cat", "dog")


def test_a_wrong_split_names_those_there_are(tmp_path: Path) -> None:
    write_folder(tmp_path, photos("train_images/0.jpg", "test_images/1.jpg"))
    with pytest.raises(ConfigError, match=r"`split` train: no such split; choose test_images or train_images$"):
        read(str(tmp_path), split="train")


def test_splits_without_classes_are_read_together_and_the_plan_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path, SPLITS)
    source: Source = read(str(tmp_path), choices=Choices(classes="none"))
    assert len(source.items) == 4
    assert "the splits test, train are read together; `split` chooses one" in source.about.notes
    assert not read(str(tmp_path), split="train", choices=Choices(classes="none")).about.notes


def test_a_split_without_annotations_is_one_line(tmp_path: Path) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[:9] = 255
    write_folder(tmp_path, photos("train/images/0.jpg", "test/images/0.jpg") | {"train/masks/0.png": mask})
    with pytest.raises(ConfigError, match=r"the split test has no masks or segmentations; choose `mask_files` none"):
        read(str(tmp_path), split="test")
    assert len(read(str(tmp_path), split="test", choices=Choices(mask_files="none")).items) == 1
    assert read(str(tmp_path), split="train").fields == {"mask"}


@pytest.mark.parametrize("kind", [in_folder(SPLITS), in_archive("a.tar", SPLITS)])
def test_the_plan_says_that_other_splits_are_left_aside(kind: Write, tmp_path: Path) -> None:
    result = lfm("shard", kind(tmp_path / "source"), tmp_path / "raw", "--split", "train", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"left aside +2 \.jpg of the split test$", result.stdout, re.MULTILINE)


def test_members_of_a_tar_keep_their_names(tmp_path: Path) -> None:
    source = read(str(in_archive("a.tar", SPLITS)(tmp_path)), split="test")
    assert [readers.inner_name(item.image) for item in source.items] == ["test/cat/0.jpg", "test/dog/0.jpg"]
