"""Tables of labels as people have them: `lfm shard --labels` reads each one right, or refuses it and says what to choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.collection_checks import Collection, check, folder
from tests.support.image_collections import photos

TABLES = {
    "a table of labels": Collection(
        folder(photos("a.png", "b.png") | {"l.csv": "file,species\na.png,dog\nb.png,cat\n"}),
        options=("--labels", "@l.csv", "--label-column", "species"),
        images=2,
        classes={"a.png": "dog", "b.png": "cat"},
    ),
    "a table of stems for class folders": Collection(
        folder(photos("x/a.png", "y/b.png") | {"l.csv": "id;label\na;2\nb;9\n"}),
        options=("--labels", "@l.csv"),
        images=2,
        classes={"x/a.png": "2", "y/b.png": "9"},
    ),
    "a table that lacks an image": Collection(
        folder(photos("a.png", "b.png") | {"l.csv": "file,label\na.png,dog\n"}),
        options=("--labels", "@l.csv"),
        refused=("1 of 2 images have no label", "b.png"),
    ),
    "a table without known names of columns": Collection(
        folder(photos("a.png", "b.png") | {"l.csv": "\ufeffbild;art\r\nb;17\r\na;4\r\n"}),
        options=("--labels", "@l.csv"),
        images=2,
        classes={"a.png": "4", "b.png": "17"},
        plan=("column art of",),
    ),
    "a table without a head": Collection(
        folder(photos("x/a.png", "x/b.png") | {"l.txt": "x/b.png cat\nx/a.png dog\n"}),
        options=("--labels", "@l.txt"),
        images=2,
        classes={"a.png": "dog", "b.png": "cat"},
        plan=("column 2 of",),
    ),
    "a table without a head, several columns": Collection(
        folder(photos("a.png") | {"l.txt": "a.png\tcat\t0\t9\n"}),
        options=("--labels", "@l.txt"),
        refused=("any of 2, 3, 4 may hold labels", "--label-column"),
    ),
    "a table with spaces, and lines of an old Macintosh": Collection(
        folder(photos("a.png", "b.png", "c.png") | {"l.csv": "file, label\ra.png, cat\rb.png,cat \rc.png,dog\r"}),
        options=("--labels", "@l.csv"),
        classes={"a.png": "cat", "b.png": "cat", "c.png": "dog"},
    ),
    "a table with labels as pandas writes them": Collection(
        folder(photos("a.png", "b.png") | {"l.csv": ",file,label\n0,b.png,10.0\n1,a.png,9.0\n"}),
        options=("--labels", "@l.csv"),
        images=2,
        classes={"a.png": "9", "b.png": "10"},
        plan=("0 9 (1), 1 10 (1)",),
    ),
    "a table without rows": Collection(
        folder(photos("a.png") | {"l.csv": "file,label\n"}), options=("--labels", "@l.csv"), refused=("has no rows",)
    ),
    "a table of attributes": Collection(
        folder(photos("a.png") | {"l.csv": "image_id,smiling,male\na.png,1,-1\n"}),
        options=("--labels", "@l.csv"),
        refused=("any of smiling, male may hold labels", "--label-column"),
    ),
    "a table of other images": Collection(
        folder(photos("001.png") | {"l.csv": "id,label\n1,cat\n"}),
        options=("--labels", "@l.csv"),
        refused=("1 of 1 images have no label, the first: 001.png; its rows are such as 1",),
    ),
    "a table without names of images": Collection(
        folder(photos("a.png") | {"l.csv": "label,weight\n1,2\n"}),
        options=("--labels", "@l.csv"),
        refused=("no column holds names of the images, such as a.png",),
    ),
    "labels for a split of ImageNet without folders": Collection(
        folder(photos("train/n01440764/a.png", "val/images/b.png") | {"l.csv": "file,label\nb.png,n01440764\n"}),
        options=("--split", "val", "--labels", "@l.csv"),
        images=1,
        classes={"images/b.png": "n01440764"},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    check(TABLES[name], tmp_path)
