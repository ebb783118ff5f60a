"""Tables of labels: each row is matched with the image that it names, however it writes the path, or the table is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.sources.labels import with_labels
from lfm.data.sources.source import Choices, Source
from lfm.errors import DataError, LfmError
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


def test_rows_of_another_split_are_not_those_of_the_chosen_one() -> None:
    assert label_of(["1.png"], [("test/1.png", "dog"), ("train/1.png", "cat")]) == {"1.png": "cat"}
    with pytest.raises(DataError, match="1 of 1 images have no label"):
        label_of(["1.png"], [("test/1.png", "dog")])


def test_a_row_that_names_no_folder_is_refused_if_it_may_be_of_two_images() -> None:
    with pytest.raises(DataError, match="may be any of several images"):
        label_of(["a/1.png", "b/1.png"], [("1.png", "dog")])
    with pytest.raises(DataError, match="may both be 1"):
        label_of(["1.png"], [("x/1.png", "dog"), ("y/1.png", "cat")])
