"""Collections as people pack them: `lfm shard` reads each one right, or refuses it and names the readings."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.palettes import PALETTES
from lfm.data.sources.readers import inner_name
from tests.support.commands import assert_one_line, lfm
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
from tests.support.images import raw_samples


@dataclass(frozen=True)
class Collection:
    """An input of `lfm shard` and what is right: the samples, or parts of the refusal."""

    write: Callable[[Path], object]  # writes below a folder
    source: str = ""  # in that folder
    options: tuple[object, ...] = ()
    images: int = 3
    classes: dict[str, str] = field(default_factory=dict)  # class by the inner name of the image
    missing: float | None = None  # share of each mask
    ids: tuple[int, ...] | None = None  # in each map
    labels: dict[int, str] = field(default_factory=dict)  # some of the names of ids
    plan: tuple[str, ...] = ()  # parts of the plan
    refused: tuple[str, ...] = ()  # parts of the error


def folder(files: dict) -> Callable[[Path], None]:
    return lambda root: write_folder(root, files)


def check(collection: Collection, tmp_path: Path) -> None:
    """Shard a collection and compare the shards, or the error, with what is right."""
    root = tmp_path / "source"
    root.mkdir()
    collection.write(root)
    options = [
        root / option.removeprefix("@") if str(option).startswith("@") else option for option in collection.options
    ]
    command = ("shard", root / collection.source, tmp_path / "raw", "--image-size", SIZE, "--format", "png")
    result = lfm(*command, *options)
    if collection.refused:
        assert_one_line(result, *collection.refused)
        assert not (tmp_path / "raw" / manifests.MANIFEST).exists()
        return
    assert result.exit_code == 0, result.stderr
    for part in collection.plan:
        assert part in result.stdout, result.stdout
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    samples = {inner_name(name): sample for name, sample in raw_samples(tmp_path / "raw").items()}
    names = {record.index: record.name for record in manifest.classes}
    classes = {name: names[s.class_index] for name, s in samples.items() if s.class_index is not None}
    assert (len(samples), manifest.rejects) == (collection.images, []), result.stdout
    assert classes == collection.classes
    used = {record.name: record.count for record in manifest.classes if record.count}
    assert used == Counter(collection.classes.values())
    for sample in samples.values():
        assert (sample.mask is None) == (collection.missing is None)
        assert sample.mask is None or abs(sample.mask.mean() - (collection.missing or 0)) < 0.01
        assert (sample.segmentation is None) == (collection.ids is None)
        assert sample.segmentation is None or tuple(np.unique(sample.segmentation).tolist()) == collection.ids
    assert collection.labels.items() <= manifest.labels.items()


EDM_FILES = {f"{n // 6:05d}/img{n:08d}.png": photo(n) for n in range(8)}
EDM_LABELS = [[name, n % 3] for n, name in enumerate(EDM_FILES)]
EDM = EDM_FILES | {"dataset.json": json.dumps({"labels": EDM_LABELS})}
EDM_CLASSES = {name: str(label) for name, label in EDM_LABELS}
CAT_DOG = photos("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
CAT_DOG_CLASSES = {"cat/0.jpg": "cat", "cat/1.jpg": "cat", "dog/0.jpg": "dog"}
JUNK = {"__MACOSX/cat/._0.jpg": b"\0\5\x16\7", "cat/._0.jpg": b"\0\5\x16\7", "cat/Thumbs.db": b"x"}
RGBA_STROKES = np.stack([HOLE * 255] * 4, -1)
CUT_OUT = np.dstack([np.asarray(photo(9)), 255 - HOLE * 255])
CUT_OUT_OF_BLACK = np.dstack([np.zeros_like(CUT_OUT[..., :3]), CUT_OUT[..., 3]])
RED = np.stack([HOLE * 255, HOLE * 0, HOLE * 0], -1)
PALETTE_MASK = Image.frombytes("P", (SIZE, SIZE), HOLE.tobytes())
PALETTE_MASK.putpalette([0, 0, 0, 128, 0, 0])


def indexed(*colours: int) -> Image.Image:
    """A palette image of IDS whose indices have these colours."""
    image = Image.frombytes("P", (SIZE, SIZE), IDS.tobytes())
    image.putpalette([channel for colour in colours for channel in colour.to_bytes(3, "big")])
    return image


def coloured(*colours: int) -> np.ndarray:
    """An RGB map of IDS whose classes have these colours."""
    return np.array([list(colour.to_bytes(3, "big")) for colour in colours], np.uint8)[IDS]


def masks(mask: np.ndarray | Image.Image) -> Callable[[Path], None]:
    return folder(pairs("{}.png", "{}_mask.png", mask))


def maps(content: np.ndarray | Image.Image, **files: str) -> Callable[[Path], None]:
    return folder(
        pairs("images/{}.jpg", "annotations/{}.png", content)
        | {name.replace("_txt", ".txt"): t for name, t in files.items()}
    )


# Inputs that were once read wrong without a word, or not at all.
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


BOTH = {f"{n}.{suffix}": content for n in range(3) for suffix, content in (("jpg", photo(n)), ("png", IDS))}
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

FOLDERS = {
    "folders with splits in their names": Collection(
        folder(photos("cars_train/1.png", "cars_test/2.png")),
        refused=("cars_test, cars_train may be a split", "--split"),
    ),
    "classes with the word of a split": Collection(
        folder(photos("train_station/1.png", "bar/2.png")),
        images=2,
        classes={"train_station/1.png": "train_station", "bar/2.png": "bar"},
    ),
    "images in the folder of a split": Collection(
        folder(photos("val/images/0.png", "val/images/1.png", "train/images/2.png")),
        options=("--split", "val"),
        images=2,
        plan=("looked through the folder images",),
    ),
    "a wrapper in a split": Collection(
        folder(photos("train/x/cat/0.png", "train/x/dog/1.png")),
        images=2,
        classes={"cat/0.png": "cat", "dog/1.png": "dog"},
    ),
    "names with an end that others lack": Collection(
        folder(pairs("{}.png", "{}_depthmap.png", IDS)), refused=("_depthmap", "--map-files depthmap")
    ),
    "names with an end that others lack, chosen": Collection(
        folder(pairs("{}.png", "{}_depthmap.png", IDS)), options=("--map-files", "depthmap"), ids=(0, 1, 2)
    ),
    "folders of folders": Collection(
        folder(photos("clipart/cat/0.png", "real/cat/1.png", "real/dog/2.png")),
        refused=("outer folders (clipart, real)", "inner ones (cat, dog)", "--classes inner-folders"),
    ),
    "the outer of folders": Collection(
        folder(photos("a/cat/0.png", "b/cat/1.png", "b/dog/2.png")),
        options=("--classes", "folders"),
        classes={"a/cat/0.png": "a", "b/cat/1.png": "b", "b/dog/2.png": "b"},
    ),
    "the inner of folders": Collection(
        folder(photos("a/cat/0.png", "b/cat/1.png", "b/dog/2.png")),
        options=("--classes", "inner-folders"),
        classes={"a/cat/0.png": "cat", "b/cat/1.png": "cat", "b/dog/2.png": "dog"},
        plan=("names of the innermost folders",),
    ),
    "versions of images": Collection(
        folder(photos("noisy/1.png", "noisy/2.png", "clean/1.png", "clean/2.png")),
        refused=("versions of the same images", "--classes folders"),
    ),
    "images twice by suffix": Collection(
        folder(BOTH), refused=(".jpg and .png", "--map-files png", "--mask-files none")
    ),
    "images twice by suffix, one a map": Collection(folder(BOTH), options=("--map-files", "png"), ids=(0, 1, 2)),
    "images twice by suffix, all images": Collection(folder(BOTH), options=("--mask-files", "none"), images=6),
    "names of annotations without images": Collection(
        folder(photos("x1.png", "x2.png", "y1_seg.png")), refused=("y1_seg.png may annotate", "--mask-files none")
    ),
    "folders called like splits": Collection(
        folder(photos("train_images/1/0.png", "test_images/1/1.png")),
        refused=("--split test_images", "--classes folders"),
    ),
    "one of the folders called like splits": Collection(
        folder(photos("trainA/cat/0.png", "trainA/dog/1.png", "trainB/2.png")),
        options=("--split", "trainA"),
        images=2,
        classes={"cat/0.png": "cat", "dog/1.png": "dog"},
    ),
    "two wrappers around splits of any case": Collection(
        folder(photos("a/b/Train/cat/0.png", "a/b/Train/dog/0.png", "a/b/TEST/cat/1.png")),
        options=("--split", "train"),
        images=2,
        classes={"cat/0.png": "cat", "dog/0.png": "dog"},
        plan=("Train of TEST, Train",),
    ),
    "a wrapper around images": Collection(
        folder(photos("x/0.png", "x/1.png", "x/2.png")), plan=("3 images of 0 classes",)
    ),
    "a split that nobody chose": Collection(
        folder(photos("train/0.png", "extra/1.png", "unlabeled/2.png")), refused=("extra, train, unlabeled", "--split")
    ),
    "a split beside classes": Collection(
        folder(photos("dev/0.png", "cat/1.png", "dog/2.png")), refused=("--split dev", "--classes folders")
    ),
    "splits in classes": Collection(
        folder(photos("cat/train/0.png", "cat/test/1.png", "dog/train/2.png")), refused=("test, train", "--split")
    ),
    "one of the splits in classes": Collection(
        folder(photos("cat/train/0.png", "cat/test/1.png", "dog/train/2.png")),
        options=("--split", "train"),
        images=2,
        classes={"cat/train/0.png": "cat", "dog/train/2.png": "dog"},
    ),
    "numbered parts of one list": Collection(
        folder(photos("00000/00000.png", "00000/00001.png", "01000/01000.png")),
        refused=("--classes none", "--classes folders"),
    ),
    "classes called like annotations": Collection(
        folder(photos("with_mask/0.png", "without_mask/1.png")), refused=("--classes folders",)
    ),
    "classes called like annotations, chosen": Collection(
        folder(photos("with_mask/0.png", "without_mask/1.png")),
        options=("--classes", "folders"),
        images=2,
        classes={"with_mask/0.png": "with_mask", "without_mask/1.png": "without_mask"},
    ),
    "images beside another kind of images": Collection(
        folder(photos("images/0.png", "depth/0.png")),
        refused=("images may hold images and their annotations", "--classes folders"),
    ),
    "names that are not UTF-8 or have newlines": Collection(
        lambda root: [
            (root / name).write_bytes(encode(photo(n)))
            for n, name in enumerate(["a\udce9.png", "b\nc.png", "d\x1b[31m.png"])
        ],
        plan=("\\xe9", "b\\nc", "d\\x1b[31m"),
    ),
    "links and copies": Collection(
        lambda root: (
            write_folder(root, {"a.png": photo(0), "b.png": photo(0)}),
            (root / "c.png").symlink_to(root / "a.png"),
        ),
        plan=("1 images are symbolic links", "2 images are copies of others"),
    ),
}

GT = "gtFine/val/bonn/x{}_gtFine_"
CITYSCAPES = pairs("leftImg8bit/val/bonn/x{}_leftImg8bit.png", GT + "labelIds.png", IDS) | {
    name: content
    for n in range(3)
    for name, content in (
        (GT.format(n) + "color.png", coloured(0, 0x804080, 0x464646)),
        (GT.format(n) + "instanceIds.png", IDS),
        (GT.format(n) + "polygons.json", "{}"),
    )
}
SUPERVISELY = pairs("img/{}.jpg", "masks_machine/{}.jpg.png", IDS) | {f"ann/{n}.jpg.json": "{}" for n in range(3)}

ANNOTATIONS = {
    "folders with spaces": Collection(
        folder(pairs("Original Images/{}.png", "Ground Truth/{}.png", IDS)), ids=(0, 1, 2)
    ),
    "masks of metadata without classes": Collection(
        folder(
            pairs("images/{}.png", "masks/{}.png", HOLE)
            | {"metadata.csv": "file_name,mask\n" + "".join(f"images/{n}.png,masks/{n}.png\n" for n in range(3))}
        ),
        missing=MISSING,
    ),
    "labels beside images by their ends": Collection(folder(pairs("{}_image.png", "{}_label.png", IDS)), ids=(0, 1, 2)),
    "masks of DeepGlobe": Collection(
        folder(pairs("train/{}_sat.jpg", "train/{}_mask.png", HOLE * 255)), missing=MISSING
    ),
    "masks and images by the start of their names": Collection(
        folder(pairs("img_{}.png", "mask_{}.png", HOLE * 255)), missing=MISSING
    ),
    "instances beside labels": Collection(
        folder(
            pairs("training/images/{}.jpg", "training/labels/{}.png", IDS)
            | {f"training/instances/{n}.png": IDS for n in range(3)}
        ),
        ids=(0, 1, 2),
        plan=("annotations left aside: instances",),
    ),
    "objects of VOC": Collection(
        folder(
            pairs("JPEGImages/{}.jpg", "SegmentationClass/{}.png", IDS)
            | {f"SegmentationObject/{n}.png": IDS for n in range(3)}
        ),
        ids=(0, 1, 2),
        plan=("3 .png in SegmentationObject",),
    ),
    "maps of a lossy format": Collection(
        folder(pairs("images/{}.png", "annotations/{}.webp", np.stack([IDS * 40] * 3, -1))),
        refused=("WEBP alters class ids",),
    ),
    "an id that may stand for no class": Collection(
        maps(np.where(IDS == 2, 255, IDS).astype(np.uint8)), ids=(0, 1, 255), plan=("if 255 stands for no class",)
    ),
    "an ignored id of 16 bits": Collection(
        maps(np.where(IDS == 2, 65535, IDS.astype(np.uint16))),
        options=("--ignore-label", 65535),
        ids=(0, 1, 65535),
        labels={65535: "unlabelled"},
    ),
    "masks by the start of their names": Collection(folder(pairs("{}.png", "mask_{}.png", HOLE)), missing=MISSING),
    "white in maps of three names": Collection(
        maps(HOLE * 255, labels_txt="a\nb\nc\n"), refused=("255 may be the second label", "--ignore-label 255")
    ),
    "Kaggle's Carvana": Collection(
        folder(pairs("train/{}.jpg", "train_masks/{}_mask.gif", Image.fromarray(HOLE * 255)) | photos("test/a.jpg")),
        options=("--split", "train"),
        missing=MISSING,
    ),
    "Cityscapes": Collection(
        folder(CITYSCAPES), ids=(0, 1, 2), plan=("annotations left aside: gtfine_color, gtfine_instanceids",)
    ),
    "Supervisely": Collection(folder(SUPERVISELY), refused=("--map-files masks_machine", "--mask-files masks_machine")),
    "Supervisely with a choice": Collection(
        folder(SUPERVISELY), options=("--map-files", "masks_machine"), ids=(0, 1, 2)
    ),
    "masks of LaMa": Collection(folder(pairs("{}.png", "{}_mask001.png", HOLE * 255)), missing=MISSING),
    "two masks of one image": Collection(
        folder(pairs("{}.png", "{}_mask000.png", HOLE * 255) | {"0_mask001.png": HOLE}),
        refused=("both annotate 0.png",),
    ),
    "masks of every instance": Collection(
        folder(photos("a/images/a.png", "b/images/b.png") | {f"a/masks/{n}.png": HOLE for n in range(3)}),
        refused=("belongs to an image", "--mask-files none"),
    ),
    "CamVid as it is published": Collection(
        folder(
            pairs(
                "701_StillsRaw_full/x{}.png", "LabeledApproved_full/x{}_L.png", coloured(0x804080, 0x800000, 0x808080)
            )
        ),
        ids=(4, 17, 21),
        labels={17: "Road", 4: "Building"},
        plan=("all colours are those of camvid",),
    ),
    "colours of a palette file": Collection(
        folder(
            pairs("images/{}.png", "labels/{}.png", coloured(0x010203, 0xFF0000, 0x00FF00))
            | {"class_dict.csv": "name,r,g,b\nsky,1,2,3\nland,255,0,0\nsea,0,255,0\n"}
        ),
        ids=(0, 1, 2),
        labels={0: "sky", 1: "land", 2: "sea"},
    ),
    "colours of no palette": Collection(
        maps(coloured(0x010203, 0xFF0000, 0x00FF00)), refused=("3 colours", "--palette", "class_dict.csv")
    ),
    "colours of two palettes": Collection(
        maps(coloured(0, 0x804080, 0x804080)), refused=("--palette camvid or --palette cityscapes",)
    ),
    "a palette by choice": Collection(
        maps(coloured(0, 0x804080, 0x804080)), options=("--palette", "cityscapes"), ids=(0, 7), labels={7: "road"}
    ),
    "colours of VOC": Collection(
        folder(pairs("JPEGImages/{}.jpg", "SegmentationClass/{}.png", coloured(0, 0x800000, 0x008000))),
        ids=(0, 1, 2),
        labels={2: "bicycle"},
    ),
    "palettes that differ": Collection(
        folder(
            photos("images/0.png", "images/1.png")
            | {"labels/0.png": indexed(0, 0xFF0000, 0x00FF00), "labels/1.png": indexed(0, 0x00FF00, 0xFF0000)}
        ),
        refused=("one index has several colours", "--palette indices"),
    ),
    "maps of 16 bits": Collection(
        maps(IDS.astype(np.uint16) * 150, labels_txt="0: a\n150: b\n300: c\n"), ids=(0, 150, 300)
    ),
    "maps of 16 bits without names": Collection(
        maps(IDS.astype(np.uint16) * 150), refused=("map with unknown ids", "300")
    ),
    "black and white maps": Collection(
        maps(HOLE * 255), ids=(0, 1), labels={0: "background", 1: "foreground"}, plan=("two labels",)
    ),
    "ids beyond the list": Collection(maps(IDS, labels_txt="sky\nland\n"), refused=("map with unknown ids: 2",)),
    "an id that is ignored": Collection(
        maps(IDS), options=("--ignore-label", 2), ids=(0, 1, 2), labels={2: "unlabelled"}
    ),
    "maps that are photographs": Collection(
        folder(photos("images/0.png", "images/1.png", "annotations/0.png", "annotations/1.png")), refused=("colours",)
    ),
}

MASKS = {
    "boolean": Collection(masks(Image.fromarray(HOLE > 0)), missing=MISSING),
    "palette": Collection(masks(PALETTE_MASK), missing=MISSING),
    "red": Collection(masks(RED), missing=MISSING),
    "dark grey": Collection(masks(HOLE * 100), missing=MISSING),
    "16 bits": Collection(masks(HOLE.astype(np.uint16)), missing=MISSING),
    "cut out of an opaque image": Collection(masks(CUT_OUT), missing=MISSING),
    "cut out of a black image, or black strokes": Collection(
        masks(CUT_OUT_OF_BLACK), refused=("mask dark on transparent", "--mask-value")
    ),
    "cut out of a black image, chosen": Collection(
        masks(CUT_OUT_OF_BLACK), options=("--mask-value", "transparent"), missing=MISSING
    ),
    "black strokes, chosen": Collection(
        masks(CUT_OUT_OF_BLACK), options=("--mask-value", "opaque"), missing=1 - MISSING
    ),
    "grey on white": Collection(masks(np.where(HOLE, 128, 255).astype(np.uint8)), refused=("mask not binary",)),
    "white, opaque": Collection(masks(np.dstack([HOLE * 255] * 3 + [HOLE * 0 + 255])), missing=MISSING),
    "white on transparent, grey": Collection(masks(Image.fromarray(RGBA_STROKES[..., :2], "LA")), missing=MISSING),
    "real numbers": Collection(
        folder(pairs("images/{}.png", "masks/{}.tif", Image.fromarray(HOLE.astype(np.float32)))), missing=MISSING
    ),
    "inverted": Collection(masks(255 - HOLE * 255), options=("--mask-value", "black"), missing=MISSING),
    "inverted, of 0 and 1": Collection(masks(1 - HOLE), options=("--mask-value", "black"), missing=MISSING),
    "empty": Collection(masks(HOLE * 0), refused=("3 mask empty",)),
    "full": Collection(masks(HOLE * 0 + 255), refused=("3 mask full",)),
    "red and green": Collection(
        masks(np.where(HOLE[..., None], [255, 0, 0], [0, 255, 0]).astype(np.uint8)),
        refused=("mask of several colours",),
    ),
    "class ids": Collection(masks(IDS), refused=("mask not binary",)),
    "values for images without masks": Collection(
        folder(photos("a.png")), options=("--mask-value", "black"), refused=("has no masks",)
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


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    check(FOLDERS[name], tmp_path)


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations(name: str, tmp_path: Path) -> None:
    check(ANNOTATIONS[name], tmp_path)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, tmp_path: Path) -> None:
    check(MASKS[name], tmp_path)


def test_palettes_are_the_published_ones() -> None:
    assert {name: len(colours) for name, colours in PALETTES.items()} == {"camvid": 32, "cityscapes": 29, "voc": 22}
    assert PALETTES["voc"][0x800000] == (1, "aeroplane") and PALETTES["voc"][0x004080] == (20, "tvmonitor")


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
