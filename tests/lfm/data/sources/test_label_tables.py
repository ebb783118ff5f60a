"""Tables of labels: each row is matched with the image that it names, however it writes the path, or the table is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.sources.labels import with_labels
from lfm.data.sources.source import Choices, Source
from lfm.errors import ConfigError, DataError, LfmError
from lfm.types import SourceItem

ROOT = "/data/set/train"
PATHS = st.lists(st.sampled_from(("a", "b", "test", "train", "1")), min_size=1, max_size=3).map(
    lambda parts: "/".join(parts) + ".png"
)
ABOVE = st.sampled_from(("", "./", "train/", "set/train/", "/data/set/train/", "C:/users/me/", "test/", "other/"))


def label_of(images: list[str], rows: list[tuple[str, str]], root: str = ROOT) -> dict[str, str]:
    """Return the class of each image by a table of files and labels."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "table.csv")
        table.write_text("\n".join(["file,label", *(f"{name},{label}" for name, label in rows)]))
        source = Source(root, tuple(map(SourceItem, images)))
        labelled = with_labels(source, Choices(labels=str(table)))
    names = labelled.class_names
    return {item.image: names[item.class_index] for item in labelled.items if item.class_index is not None}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_image_has_the_label_of_the_row_that_names_it_or_none(data: st.DataObject) -> None:
    images = data.draw(st.lists(PATHS, min_size=1, max_size=6, unique=True))
    above = data.draw(ABOVE)
    is_windows, has_suffix = data.draw(st.booleans()), data.draw(st.booleans())
    dropped = data.draw(st.integers(0, 2))

    def written(image: str) -> str:
        path = image if has_suffix else image.removesuffix(".png")
        parts = path.split("/")
        path = above + path if not dropped else "/".join(parts[min(dropped, len(parts) - 1) :])
        return path.replace("/", "\\") if is_windows else path

    rows = [(written(image), f"class of {image}") for image in data.draw(st.permutations(images))]
    try:
        labels = label_of(images, rows)
    except LfmError:
        assert dropped or above in ("test/", "C:/users/me/", "other/"), "a table that names all images was refused"
        return
    assert labels == {image: f"class of {image}" for image in images}


def classes_by(table: Path, text: str, images: list[str], column: str | None = None) -> list[str]:
    """Return the class of each image by the text of a table."""
    table.write_text(text)
    source = with_labels(Source(ROOT, tuple(map(SourceItem, images))), Choices(labels=str(table), label_column=column))
    return [source.class_names[item.class_index or 0] for item in source.items]


def test_a_list_as_of_celeba_has_a_count_and_no_name_for_the_file(tmp_path: Path) -> None:
    text = "2\nBald Male\n000001.jpg  -1  1\n000002.jpg   1 -1\n"
    images = ["000001.jpg", "000002.jpg"]
    assert classes_by(tmp_path / "list_attr.txt", text, images, "Male") == ["1", "-1"]
    assert classes_by(tmp_path / "list_attr.txt", text, images, "Bald") == ["-1", "1"]
    with pytest.raises(ConfigError, match="any of Bald, Male may hold labels"):
        classes_by(tmp_path / "list_attr.txt", text, images)


@pytest.mark.parametrize(
    ("rows", "images", "repair"),
    [
        ("0.png,cat\n0.png,dog", ["a/0.png", "b/0.png"], "write the paths of its images with folders"),
        ("0.png,cat\n0.png,dog", ["a/0.png"], "remove one of the rows"),
        ("train/0.png,cat", ["test/1.png", "train/0.png"], "add a row for each, or choose `split` train"),
        ("1,cat\n2,dog", ["0001.png", "0002.png"], "write the numbers as in the names of the files, with their zeros"),
    ],
)
def test_the_repair_of_a_table_fits_its_images(rows: str, images: list[str], repair: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        classes_by(tmp_path / "table.csv", f"file,label\n{rows}\n", images)
    assert str(error.value).endswith(f"; {repair}")


def test_rows_of_another_split_are_not_those_of_the_chosen_one() -> None:
    assert label_of(["1.png"], [("test/1.png", "dog"), ("train/1.png", "cat")]) == {"1.png": "cat"}
    with pytest.raises(DataError, match="1 of 1 images have no label"):
        label_of(["1.png"], [("test/1.png", "dog")])


def test_a_row_that_names_no_folder_is_refused_if_it_may_be_of_two_images() -> None:
    with pytest.raises(DataError, match="may be any of several images"):
        label_of(["a/1.png", "b/1.png"], [("1.png", "dog")])
    with pytest.raises(DataError, match="may both be 1"):
        label_of(["1.png"], [("x/1.png", "dog"), ("y/1.png", "cat")])
