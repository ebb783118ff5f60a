"""Archives, tables and labels as people have them: `lfm shard` reads each one right, or refuses it and names the readings."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.collection_checks import (
    BOTH,
    CAT_DOG,
    CAT_DOG_CLASSES,
    EDM,
    EDM_CLASSES,
    EDM_FILES,
    EDM_LABELS,
    JUNK,
    RGBA_STROKES,
    Collection,
    check,
    folder,
    maps,
    masks,
)
from tests.support.commands import lfm
from tests.support.image_collections import (
    HOLE,
    IDS,
    MISSING,
    SIZE,
    encode,
    pairs,
    photo,
    photos,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

ONCE_WRONG = {
    "edm_folder": Collection(
        folder(EDM), images=8, classes=EDM_CLASSES, plan=("edm: 8 images of 3 classes", "dataset.json")
    ),
    "edm_zip": Collection(lambda root: write_zip(root / "edm.zip", EDM), "edm.zip", images=8, classes=EDM_CLASSES),
    "wrapped": Collection(
        folder({f"dataset/{name}": image for name, image in CAT_DOG.items()}),
        classes=CAT_DOG_CLASSES,
        plan=("looked through the folder dataset",),
    ),
    "mask_0_1": Collection(masks(HOLE), missing=MISSING, plan=("22% of the pixels are missing",)),
    "mask_on_transparent": Collection(masks(RGBA_STROKES), missing=MISSING),
    "images_and_masks": Collection(folder(pairs("images/{}.png", "masks/{}.png", HOLE * 255)), missing=MISSING),
    "ids_as_rgb": Collection(maps(np.stack([IDS] * 3, -1)), ids=(0, 1, 2)),
    "label_in_json": Collection(
        lambda root: write_tar(
            root / "a.tar", photos("0.jpg", "1.jpg") | {"0.json": '{"label": 3}', "1.json": '{"label": 1}'}
        ),
        images=2,
        classes={"0.jpg": "3", "1.jpg": "1"},
    ),
    "avif_in_tar": Collection(lambda root: write_tar(root / "a.tar", photos("0.webp", "1.avif", "2.jpg"))),
    "mac_junk_in_tar": Collection(
        lambda root: write_tar(
            root / "a.tar", photos("d/0.jpg", "d/1.jpg") | {"d/._0.jpg": b"\0\5", "__MACOSX/d/._0.jpg": b"1"}
        ),
        images=2,
    ),
    "hf_label_names": Collection(
        lambda root: write_parquet(
            root / "data/train-00000-of-00001.parquet", {"image": [photo(0), photo(1)], "label": ["cat", "dog"]}
        ),
        images=2,
        classes={
            "data/train-00000-of-00001.parquet#0#0#image": "cat",
            "data/train-00000-of-00001.parquet#0#1#image": "dog",
        },
    ),
}

DOTS = photos("./cat/0.jpg", "./cat/1.jpg", "./dog/0.jpg")


def write_links(root: Path) -> None:
    """A tar in which one image is a hard link to another."""
    with tarfile.open(root / "a.tar", "w") as archive:
        for name, content in photos("cat/0.jpg", "dog/1.jpg").items():
            data = encode(content, ".jpg")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("dog/2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/0.jpg"
        archive.addfile(link)


LABELS_WITH_A_GAP = {"dataset.json": '{"labels": [["a.png", null], ["b.png", 1]]}'}
ARCHIVES = {
    "edm zip in a folder": Collection(
        lambda root: write_zip(root / "a.zip", {f"ds/{name}": content for name, content in EDM.items()}),
        "a.zip",
        images=8,
        classes={f"ds/{name}": label for name, label in EDM_CLASSES.items()},
    ),
    "edm in a tar": Collection(
        lambda root: write_tar(root / "a.tar", EDM), "a.tar", images=8, classes=EDM_CLASSES, plan=("layout edm",)
    ),
    "edm with labels for some": Collection(
        folder(photos("a.png", "b.png") | LABELS_WITH_A_GAP), refused=("1 class missing", "a.png")
    ),
    "edm without labels in class folders": Collection(folder(CAT_DOG | {"dataset.json": '{"labels": null}'})),
    "links in a tar": Collection(write_links, refused=("dog/2.jpg is a link", "with the files themselves")),
    "zip with backslashes": Collection(
        lambda root: write_zip(root / "a.zip", photos("cat\\0.jpg")), refused=("no path in a folder with slashes",)
    ),
    "names with dots in a tar": Collection(
        lambda root: write_tar(root / "a.tar", photos("a.1.jpg", "a.2.jpg", "b.jpg"))
    ),
    "images by a longer ending in a tar": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.image.png", "1.image.png") | {"0.cls": "0", "1.cls": "1"}),
        images=2,
        classes={"0.image.png": "0", "1.image.png": "1"},
    ),
    "two images of a sample": Collection(
        lambda root: write_tar(root / "a.tar", BOTH), refused=(".jpg and .png", "--map-files png", "--mask-files png")
    ),
    "two images of a sample, one a map": Collection(
        lambda root: write_tar(root / "a.tar", BOTH), options=("--map-files", "png"), ids=(0, 1, 2)
    ),
    "two images of a sample, one left out": Collection(
        lambda root: write_tar(root / "a.tar", BOTH), options=("--map-files", "none")
    ),
    "a member of a sample by choice": Collection(
        lambda root: write_tar(root / "a.tar", pairs("{}.jpg", "{}.target.png", HOLE)),
        options=("--mask-files", "target.png"),
        missing=MISSING,
    ),
    "a member of a sample that nobody chose": Collection(
        lambda root: write_tar(root / "a.tar", pairs("{}.jpg", "{}.target.png", HOLE)),
        plan=("left aside: .target.png",),
    ),
    "tars of numbered parts": Collection(
        lambda root: [write_tar(root / f"part-{n}.tar", photos(f"{n}.jpg")) for n in range(3)]
    ),
    "tars of classes with numbers": Collection(
        lambda root: [write_tar(root / f"{name}_1.tar", photos(f"{name}.jpg")) for name in ("cat", "dog")],
        refused=("cat_1, dog_1", "--classes folders"),
    ),
    "images beside a tar": Collection(
        lambda root: [write_folder(root, CAT_DOG), write_tar(root / "a.tar", CAT_DOG)],
        refused=("a.tar", "--layout folder"),
    ),
    "images beside a zip": Collection(
        lambda root: [write_folder(root, CAT_DOG), write_zip(root / "a.zip", CAT_DOG)],
        refused=("a.zip", "--layout folder"),
    ),
    "images beside a zip, chosen": Collection(
        lambda root: [write_folder(root, CAT_DOG), write_zip(root / "a.zip", CAT_DOG)],
        options=("--layout", "folder"),
        classes=CAT_DOG_CLASSES,
        plan=("1 .zip (archives beside images)",),
    ),
    "images beside a table that is packed": Collection(
        folder(CAT_DOG | {"train.csv.zip": b"PK"}), classes=CAT_DOG_CLASSES, plan=("may hold labels: train.csv.zip",)
    ),
    "images beside a table of labels": Collection(
        lambda root: [
            write_folder(root, CAT_DOG),
            write_parquet(root / "labels.parquet", {"file": ["x"], "label": [1]}),
        ],
        classes=CAT_DOG_CLASSES,
        plan=("may hold labels: labels.parquet",),
    ),
    "an image beside a table of images": Collection(
        lambda root: [
            write_folder(root, photos("logo.png")),
            write_parquet(root / "data/train.parquet", {"image": [photo(0)], "label": [1]}),
        ],
        refused=("logo.png", "layout hf"),
    ),
    "tar with a dot before names": Collection(
        lambda root: write_tar(root / "a.tar", DOTS),
        classes=dict(zip(DOTS, ("cat", "cat", "dog"), strict=True)),
    ),
    "tars that may be classes": Collection(
        lambda root: [write_tar(root / f"{name}.tar", photos("0.jpg")) for name in ("n01440764", "n01443537")],
        refused=("n01440764, n01443537", "--classes folders or --classes none"),
    ),
    "tars that are classes": Collection(
        lambda root: [write_tar(root / f"{name}.tar", photos(f"{name}_1.jpg")) for name in ("cat", "dog")],
        options=("--classes", "folders"),
        images=2,
        classes={"cat_1.jpg": "cat", "dog_1.jpg": "dog"},
    ),
    "folders of samples that may be classes": Collection(
        lambda root: write_tar(
            root / "a.tar", {"cat/0.jpg": photo(0), "cat/0.json": "{}", "dog/1.jpg": photo(1), "dog/1.json": "{}"}
        ),
        refused=("the folders of the samples (cat, dog) may be classes",),
    ),
    "members of samples in another order": Collection(
        lambda root: write_tar(root / "a.tar", {"1.cls": "1", "0.cls": "4"} | photos("0.jpg", "1.jpg")),
        images=2,
        classes={"0.jpg": "4", "1.jpg": "1"},
    ),
    "zip with names outside of it": Collection(
        lambda root: write_zip(root / "a.zip", photos("../a.jpg", "b.jpg")), refused=("../a.jpg", "no path in a folder")
    ),
    "dataset.json of another program": Collection(
        folder(CAT_DOG | {"dataset.json": '{"name": "x"}'}),
        classes=CAT_DOG_CLASSES,
        plan=("not used although they may hold labels: dataset.json",),
    ),
    "edm in a folder with a readme": Collection(
        folder({f"x/{name}": content for name, content in EDM.items()} | {"README.md": "x"}),
        images=8,
        classes=EDM_CLASSES,
    ),
    "edm without labels": Collection(folder(EDM_FILES | {"dataset.json": '{"labels": null}'}), images=8),
    "edm with an image that has no label": Collection(
        folder(EDM | {"00001/img00000008.png": photo(8)}), refused=("1 images without a label", "img00000008.png")
    ),
    "edm with a label that has no image": Collection(
        folder(EDM_FILES | {"dataset.json": json.dumps({"labels": [*EDM_LABELS, ["gone.png", 0]]})}),
        refused=("1 labels without an image", "gone.png"),
    ),
    "edm with sparse labels": Collection(
        folder(
            photos("a.png", "b.png", "c.png")
            | {"dataset.json": '{"labels": [["a.png", 7], ["b.png", 3], ["c.png", 7]]}'}
        ),
        classes={"a.png": "7", "b.png": "3", "c.png": "7"},
        plan=("3 images of 2 classes",),
    ),
    "edm with vectors as labels": Collection(
        folder(photos("a.png") | {"dataset.json": '{"labels": [["a.png", [0.5, 1.0]]]}'}),
        refused=("a.png", "several labels"),
    ),
    "zip of class folders with junk": Collection(
        lambda root: write_zip(root / "a.zip", CAT_DOG | JUNK), "a.zip", classes=CAT_DOG_CLASSES
    ),
    "folder with one zip": Collection(
        lambda root: write_zip(root / "a.zip", pairs("images/{}.png", "masks/{}.png", HOLE * 255)), missing=MISSING
    ),
    "folder with two zips": Collection(
        lambda root: (write_zip(root / "a.zip", CAT_DOG), write_zip(root / "b.zip", CAT_DOG)), refused=("a.zip, b.zip",)
    ),
    "tar of class folders": Collection(
        lambda root: write_tar(root / "a.tar", CAT_DOG | JUNK), "a.tar", classes=CAT_DOG_CLASSES
    ),
    "tar of images and masks": Collection(
        lambda root: write_tar(root / "a.tar", pairs("images/{}.png", "masks/{}.png", HOLE * 255)), missing=MISSING
    ),
    "tar that is compressed": Collection(
        lambda root: write_tar(root / "a.tar.gz", CAT_DOG, "w:gz"), refused=("a.tar.gz", "compressed", "unpack")
    ),
    "formats in a tar": Collection(
        lambda root: write_tar(
            root / "a.tar", photos("0.jp2", "1.tiff", "3.jfif") | {"2.png": np.full((9, 9), 30000, np.uint16)}
        ),
        images=4,
    ),
    "images of real numbers": Collection(
        folder({"0.tif": Image.fromarray(np.asarray(photo(0).convert("L"), np.float32) / 255)}),
        refused=("of real numbers",),
    ),
    "images of 12 bits in 16": Collection(
        folder({"0.png": np.asarray(photo(0).convert("L")).astype(np.uint16) * 16}), refused=("of another range",)
    ),
    "images of 8 bits in 32": Collection(
        folder({"0.tif": Image.fromarray(np.asarray(photo(0).convert("L"), np.int32))}), refused=("of another range",)
    ),
    "formats of the extras in a tar": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.heic", "1.jxl")), images=2
    ),
    "formats in a table": Collection(
        lambda root: write_parquet(
            root / "a.parquet",
            {"image": [encode(photo(n), s) for n, s in enumerate((".heic", ".jxl", ".avif", ".jp2"))]},
        ),
        images=4,
    ),
    "formats of the extras": Collection(folder(photos("0.heic", "1.jxl")), images=2),
}

LABELS = {
    "paths with a dot in metadata": Collection(
        folder(photos("a.png", "b.png") | {"metadata.csv": "file_name,label\n./a.png,y\n./b.png,x\n"}),
        images=2,
        classes={"a.png": "y", "b.png": "x"},
    ),
    "metadata with a mark of byte order and semicolons": Collection(
        folder(photos("a.png", "b.png") | {"metadata.csv": "\ufefffile_name;label\na.png;y\nb.png;x\n"}),
        images=2,
        classes={"a.png": "y", "b.png": "x"},
    ),
    "metadata with a label for some": Collection(
        folder(photos("a.png", "b.png") | {"metadata.csv": "file_name,label\na.png,\nb.png,x\n"}),
        refused=("1 class missing", "a.png"),
    ),
    "webdataset with a class for some": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.jpg", "1.jpg") | {"0.cls": "1"}), refused=("1 class missing",)
    ),
    "parquet with a label for some": Collection(
        lambda root: write_parquet(
            root / "a.parquet", {"image": [photo(0), photo(1)], "label": [-1, 1]}, {"label": ["cat", "dog"]}
        ),
        refused=("1 class missing",),
    ),
    "labels for some, left out": Collection(
        folder(photos("a.png", "b.png") | LABELS_WITH_A_GAP), options=("--classes", "none"), images=2
    ),
    "an index and a name in JSON": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.jpg") | {"0.json": '{"label": 4, "label_name": "cat"}'}),
        images=1,
        classes={"0.jpg": "4"},
        plan=("not used: label_name", "--label-column"),
    ),
    "parquet with names that differ": Collection(
        lambda root: [
            write_parquet(root / f"train-{n}.parquet", {"image": [photo(n)], "label": [0]}, {"label": names})
            for n, names in enumerate((["cat", "dog"], ["dog", "cat"]))
        ],
        refused=("train-1.parquet", "names of classes differ"),
    ),
    "parquet with numbers as texts": Collection(
        lambda root: write_parquet(root / "a.parquet", {"image": [photo(0), photo(1)], "label": ["10", "2"]}),
        images=2,
        classes={"a.parquet#0#0#image": "10", "a.parquet#0#1#image": "2"},
        plan=("2 images of 2 classes",),
    ),
    "webdataset with names": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.jpg", "1.jpg") | {"0.cls": "dog\n", "1.cls": "cat"}),
        images=2,
        classes={"0.jpg": "dog", "1.jpg": "cat"},
    ),
    "webdataset with cls.txt": Collection(
        lambda root: write_tar(root / "a.tar", photos("0.jpg", "1.jpg") | {"0.cls.txt": "1", "1.cls.txt": "0"}),
        images=2,
        classes={"0.jpg": "1", "1.jpg": "0"},
    ),
    "webdataset with a name in JSON": Collection(
        lambda root: write_tar(
            root / "a.tar", photos("0.jpg", "1.jpg") | {f"{n}.json": f'{{"species": "s{n}"}}' for n in range(2)}
        ),
        options=("--label-column", "species"),
        images=2,
        classes={"0.jpg": "s0", "1.jpg": "s1"},
    ),
    "webdataset with other JSON": Collection(
        lambda root: write_tar(
            root / "a.tar", photos("0.jpg", "1.jpg") | {f"{n}.json": f'{{"species": "s{n}"}}' for n in range(2)}
        ),
        images=2,
        plan=("its keys are species", "--label-column"),
    ),
    "image folder of Hugging Face": Collection(
        folder(photos("a.png", "b.png") | {"metadata.csv": "file_name,label,text\na.png,dog,x\nb.png,cat,y\n"}),
        images=2,
        classes={"a.png": "dog", "b.png": "cat"},
        plan=("columns not used: text",),
    ),
    "image folder with masks": Collection(
        folder(
            pairs("{}.png", "m/{}.png", HOLE)
            | {"metadata.jsonl": "".join(f'{{"file_name": "{n}.png", "mask": "m/{n}.png"}}\n' for n in range(3))}
        ),
        missing=MISSING,
    ),
    "image folder with a parquet table of splits": Collection(
        lambda root: (
            write_folder(root, photos("train/a.png", "test/b.png")),
            write_parquet(root / "train/metadata.parquet", {"file_name": ["a.png"], "label": [4]}),
            write_parquet(root / "test/metadata.parquet", {"file_name": ["b.png"], "label": [4]}),
        ),
        options=("--split", "train"),
        images=1,
        classes={"a.png": "4"},
    ),
    "image folder that lacks a row": Collection(
        folder(photos("a.png", "b.png") | {"metadata.csv": "file_name,label\na.png,dog\n"}),
        refused=("without a label", "b.png"),
    ),
    "parquet with two columns of labels": Collection(
        lambda root: write_parquet(
            root / "a.parquet",
            {"img": [photo(0), photo(1)], "fine_label": [0, 1], "coarse_label": [1, 1]},
            {"fine_label": ["apple", "rose"], "coarse_label": ["fruit", "flower"]},
        ),
        options=("--label-column", "coarse_label"),
        images=2,
        classes={"a.parquet#0#0#img": "flower", "a.parquet#0#1#img": "flower"},
        plan=("columns not used: fine_label",),
    ),
    "parquet with lists of labels": Collection(
        lambda root: write_parquet(root / "a.parquet", {"image": [photo(0), photo(1)], "labels": [[0, 1], [1]]}),
        images=2,
        plan=("column labels is not used",),
    ),
    "parquet whose label is not among the names": Collection(
        lambda root: write_parquet(root / "a.parquet", {"image": [photo(0)], "label": [5]}, {"label": ["cat", "dog"]}),
        refused=("class 5 is not one of the 2 names",),
    ),
    "parquet with paths of images": Collection(
        lambda root: write_parquet(root / "a.parquet", {"image": ["x/0.png"], "label": [1]}),
        refused=("column image holds no encoded images, but string", "--labels"),
    ),
    "a file that is no archive": Collection(
        folder(photos("a.png")), source="a.png", refused=("a.png: is a file, but no tar",)
    ),
    "files of other kinds": Collection(
        folder({"a.npz": b"x", "b.pkl": b"x"}), refused=("no images there", "only .npz, .pkl")
    ),
    "a folder that is named for its kind of files": Collection(
        folder(photos("jpg/image_1.jpg", "segmim/segmim_1.jpg")),
        refused=("jpg may hold images and their annotations, or classes", "--classes folders"),
    ),
    "a text for each image": Collection(
        folder(photos("a.png") | {"a.txt": "cat"}), images=1, plan=("may hold labels: a.txt",)
    ),
    "a table that is not used": Collection(
        folder(photos("a.png", "b.png") | {"labels.csv": "file,label\na.png,dog\n"}),
        images=2,
        plan=("not used although they may hold labels: labels.csv", "--labels"),
    ),
    "boxes of YOLO beside images": Collection(
        folder(photos("images/a.png", "images/b.png") | {"labels/a.txt": "0 1 1 1 1", "labels/b.txt": "0 1 1 1 1"}),
        images=2,
        plan=("not used although they may hold labels: labels/a.txt, labels/b.txt",),
    ),
    "captions in a column of labels": Collection(
        lambda root: write_parquet(
            root / "a.parquet", {"image": [photo(n) for n in range(20)], "label": [f"text {n}" for n in range(20)]}
        ),
        refused=("20 different labels for 20 images look like captions", "--classes none"),
    ),
    "numbers as names of folders": Collection(
        folder(photos("10/a.png", "2/b.png")),
        images=2,
        classes={"10/a.png": "10", "2/b.png": "2"},
        plan=("--class-order number",),
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_inputs_that_were_once_read_wrong(name: str, tmp_path: Path) -> None:
    check(ONCE_WRONG[name], tmp_path)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_and_formats(name: str, tmp_path: Path) -> None:
    check(ARCHIVES[name], tmp_path)


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str, tmp_path: Path) -> None:
    check(LABELS[name], tmp_path)


def test_results_in_the_folder_of_the_images_are_no_images(tmp_path: Path) -> None:
    write_folder(tmp_path, CAT_DOG)
    command = ("shard", tmp_path, tmp_path / "raw", "--image-size", SIZE, "--sheet", tmp_path / "sheet.png")
    for _ in range(2):
        result = lfm(*command)
        assert result.exit_code == 0 and "3 images of 2 classes" in result.stdout, result.stderr


def test_the_plan_writes_nothing_but_the_sheet(tmp_path: Path) -> None:
    write_folder(tmp_path / "p", CAT_DOG | {"notes.txt": "x"})
    result = lfm("shard", tmp_path / "p", tmp_path / "raw", "--dry-run", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0 and not (tmp_path / "raw").exists()
    for part in ("2 from names of folders: 0 cat (2), 1 dog (1)", "left aside 1 .txt", "cat/0.jpg, class cat"):
        assert part in result.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 96 and sheet.height > 96


def test_the_plan_says_that_the_command_would_fail(tmp_path: Path) -> None:
    names = [f"p/images/{number}.png" for number in range(5)]
    write_folder(tmp_path, photos(*names) | {f"p/masks/{number}.png": HOLE for number in range(4)})
    command = ("shard", tmp_path / "p", tmp_path / "raw", "--image-size", SIZE)
    line = "fails without --dry-run: 1 of 5 images are incomplete; repair or remove them, or allow more than 1.0% with"
    assert line in lfm(*command, "--dry-run").stdout and lfm(*command).exit_code == 2
    assert "fails without" not in lfm(*command, "--dry-run", "--max-rejected", "0.2").stdout
