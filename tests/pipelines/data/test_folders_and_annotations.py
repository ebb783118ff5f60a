"""Folders, masks and segmentations as people have them: each is read right, or refused with the readings."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm.data.palettes import PALETTES
from lfm.data.sources.layouts import read
from tests.support.collection_checks import (
    BOTH,
    CUT_OUT,
    CUT_OUT_OF_BLACK,
    PALETTE_MASK,
    RED,
    RGBA_STROKES,
    Collection,
    check,
    coloured,
    folder,
    indexed,
    maps,
    masks,
)
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
    write_tar,
    write_zip,
)

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
    "class folders and a copy of them in a folder": Collection(
        folder(photos("set/yes/0.png", "set/no/1.png", "yes/0.png", "no/1.png")),
        refused=("set holds folders with the names of those beside it (no, yes)", "--classes folders"),
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
        refused=("--split train_images", "--classes folders"),
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

VOC = (
    pairs("d/VOC/JPEGImages/{}.jpg", "d/VOC/SegmentationClass/{}.png", IDS, count=4)
    | {f"d/VOC/SegmentationObject/{n}.png": HOLE for n in range(4)}
    | {"d/VOC/ImageSets/Segmentation/train.txt": "0\n1\n2\n", "d/VOC/ImageSets/Segmentation/val.txt": "3\n"}
)
CUB = pairs("c/images/x/{}.jpg", "c/segmentations/x/{}.png", HOLE * 255, count=2) | {
    "c/images/y/2.jpg": photo(2),
    "c/segmentations/y/2.png": HOLE * 255,
}
CITIES = (
    pairs("im/train/a/{}_leftImg8bit.png", "gtFine/train/a/{}_gtFine_labelIds.png", HOLE)
    | {f"gtFine/train/a/{n}_gtFine_labelTrainIds.png": IDS for n in range(3)}
    | photos("im/val/b/0_leftImg8bit.png")
)
DEFECTS = photos("train/good/0.png", "test/crack/0.png", "test/hole/0.png") | {
    "ground_truth/crack/0_mask.png": HOLE * 255,
    "ground_truth/hole/0_mask.png": HOLE * 255,
}
MASKS_OF_SPLITS = pairs("train/{}.jpg", "train/{}_mask.png", IDS) | pairs("valid/{}.jpg", "valid/{}_mask.png", IDS)
SOFT = np.linspace(0, 255, 6).astype(np.uint8)[np.arange(SIZE) % 6][None].repeat(SIZE, 0)

PAIRING = {
    "a special layout in a wrapper": Collection(folder(VOC), options=("--split", "train"), ids=(0, 1, 2)),
    "a special layout in a wrapper, splits": Collection(folder(VOC), refused=("holds the splits train, val",)),
    "a special layout, other files": Collection(
        folder(VOC), options=("--map-files", "SegmentationObject"), images=4, ids=(0, 1)
    ),
    "a special layout without its maps": Collection(
        folder(CUB),
        options=("--map-files", "none"),
        classes={"images/x/0.jpg": "x", "images/x/1.jpg": "x", "images/y/2.jpg": "y"},
    ),
    "classes in a wrapper": Collection(
        folder({f"w/{name}": content for name, content in CUB.items()} | {"w/c/segmentations/z.png": HOLE}),
        options=("--layout", "annotated", "--classes", "folders", "--map-files", "none"),
        classes={"w/c/images/x/0.jpg": "x", "w/c/images/x/1.jpg": "x", "w/c/images/y/2.jpg": "y"},
    ),
    "the end of a kind of annotation": Collection(
        folder(CITIES), options=("--split", "train", "--map-files", "labelTrainIds"), ids=(0, 1, 2)
    ),
    "the end of several kinds": Collection(
        folder(CITIES),
        options=("--split", "train", "--map-files", "ids"),
        refused=("several end so", "gtfine_labelids"),
    ),
    "annotations that the layout does not read": Collection(
        folder(photos("a.png", "b.png")),
        options=("--map-files", "depth"),
        refused=("--map-files depth", "no files of that name"),
    ),
    "equal names in other folders": Collection(
        folder(DEFECTS), options=("--split", "train"), refused=("no name in mask", "--mask-files none")
    ),
    "folders of annotations that lack the split": Collection(
        folder(DEFECTS),
        options=("--split", "test"),
        images=2,
        missing=MISSING,
        classes={"test/crack/0.png": "crack", "test/hole/0.png": "hole"},
    ),
    "masks in splits": Collection(folder(MASKS_OF_SPLITS), refused=("holds the splits train, valid",)),
    "masks in splits that are ids": Collection(
        folder(MASKS_OF_SPLITS), options=("--split", "train"), refused=("may be a mask of holes", "--map-files mask")
    ),
    "masks in splits that are ids, chosen": Collection(
        folder(MASKS_OF_SPLITS), options=("--split", "train", "--map-files", "_mask"), ids=(0, 1, 2)
    ),
    "shades": Collection(maps(SOFT), refused=("may be shades of a soft mask", "--palette indices")),
    "shades that are ids": Collection(maps(SOFT), options=("--palette", "indices"), ids=(0, 51, 102, 153, 204, 255)),
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
    "grey on white": Collection(
        masks(np.where(HOLE, 128, 255).astype(np.uint8)), refused=("not binary", "--map-files mask")
    ),
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
        refused=("of several colours", "--map-files mask"),
    ),
    "class ids": Collection(masks(IDS), refused=("not binary", "--map-files mask")),
    "values for images without masks": Collection(
        folder(photos("a.png")), options=("--mask-value", "black"), refused=("has no masks",)
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    check(FOLDERS[name], tmp_path)


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations(name: str, tmp_path: Path) -> None:
    check(ANNOTATIONS[name], tmp_path)


@pytest.mark.parametrize("name", PAIRING)
def test_annotations_of_the_same_image_only(name: str, tmp_path: Path) -> None:
    check(PAIRING[name], tmp_path)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, tmp_path: Path) -> None:
    check(MASKS[name], tmp_path)


def test_palettes_are_the_published_ones() -> None:
    assert {name: len(colours) for name, colours in PALETTES.items()} == {"camvid": 32, "cityscapes": 29, "voc": 22}
    assert PALETTES["voc"][0x800000] == (1, "aeroplane") and PALETTES["voc"][0x004080] == (20, "tvmonitor")


WRITERS = {
    "folder": lambda root, files: write_folder(root / "x", files),
    "x.zip": lambda root, files: write_zip(root / "x.zip", files),
    "x.tar": lambda root, files: write_tar(root / "x.tar", files),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    classes=st.dictionaries(
        st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=8).map(
            lambda name: f"c{name}"
        ),
        st.integers(1, 4),
        min_size=2,
        max_size=5,
    ),
    wrappers=st.lists(st.sampled_from(["data", "pictures", "v1.0"]), max_size=2),
    suffix=st.sampled_from([".png", ".JPG", ".webp"]),
    container=st.sampled_from(sorted(WRITERS)),
)
def test_class_folders_are_the_same_in_any_container(
    classes: dict[str, int], wrappers: list[str], suffix: str, container: str, tmp_path: Path
) -> None:
    """Wrapping folders, files of operating systems, odd names and the container change nothing."""
    top = "".join(f"{folder}/" for folder in wrappers)
    names = [f"{top}{name}/{number}{suffix}" for name, count in classes.items() for number in range(count)]
    junk = [f"{top}{next(iter(classes))}/._0{suffix}", f"__MACOSX/{names[0]}", f"{top}.ipynb_checkpoints/0{suffix}"]
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    WRITERS[container](root, dict.fromkeys([*names, *junk], b"x"))
    source = read(str(root / ("x" if container == "folder" else container)))
    assert list(source.class_names) == sorted(classes)
    counts = Counter(source.class_names[item.class_index] for item in source.items if item.class_index is not None)
    assert counts == classes
