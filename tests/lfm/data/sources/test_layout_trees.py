"""The layouts of published collections: each tree of tests/data/layouts is recognised and sharded by one command."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.sources.layouts import read
from lfm.data.sources.source import Choices
from lfm.errors import ConfigError, DataError
from tests.support.commands import lfm
from tests.support.images import random_pixels, raw_samples, save_image
from tests.support.layout_trees import FACE_SIZE, generate_trees
from tests.support.real_data import unpack


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_trees(tmp_path_factory.mktemp("trees"))


@dataclass(frozen=True)
class Expected:
    """What sharding a tree must find."""

    tree: str
    split: str | None
    layout: str
    images: int
    classes: int = 0
    members: tuple[str, ...] = ()  # of each sample, beside the image


TREES = [
    Expected("layouts/ILSVRC", "train", "imagenet", 48, 6, ("class",)),
    Expected("layouts/ILSVRC", "val", "imagenet", 18, 6, ("class",)),
    Expected("layouts/lmdb/celeba-lmdb", "train", "lmdb", 11),
    Expected("layouts/lmdb/celeba-lmdb/validation.lmdb", None, "lmdb", 3),
    Expected("layouts/lmdb/celeba64_lmdb", "train", "lmdb", 12),
    Expected("layouts/lmdb/lsun", "train", "lsun", 12),
    Expected("layouts/lmdb/lsun/church_outdoor_val_lmdb", None, "lsun", 4),
    Expected("layouts/CelebAMask-HQ", None, "celebamask-hq", 6, members=("segmentation",)),
    Expected("layouts/ADEChallengeData2016", "training", "ade20k", 10, members=("segmentation",)),
    Expected("layouts/ADEChallengeData2016", "validation", "ade20k", 4, members=("segmentation",)),
    Expected("layouts/inpaint_ldm", None, "inpainting", 4, members=("mask",)),
    Expected("ccp_seg", "validation", "paired", 40, members=("segmentation", "mask")),
    Expected("coco_mini", "train2017", "coco-stuff", 23, members=("segmentation",)),
]


def assert_shards(trees: Path, expected: Expected, raw: Path) -> None:
    """Shard a tree with `lfm shard` into `raw`, and compare what was written with what is expected."""
    split = ("--split", expected.split) if expected.split else ()
    result = lfm("shard", trees / expected.tree, raw, "--image-size", 32, *split)
    assert result.exit_code == 0, result.stderr
    assert f"{expected.layout}: {expected.images} images of {expected.classes} classes" in result.stdout
    manifest = manifests.load(str(raw), "raw")
    assert (manifest.num_samples, len(manifest.classes), manifest.rejects) == (expected.images, expected.classes, [])
    assert manifest.recipe["layout"] == expected.layout
    for sample in raw_samples(raw).values():
        assert sample.image.shape == (32, 32, 3)
        values = {"class": sample.class_index, "segmentation": sample.segmentation, "mask": sample.mask}
        assert tuple(name for name, value in values.items() if value is not None) == expected.members
        assert sample.mask is None or set(np.unique(sample.mask)) <= {0, 1}


def assert_face_maps(trees: Path, layout: str, order: str, size: int, raw: Path) -> None:
    """Shard CelebAMask-HQ with the class ids of `layout`, and compare every map with the expected one bit for bit."""
    root = trees / "layouts" / "CelebAMask-HQ"
    result = lfm("shard", root, raw, "--image-size", size, "--layout", layout)
    assert result.exit_code == 0, result.stderr
    samples = raw_samples(raw)
    assert len(samples) == 6
    for source, sample in samples.items():
        expected = np.asarray(Image.open(root / f"expected_mask_{order}_order" / f"{Path(source).stem}.png"))
        assert len(np.unique(expected)) > 2 and np.array_equal(sample.segmentation, expected)
    labels = manifests.load(str(raw), "raw").recipe["labels"]
    assert len(labels) == 19 and labels["1"] == "skin"


FACE_ORDERS = [("celebamask-hq", "lfm"), ("celebamask-hq-official", "official")]


@pytest.mark.parametrize("expected", TREES, ids=lambda expected: f"{expected.tree}-{expected.split}")
def test_a_tree_is_sharded_by_one_command(trees: Path, expected: Expected, tmp_path: Path) -> None:
    assert_shards(trees, expected, tmp_path / "raw")


@pytest.mark.parametrize(("layout", "order"), FACE_ORDERS)
def test_parts_of_a_face_become_the_expected_map(trees: Path, layout: str, order: str, tmp_path: Path) -> None:
    assert_face_maps(trees, layout, order, FACE_SIZE, tmp_path / "raw")


def test_ambiguous_trees_are_refused_with_the_choices(trees: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"layouts: may be imagenet or lmdb or .*; choose one with `layout`, for example imagenet"
    ):
        read(str(trees / "layouts"))
    for name in ("layouts/ILSVRC", "layouts/lmdb/lsun", "ccp_seg", "layouts/ADEChallengeData2016"):
        with pytest.raises(ConfigError, match=r"holds the splits \w+, \w+; choose one with `split`"):
            read(str(trees / name))


ADE20K_NAMES = ["wall", "building, edifice", "screen, silver screen", *(f"thing {n}, object" for n in range(4, 150))]


def save_ade20k(root: Path, names: str | None) -> None:
    """Write a tree of ADEChallengeData2016, with the content of objectInfo150.txt."""
    ids = np.arange(151, dtype=np.uint8).reshape(1, -1).repeat(16, 0)
    for place in ("training/ADE_train_00000001", "validation/ADE_val_00000001"):
        save_image(root / "images" / f"{place}.jpg", random_pixels(16, 151, 3))
        save_image(root / "annotations" / f"{place}.png", ids)
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 abbey\nADE_val_00000001 street\n")
    if names is not None:
        (root / "objectInfo150.txt").write_text(names)


@pytest.mark.parametrize("is_zip", [False, True])
def test_the_classes_of_ade20k_have_the_names_of_its_list(tmp_path: Path, is_zip: bool) -> None:
    lines = [f"{number}\t0.1576\t11664\t1172\t{name}   \n" for number, name in enumerate(ADE20K_NAMES, 1)]
    head, last = "Idx\tRatio\tTrain\tVal\tName\n", "150\t0.0001\t1\t1\tscreen, CRT screen\n"
    save_ade20k(tmp_path / "ade" / "ADEChallengeData2016", "".join([head, *lines, last]))
    root = shutil.make_archive(str(tmp_path / "ade"), "zip", tmp_path / "ade") if is_zip else str(tmp_path / "ade")
    scenes = str(tmp_path / "ade" / "ADEChallengeData2016" / "sceneCategories.txt")
    source = read(root, split="training", choices=Choices(labels=scenes))
    assert source.labels[0] == "other" and sorted(source.labels) == list(range(151))
    assert [source.labels[number] for number in (1, 2, 4, 149)] == ["wall", "building", "thing 4", "thing 149"]
    assert (source.labels[3], source.labels[150]) == ("screen, silver screen", "screen, CRT screen")
    assert not any("numbers" in note for note in source.about.notes)
    assert not any(name.endswith("objectInfo150.txt") for name in source.about.unused)
    assert np.unique(source.decode_item(source.items[0]).segmentation).tolist() == list(range(151))
    assert source.class_names == ("abbey",)


def test_without_its_list_the_classes_of_ade20k_have_numbers_until_it_is_there(tmp_path: Path) -> None:
    """The list is no reason to make a set again that was made without it."""
    ade, raw = tmp_path / "ade", tmp_path / "raw"
    save_ade20k(ade, None)
    source = read(str(ade), split="training")
    assert source.labels == {0: "other", **{number: str(number) for number in range(1, 151)}}
    assert any("since objectInfo150.txt is missing" in note for note in source.about.notes)
    command = ("shard", ade, raw, "--split", "training", "--image-size", 16)
    assert lfm(*command).exit_code == 0
    before = manifests.load(str(raw))
    (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    assert lfm(*command).exit_code == 0 and manifests.load(str(raw)) == before
    save_image(ade / "images/training/ADE_train_00000002.jpg", 255 - random_pixels(16, 16, 3))
    save_image(ade / "annotations/training/ADE_train_00000002.png", np.ones((16, 16), np.uint8))
    assert lfm(*command).exit_code == 0
    grown = manifests.load(str(raw))
    assert grown.num_samples == 2 and (before.labels[1], grown.labels[1], grown.labels[2]) == ("1", "wall", "2")


@pytest.mark.parametrize("content", ["", "wall\nsky\n", "Idx\tName\nx\twall\n", "Idx\tName\n1\t\n"])
def test_a_damaged_list_of_ade20k_is_one_line(tmp_path: Path, content: str) -> None:
    save_ade20k(tmp_path, content)
    with pytest.raises(DataError, match=r"objectInfo150.txt: is no table with the columns Idx and Name, .* remove it"):
        read(str(tmp_path), split="training")


@pytest.mark.parametrize("first", ["0: unlabeled\n", ""])
def test_the_names_of_coco_stuff_are_those_of_its_maps(tmp_path: Path, first: str) -> None:
    """Which count from 0, as a list may do, too; COCO-Stuff's own counts from 1."""
    save_image(tmp_path / "train2017" / "000000000009.jpg", random_pixels(16, 16, 3))
    save_image(tmp_path / "stuffthingmaps" / "train2017" / "000000000009.png", np.full((16, 16), 181, np.uint8))
    start = 1 if first else 0
    lines = [
        f"{start + number}: {name}\n"
        for number, name in enumerate(["person", "bicycle", *map(str, range(2, 181)), "wood"])
    ]
    (tmp_path / "labels.txt").write_text(first + "".join(lines))
    source = read(str(tmp_path))
    assert source.layout == "coco-stuff" and sorted(source.labels) == [*range(182), 255]
    assert [source.labels[number] for number in (0, 1, 181, 255)] == ["person", "bicycle", "wood", "unlabelled"]
    assert np.unique(source.decode_item(source.items[0]).segmentation).tolist() == [181]


def test_imagenets_two_parts_have_the_same_classes(trees: Path) -> None:
    root = str(trees / "layouts" / "ILSVRC")
    train, val = read(root, split="train"), read(root, split="val")
    assert train.class_names == val.class_names and train.class_names[0] == "n03124170 cowboy hat, ten-gallon hat"
    assert train.items[0].class_index == val.items[0].class_index == 0
    table = (trees / "layouts" / "LOC_val_solution.csv").read_text().splitlines()[1:]
    wnids = {image: solution.split()[0] for image, solution in (line.split(",", 1) for line in table)}
    for item in val.items:
        assert item.class_index is not None
        assert wnids[Path(item.image).stem] == val.class_names[item.class_index].split()[0]


def test_odd_files_of_imagenet_are_read(trees: Path) -> None:
    """Grey, CMYK, a PNG called JPEG, and an image whose EXIF orientation turns it by 90 degrees."""
    root = trees / "layouts" / "ILSVRC" / "Data" / "CLS-LOC" / "train" / "n03124170"
    source = read(str(trees / "layouts" / "ILSVRC"), split="train")
    formats = [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGB", "JPEG")]
    for number, (item, expected) in enumerate(zip(source.items[:4], formats, strict=True), 1):
        assert Path(item.image).name == f"n03124170_{number}.JPEG"
        with Image.open(root / f"n03124170_{number}.JPEG") as file:
            assert (file.mode, file.format) == expected
            size = (file.height, file.width) if number == 4 else file.size
        image = source.decode_item(item).image
        assert (image.mode, image.size) == ("RGB", size)


@pytest.mark.real_data
@pytest.mark.slow
def test_real_trees_are_sharded_in_the_same_way(tmp_path: Path) -> None:
    for name in ("layouts", "ccp_seg", "coco_mini"):
        unpack(name, tmp_path / "trees")
    for number, expected in enumerate(TREES):
        assert_shards(tmp_path / "trees", expected, tmp_path / str(number))
    for layout, order in FACE_ORDERS:
        assert_face_maps(tmp_path / "trees", layout, order, 512, tmp_path / order)
