"""Class folders and flat folders of images, their splits, and the one-line errors for each mistake."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.layouts import read
from lfm.data.sources.names import SUFFIXES
from lfm.data.sources.source import Choices, Source
from lfm.errors import ConfigError, DataError, LfmError
from lfm.types import SourceItem
from tests.support.image_collections import write_tar, write_zip
from tests.support.real_data import unpack


def folder(root: str, split: str | None = None) -> Source:
    return read(root, "folder", split)


NAMES = st.text("abcXYZ019 _-é", min_size=1, max_size=6).map(str.strip).filter(bool)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "source") if request.param == "local" else f"memory://{uuid.uuid4()}"


def make(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{root}/{name}", b"image")


def packed(path: Path, names: list[str]) -> str:
    """Write an archive, a tar or zip by its suffix, and return its path; names that end in a slash are empty folders."""
    write = write_zip if path.suffix == ".zip" else write_tar
    write(path, {name: b"" if name.endswith("/") else b"image" for name in names})
    return str(path)


def test_class_folders_become_classes_in_sorted_order(root: str) -> None:
    make(root, "dog/2.png", "cat/b.JPG", "cat/a.jpeg", "cat/deep/er.webp", "dog/notes.txt", "readme.md")
    source = folder(root)
    assert source.class_names == ("cat", "dog") and source.root == root
    assert source.items == (
        SourceItem("cat/a.jpeg", 0),
        SourceItem("cat/b.JPG", 0),
        SourceItem("cat/deep/er.webp", 0),
        SourceItem("dog/2.png", 1),
    )


def test_a_flat_folder_has_no_classes(root: str) -> None:
    names = [f"x{suffix}{suffix}" for suffix in SUFFIXES]
    make(root, *names, "y.PNG", "z.txt", ".hidden.png", "__MACOSX/._x.png")
    source = folder(root)
    assert source.class_names == ()
    assert [item.image for item in source.items] == sorted([*names, "y.PNG"])
    assert {item.class_index for item in source.items} == {None}


def test_hidden_images_and_empty_folders_are_named(root: str) -> None:
    make(root, "cat/1.png", "dog/1.png", "dog/.2.png", ".owl/1.png", ".owl/2.png", ".git/index", "cat/._1.png")
    notes = folder(root).about.notes
    hidden = "3 images are left out because their names or folders begin with a dot, such as .owl/1.png"
    hidden += "; rename them to use them"
    assert hidden in notes
    if storage.is_local(root):
        Path(root, "emu").mkdir()
        assert "folders without files: emu" in folder(root).about.notes
        notes = read(shutil.make_archive(f"{root}-packed", "zip", root)).about.notes
        assert hidden in notes and "folders without files: emu" in notes
        assert not any("operating systems" in note for note in notes)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_where_all_images_are_hidden_the_message_says_so(tmp_path: Path, kind: str) -> None:
    names = [".owl/1.png", ".owl/2.png", "__MACOSX/._1.png"]
    make(str(tmp_path / "a.folder"), *names)
    path = str(tmp_path / "a.folder") if kind == "folder" else packed(tmp_path / f"a.{kind}", names)
    with pytest.raises(DataError, match=r"no images .*; 2 images are left out .* dot, such as .owl/1.png") as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and "operating systems" not in str(error.value)


JUNK = ["__MACOSX/cat/._1.png", "cat/Thumbs.db", "dog/@eaDir/1.png", ".DS_Store", "cat/._1.png"]


@pytest.mark.parametrize("prefix", ["", "./", "photos/"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_name_what_they_skip_as_folders_do(tmp_path: Path, kind: str, prefix: str) -> None:
    names = ["cat/1.png", "dog/1.png", "dog/.2.png", ".owl/1.png", *JUNK]
    make(str(tmp_path / "source"), *(prefix.removeprefix("./") + name for name in names))
    Path(tmp_path, "source", prefix, "emu").mkdir()
    path = packed(tmp_path / f"a.{kind}", [f"{prefix}{name}" for name in (*names, "emu/")])
    expected, source = folder(str(tmp_path / "source")), read(path)
    said = [note.replace(" ./", " ") for note in source.about.notes]
    assert set(expected.about.notes) <= set(said) and len(expected.about.notes) >= 3
    assert [readers.inner_name(item.image) for item in source.items] == [f"{prefix}cat/1.png", f"{prefix}dog/1.png"]
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_class_beside_hidden_ones_in_an_archive_is_not_looked_through(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"cat may be a class, since the hidden folder .dog beside it"):
        read(packed(tmp_path / f"a.{kind}", ["cat/1.png", ".dog/1.png"]))


def test_samples_of_tars_name_what_is_skipped_beside_them(tmp_path: Path) -> None:
    names = ["1.png", "1.cls", "2.png", "2.cls", ".3.png", "@eaDir/1.png", "Thumbs.db", "._1.png", "__index.json"]
    source = read(packed(tmp_path / "a.tar", names))
    assert [readers.inner_name(item.image) for item in source.items] == ["1.png", "2.png"]
    assert source.about.notes[:2] == [
        "2 files of operating systems and small copies are skipped, such as @eaDir/1.png",
        "1 images are left out because their names or folders begin with a dot, such as .3.png; rename them to use them",
    ]


def test_images_of_tars_may_begin_with_underscores(tmp_path: Path) -> None:
    names = ["__cat/1.png", "__cat/__2.png", "__dog/1.png"]
    assert read(packed(tmp_path / "a.tar", names)).class_names == ("__cat", "__dog")
    assert len(read(packed(tmp_path / "b.tar", ["__1.png", "__2.png"])).items) == 2


def test_a_class_beside_hidden_ones_is_not_looked_through(root: str) -> None:
    make(root, "cat/1.png", ".dog/1.png", ".dog/2.png")
    with pytest.raises(
        ConfigError, match=r"cat may be a class, since the hidden folder .dog beside it holds images, too"
    ):
        folder(root)
    assert read(root, choices=Choices(classes="folders")).class_names == ("cat",)
    assert read(root, choices=Choices(classes="none")).class_names == ()
    make(f"{root}/photos", "cat/1.png", "dog/1.png")
    make(root, "photos/.owl/1.png")
    assert folder(f"{root}/photos").class_names == ("cat", "dog")


def test_folders_of_programs_do_not_make_the_folder_beside_them_a_class(root: str) -> None:
    make(root, "photos/1.png", ".thumbnails/1.png", ".AppleDouble/1.png", ".git/a/1.png")
    source = folder(root)
    assert source.class_names == () and "looked through the folder photos, which holds everything" in source.about.notes


def test_a_split_must_be_chosen_and_only_that_one_is_read(root: str) -> None:
    make(root, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/emu/2.png")
    with pytest.raises(ConfigError) as error:
        folder(root)
    assert str(error.value) == f"{root}: holds the splits test, train; choose one with `split`, for example train"
    train = folder(root, "train")
    assert (train.root, train.class_names) == (f"{root}/train", ("cat", "dog"))
    assert [item.image for item in train.items] == ["cat/1.png", "dog/1.png"]
    assert folder(root, "test").class_names == ("cat", "emu")


def test_a_flat_split_has_no_classes(root: str) -> None:
    make(root, "train/1.png", "val/2.png")
    assert folder(root, "train").items == (SourceItem("1.png"),)


def test_the_only_split_is_the_default_and_an_image_beside_it_is_an_error(root: str) -> None:
    make(root, "train/cat/1.png", "train/dog/1.png")
    assert folder(root) == folder(root, "train")
    make(root, "2.png")
    with pytest.raises((ConfigError, DataError), match=r"train may be a split or a class beside 2.png"):
        folder(root)


@pytest.mark.parametrize("splits", [("Train", "Test"), ("TRAIN", "VAL"), ("train", "Validation")])
def test_splits_are_recognised_in_any_case(tmp_path: Path, splits: tuple[str, str]) -> None:
    """As classes, they would train a model to distinguish the training set from the test set."""
    make(str(tmp_path), *(f"{split}/cat/1.png" for split in splits))
    with pytest.raises(ConfigError, match="holds the splits"):
        folder(str(tmp_path))


def test_a_class_may_be_called_like_a_split_if_the_user_says_so(root: str) -> None:
    make(root, "test/1.png", "exam/1.png")
    with pytest.raises(ConfigError, match=r"may be a split or a class .* `split` test .* `classes` folders"):
        folder(root)
    assert read(root, "folder", choices=Choices(classes="folders")).class_names == ("exam", "test")


def test_images_beside_class_folders_are_an_error_that_names_them(root: str) -> None:
    make(root, "cat/1.png", "dog/2.png", "stray.png")
    with pytest.raises(DataError) as error:
        folder(root)
    assert str(error.value).startswith(f"{root}/stray.png: lies beside the class folders;")


@pytest.mark.parametrize("names", [["a.txt"], [".git/x.png"], ["sub/.x.png", "b.csv"]])
def test_a_folder_without_images_is_one_line(root: str, names: list[str]) -> None:
    make(root, *names)
    with pytest.raises(DataError) as error:
        folder(root)
    assert str(error.value).startswith(f"{root}: no images there") and "\n" not in str(error.value)


def test_a_missing_folder_or_split_is_named(root: str) -> None:
    make(root, "train/cat/1.png")
    for arguments, named in (((f"{root}/nowhere",), f"{root}/nowhere"), ((root, "val"), f"{root}: `split` val")):
        with pytest.raises(LfmError) as error:
            folder(*arguments)
        assert str(error.value).startswith(f"{named}: ") and "\n" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(classes=st.dictionaries(NAMES, st.sets(NAMES, min_size=1, max_size=3), min_size=2, max_size=4))
def test_every_image_occurs_once_under_its_class(classes: dict[str, set[str]]) -> None:
    root = f"memory://{uuid.uuid4()}"
    paths = [f"{name}/{image}.png" for name, images in classes.items() for image in images]
    make(root, *paths)
    source = folder(root)
    assert [item.image for item in source.items] == sorted(paths)
    assert source.class_names == tuple(sorted(classes))
    for item in source.items:
        assert item.class_index is not None and source.class_names[item.class_index] == item.image.split("/")[0]
    assert read(root) == source


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    make(str(tmp_path), "elsewhere/1.png", "source/dog/1.png")
    (tmp_path / "source" / "cat").symlink_to(tmp_path / "elsewhere")
    assert folder(str(tmp_path / "source")).class_names == ("cat", "dog")


@pytest.mark.real_data
def test_a_real_collection(tmp_path: Path) -> None:
    root = unpack("clothing10", tmp_path) / "clothing10"
    counts = {split: len(folder(str(root), split).items) for split in ("train", "validation", "test")}
    assert counts == {"train": 3068, "validation": 341, "test": 372}
    source = folder(str(root), "validation")
    classes = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
    assert source.class_names == classes
    assert {item.class_index for item in source.items} == set(range(10))
    for split in ("train", "test"):
        shutil.rmtree(root / split)
    assert folder(str(root)) == source, "the only split needs no choosing"
