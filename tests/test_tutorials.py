"""The pages of docs/tutorials: each of their commands runs, in its order, on small data and a tiny network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import REPOSITORY, SmallSet
from tests.support.manual_pages import ManualPage

TUTORIALS = REPOSITORY / "docs" / "tutorials"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photographs(small_set: SmallSet, folder: Path, names: tuple[str, ...]) -> None:
    """Copy the classes of the small set, in their order, to folders of these names."""
    classes = sorted(path for path in small_set.images.iterdir() if path.is_dir())
    for source, name in zip(classes, names, strict=False):
        shutil.copytree(source, folder / name)


def test_every_tutorial_is_run() -> None:
    tests = Path(__file__).read_text()
    pages = sorted(TUTORIALS.glob("*.md"))
    assert pages and not [page.name for page in pages if f'"tutorials/{page.name}"' not in tests]


@pytest.mark.slow
def test_photographs_by_class(small_set: SmallSet, workplace: Path) -> None:
    photographs(small_set, workplace / "photos", ("dress", "hat", "shirt", "shoes"))
    page = ManualPage("tutorials/photographs-by-class.md", small_set.autoencoder)
    page.run()
    assert "4 from names of folders: 0 dress" in page.output("lfm shard")
    dresses = json.loads((workplace / "dresses" / "samples.json").read_text())["pictures"]
    assert len(dresses) == 64 and {picture["class_index"] for picture in dresses} == {0}
    assert "lfm sample runs/pictures_64" in page.output("lfm inspect")
    assert Image.open(workplace / "sheet.png").size > (16, 16)
