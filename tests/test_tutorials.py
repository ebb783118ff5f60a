"""The pages of docs/tutorials: each of their commands runs, in its order, on small data and a tiny network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.synthetic.scenes import SEGMENT_NAMES
from tests.support.commands import REPOSITORY, SmallSet, Tasks
from tests.support.images import random_pixels, save_image
from tests.support.manual_pages import ManualPage

TUTORIALS = REPOSITORY / "docs" / "tutorials"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photographs(images: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy class folders, in their order, to folders of these names."""
    classes = sorted(path for path in images.iterdir() if path.is_dir())
    for source, name in zip(classes, names, strict=False):
        shutil.copytree(source, folder / name)


def test_every_tutorial_is_run() -> None:
    tests = Path(__file__).read_text()
    pages = sorted(TUTORIALS.glob("*.md"))
    assert pages and not [page.name for page in pages if f'"tutorials/{page.name}"' not in tests]


@pytest.mark.slow
def test_photographs_by_class(small_set: SmallSet, workplace: Path) -> None:
    photographs(small_set.images, workplace / "photos", ("dress", "hat", "shirt", "shoes"))
    page = ManualPage("tutorials/photographs-by-class.md", small_set.autoencoder)
    page.run()
    assert "4 from names of folders: 0 dress" in page.output("lfm shard")
    dresses = json.loads((workplace / "dresses" / "samples.json").read_text())["pictures"]
    assert len(dresses) == 64 and {picture["class_index"] for picture in dresses} == {0}
    assert "lfm sample runs/pictures_64" in page.output("lfm inspect")
    assert np.asarray(Image.open(workplace / "sheet.png")).any()


@pytest.mark.slow
def test_inpainting(small_set: SmallSet, workplace: Path) -> None:
    photographs(small_set.images, workplace / "photos", ("a", "b"))
    photo, hole = random_pixels(20, 24, 3), np.zeros((20, 24), np.uint8)
    hole[5:15, 8:16] = 255
    save_image(workplace / "photo.png", photo)
    save_image(workplace / "hole.png", hole)
    page = ManualPage("tutorials/inpainting.md", small_set.autoencoder)
    page.run()
    fillings = [np.asarray(Image.open(path)) for path in sorted((workplace / "mine").glob("0*.png"))]
    assert len(fillings) == 8
    differing = np.stack([(filling != fillings[0]).any(-1) for filling in fillings]).any(0)
    assert differing.any() and not differing[:, :2].any()


@pytest.mark.slow
def test_semantic_maps(tasks: Tasks, workplace: Path) -> None:
    for folder, name in (("images", "images"), ("segmentations", "annotations")):
        shutil.copytree(tasks.scenes / folder, workplace / "rooms" / name)
    (workplace / "rooms" / "labels.txt").write_text("\n".join(SEGMENT_NAMES))
    drawn = np.zeros((16, 16), np.uint8)
    drawn[8:] = 1
    save_image(workplace / "drawn.png", drawn)
    page = ManualPage("tutorials/semantic-maps.md", tasks.autoencoder)
    page.run()
    assert "0 sky" in page.output("lfm shard")
    assert len(list((workplace / "drawn").glob("0*.png"))) == 4


@pytest.mark.slow
def test_unconditional(small_set: SmallSet, workplace: Path) -> None:
    photographs(small_set.images, workplace / "pictures", ("a", "b", "c"))
    page = ManualPage("tutorials/unconditional.md", small_set.autoencoder)
    page.run()
    assert "images of 0 classes" in page.output("lfm shard")
    metrics = json.loads((workplace / "copies" / "report.json").read_text())
    assert "kid" in (workplace / "report" / "report.txt").read_text()
    assert "memorised-latents" in str(metrics)


def test_notebook(tasks: Tasks, workplace: Path) -> None:
    (workplace / "runs").mkdir()
    (workplace / "runs" / "holes").symlink_to(tasks.runs / "inpaint")
    shutil.copytree(tasks.runs / "class", workplace / "runs" / "pictures_64")
    photographs(tasks.scenes / "images", workplace / "photos", ("cat", "dog"))
    save_image(workplace / "photo.png", random_pixels(20, 24, 3))
    page = ManualPage("tutorials/notebook.md", tasks.autoencoder)
    page.text = page.text.replace('"dress"', '"disc"')
    page.run()
    assert page.variables["samples"].images.shape == (8, 16, 16, 3)
    kept = page.variables["hole"] == 0
    assert (page.variables["fillings"].images[:, kept] == page.variables["photo"][kept]).all()
    assert np.asarray(Image.open(workplace / "scales.png")).shape == (48, 64, 3)
    assert page.variables["latents"].manifest.num_samples > 0


@pytest.mark.slow
def test_own_autoencoder(small_set: SmallSet, workplace: Path) -> None:
    photographs(small_set.images, workplace / "photos", ("dress", "hat"))
    shutil.copytree(small_set.raw, workplace / "data" / "pictures_64" / "raw")
    page = ManualPage("tutorials/own-autoencoder.md", small_set.autoencoder)
    page.run()
    hashes = {
        manifests.load(f"data/{name}", "latents").autoencoder.content_hash  # type: ignore[union-attr]
        for name in ("embedded", "tuned_latents", "equivariant_latents", "pictures_256/latents")
    }
    assert len(hashes) == 4
    assert "PSNR" in page.output("lfm inspect")


@pytest.mark.slow
@pytest.mark.cluster
def test_several_machines(small_set: SmallSet, workplace: Path) -> None:
    shutil.copytree(small_set.images, workplace / "photos")
    page = ManualPage("tutorials/several-machines.md", small_set.autoencoder)
    page.run()
    assert manifests.load("data/latents", "latents").num_samples == 40
    assert "2 ranks" in page.output(
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-1:29500 -m pipelines.cli.main train"
    )
    assert (workplace / "runs" / "all" / "weights.safetensors").is_file()


@pytest.mark.slow
def test_few_evaluations(small_set: SmallSet, workplace: Path) -> None:
    shutil.copytree(small_set.latents, workplace / "data" / "pictures" / "latents")
    page = ManualPage("tutorials/few-evaluations.md", small_set.autoencoder)
    page.run()
    evaluations = {
        name: json.loads((workplace / name / "samples.json").read_text())["pictures"][0]["nfe"]
        for name in ("ab2-6", "shifted", "interval", "internal")
    }
    assert evaluations["ab2-6"] == evaluations["shifted"] == 12
    assert 10 < evaluations["interval"] < 20 and evaluations["internal"] == 10
    assert page.variables["samples"].nfe.tolist() == 256 * [10]
