"""Layouts of images with segmentations or masks: paired folders, ADE20K, COCO-Stuff, CelebAMask-HQ, inpainting."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial

from lfm import storage
from lfm.data.sources.class_folders import read_folder
from lfm.data.sources.labels import column_of, read_table
from lfm.data.sources.map_rules import parse_palette
from lfm.data.sources.names import SPLIT, stem
from lfm.data.sources.source import UNLABELLED, Layout, Source, Tree, choose_split, read_text, split_folder
from lfm.data.transforms import Rejected, decode_mask
from lfm.errors import ConfigError, DataError, StorageError
from lfm.types import SourceItem

# Folders of images and of their maps, by the names that collections give them.
PAIRS = (
    ("images", "annotations"),
    ("images", "segmentations"),
    ("images", "labels"),
    ("JPEGImages", "SegmentationClass"),
    ("{split}", "{split}annot"),
    ("{split}", "stuffthingmaps/{split}"),
    ("{split}", "annotations/{split}"),
)
# The parts of a face whose class ids are 1 to 18, in the order in which they are painted.
FACE_PARTS = (
    "skin",
    "l_brow",
    "r_brow",
    "l_eye",
    "r_eye",
    "eye_g",
    "l_ear",
    "r_ear",
    "ear_r",
    "nose",
    "mouth",
    "u_lip",
    "l_lip",
    "neck",
    "neck_l",
    "cloth",
    "hair",
    "hat",
)
FACE_PARTS_OFFICIAL = (
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",
    "neck_l",
    "neck",
    "cloth",
)


ADE20K_NAMES = "objectInfo150.txt"
SAMPLES = 8  # masks whose content is checked
PALETTE_FILES = ("class_dict.csv", "label_colors.txt", "labelmap.txt", "palette.txt")


def labels_of(tree: Tree, default: dict[int, str]) -> dict[int, str]:
    """Return the class ids of labels.txt, a line each: `3<tab>name`, `3: name`, or the name alone.

    The colours of a palette file are noted in `tree.about`.
    """
    for name in PALETTE_FILES:
        if text := read_text(tree, name):
            tree.about.colours = parse_palette(text, storage.join(tree.root, name))
            break
    lines = [line.strip() for line in (read_text(tree, "labels.txt") or "").splitlines() if line.strip()]
    if not lines:
        return default
    matches = [re.fullmatch(r"(\d+)\s*[:\s]\s*(.+)", line) for line in lines]
    labels = {int(match[1]): match[2] for match in matches if match}
    if len(labels) != len(lines):
        labels = dict(enumerate(lines))
    labels.setdefault(255, UNLABELLED)
    return labels


def _folders_of_pairs(tree: Tree, split: str | None) -> tuple[str, str, str | None] | None:
    """Return the folder of the images, that of the maps, and their split; None if there are no such folders."""
    top_folders = sorted({name.split("/")[0] for name in tree.names if "/" in name})
    by_split: dict[str, tuple[str, str]] = {}
    for images, maps in PAIRS:
        for candidate in top_folders:
            pair = images.format(split=candidate), maps.format(split=candidate)
            if tree.has_images(pair[0]) and tree.has_images(pair[1]):
                if "{" not in images:
                    return *pair, split
                by_split[candidate] = pair
    if not by_split:
        return None
    split = choose_split(tree, set(by_split), split)
    return *by_split[split], split


def read_paired(tree: Tree, split: str | None, default_labels: dict[int, str] | None = None) -> Source:
    """Read images with maps, and masks in `masks`, of the same name in a folder beside; class ids stay as they are.

    Raises:
        ConfigError: there are several splits and none was chosen.
        DataError: there are no folders of images and maps.
    """
    pair = _folders_of_pairs(tree, split)
    if pair is None:
        known = ", ".join(" + ".join(pair) for pair in PAIRS).replace("{split}", "SPLIT")
        raise DataError(f"{tree.root}: no folders of images and maps there; name them like one of these: {known}")
    images, maps, split = pair
    lists = {name.rpartition("/")[2][:-4] for name in tree.names if name.startswith("ImageSets/Segmentation/")}
    if lists:
        split = choose_split(tree, lists, split)
    base = read_folder(tree.subtree(images), None if lists or images == split else split)
    split_folder = base.root[len(storage.join(tree.root, images)) + 1 :]
    paths = [f"{split_folder}/{item.image}" if split_folder else item.image for item in base.items]
    by_stem = {stem(path): (path, item.class_index) for path, item in zip(paths, base.items, strict=True)}
    stems = list(by_stem)
    if lists:
        stems = (read_text(tree, f"ImageSets/Segmentation/{split}.txt") or "").split()
    maps_and_masks = {stem(name): name for name in tree.images if name.startswith((f"{maps}/", "masks/"))}
    has_masks = tree.has_images("masks")
    items = []
    for name in stems:
        path, class_index = by_stem.get(name, (f"{name}.jpg", None))
        segmentation, mask = (
            maps_and_masks.get(f"{folder}/{name}", f"{folder}/{name}.png") for folder in (maps, "masks")
        )
        items.append(SourceItem(f"{images}/{path}", class_index, segmentation, mask if has_masks else None))
    return Source(
        tree.root,
        tuple(items),
        base.class_names,
        labels_of(tree, default_labels or {}),
        read=tree.read,
        about=tree.about,
    )


def _recognizes_pairs(tree: Tree) -> bool:
    """Whether there are such folders; files that the user has named are read by the layout `annotated`."""
    if tree.choices.names_files:
        return False
    return tree.has_name("^[a-z]+annot/") or any(
        _stems(tree, images) & _stems(tree, maps) for images, maps in PAIRS if "{" not in images
    )


def _stems(tree: Tree, folder: str) -> set[str]:
    """Return the paths in a folder of images, without suffix."""
    return {stem(name)[len(folder) + 1 :] for name in tree.images if name.startswith(f"{folder}/")}


def read_ade20k(tree: Tree, split: str | None) -> Source:
    """Read ADEChallengeData2016: 150 classes, 0 = other, with the names of objectInfo150.txt."""
    if tree.has_name(r"ADE_(train|val)_\d+_seg\.png$"):
        raise DataError(
            f"{tree.root}: is the full ADE20K, whose maps encode thousands of classes; download ADEChallengeData2016, "
            "the scene parsing benchmark with 150 classes, and name its folder"
        )
    names = _ade20k_names(tree)
    if not names:
        tree.about.notes.append(
            f"classes of segmentations are called by their numbers, since {ADE20K_NAMES} is missing"
        )
    return read_paired(tree, split, {0: "other", **{index: str(index) for index in range(1, 151)}, **names})


def _ade20k_names(tree: Tree) -> dict[int, str]:
    """Return the names of the classes by objectInfo150.txt, a table of Idx, Ratio, Train, Val and Name; empty without it.

    A name is the first of its synonyms, unless another class has the same first one.

    Raises:
        DataError: it is no such table.
    """
    text, where = read_text(tree, ADE20K_NAMES), storage.join(tree.root, ADE20K_NAMES)
    if text is None:
        return {}
    rows = read_table(text.encode(), where)
    columns = list(rows[0]) if rows else []
    index, name = column_of(columns, ("idx",)), column_of(columns, ("name",))
    if index is None or name is None or not all(str(row[index]).isdecimal() and row[name] for row in rows):
        raise DataError(f"{where}: is no table with the columns Idx and Name, separated by tabs; restore or remove it")
    synonyms = {int(row[index]): row[name] for row in rows}
    first = {class_id: names.split(",")[0].strip() for class_id, names in synonyms.items()}
    counts = Counter(first.values())
    return {class_id: name if counts[name] == 1 else synonyms[class_id] for class_id, name in first.items()}


def _recognizes_ade20k(tree: Tree) -> bool:
    return tree.has_name(r"ADE_(train|val)_\d{8}(_seg)?\.png$")


def read_coco_stuff(tree: Tree, split: str | None) -> Source:
    """Read COCO-Stuff's pixel maps: ids 0 to 181 with gaps, 255 = unlabelled.

    Its own labels.txt begins with "0: unlabeled" and names each id of the maps one line further.
    """
    source = read_paired(tree, split, {**{index: str(index) for index in range(182)}, 255: UNLABELLED})
    if source.labels.get(0) != "unlabeled":
        return source
    tree.about.notes.append("labels.txt counts from 1 and the maps from 0, so 1 in it names the id 0")
    names = {index - 1: name for index, name in source.labels.items() if 0 < index < 255}
    return replace(source, labels=names | {255: UNLABELLED})


def _recognizes_coco_stuff(tree: Tree) -> bool:
    return tree.has_name(r"^(annotations|stuffthingmaps)/(train|val)2017/\d{12}\.png$")


def read_celebamask_hq(tree: Tree, split: str | None, face_parts: tuple[str, ...]) -> Source:
    """Read CelebAMask-HQ: a map of 19 classes, 0 = background, painted from the masks of a face's parts."""
    if split:
        raise ConfigError(f"{tree.root}: `split` {split}: this layout has no splits; leave it out")
    masks: dict[int, dict[str, str]] = {}
    for name in tree.subtree("CelebAMask-HQ-mask-anno").images:
        number, _, part = stem(name.rpartition("/")[2]).partition("_")
        if part not in face_parts or not number.isdecimal():
            raise DataError(f"{tree.root}/CelebAMask-HQ-mask-anno/{name}: is no part of a face; remove it")
        masks.setdefault(int(number), {})[part] = f"CelebAMask-HQ-mask-anno/{name}"
    items = []
    for name in tree.subtree("CelebA-HQ-img").images:
        masks_of_face = masks.get(int(stem(name)), {}) if stem(name).isdecimal() else {}
        parts = tuple(
            (class_id, masks_of_face[part]) for class_id, part in enumerate(face_parts, 1) if part in masks_of_face
        )
        items.append(SourceItem(f"CelebA-HQ-img/{name}", segmentation=parts))
    return Source(
        tree.root, tuple(items), labels=dict(enumerate(["background", *face_parts])), read=tree.read, about=tree.about
    )


def _recognizes_celebamask_hq(tree: Tree) -> bool:
    return tree.has_name("^CelebAMask-HQ-mask-anno/")


def check_masks(tree: Tree, family: str, names: list[str]) -> None:
    """Refuse files whose name says mask and whose pixels are class ids."""
    for name in names[:: max(1, len(names) // SAMPLES)]:
        try:
            decode_mask(tree.read(tree.root, name))
        except StorageError:
            continue
        except Rejected as error:
            if error.reason in ("not binary", "of several colours"):
                raise ConfigError(
                    f"{tree.root}/{name}: may be a mask of holes ({error}), or a segmentation; choose `map_files` {family} "
                    f"or `mask_files` {family}, or `mask_files` none"
                ) from error


def read_inpainting(tree: Tree, split: str | None) -> Source:
    """Read images name.png with masks name_mask.png beside them; white = hole."""
    tree = split_folder(tree, split) if split else tree
    masks = {stem(name): name for name in tree.images if stem(name).endswith("_mask")}
    names = [name for name in tree.images if name not in masks.values()]
    if not names:
        raise DataError(f"{tree.root}: no images beside the masks; name.png belongs to name_mask.png")
    mask_of = {name: masks.get(f"{stem(name)}_mask", f"{stem(name)}_mask.png") for name in names}
    check_masks(tree, "mask", list(masks.values()))
    if len(tree.top_folders) > 1:
        folders = ", ".join(sorted(tree.top_folders)[:3])
        tree.about.notes.append(f"folders ({folders}) are not taken for classes; `classes` folders does")
    items = tuple(SourceItem(name, mask=mask) for name, mask in mask_of.items())
    return Source(tree.root, items, read=tree.read, about=tree.about)


def _recognizes_inpainting(tree: Tree) -> bool:
    """Whether there are masks beside images; splits and choices of the user are read by the layout `annotated`."""
    choices = tree.choices
    if choices.mask_files or choices.map_files or choices.classes in ("folders", "inner-folders"):
        return False
    if any(map(SPLIT.fullmatch, tree.top_folders)):
        return False
    stems = {stem(name) for name in tree.images}
    return any(name.endswith("_mask.png") and stem(name)[:-5] in stems for name in tree.images)


PAIRED = Layout(
    read_paired, _recognizes_pairs, instead_of=("folder",), sign="folders of images and of maps with the same names"
)
ADE20K = Layout(
    read_ade20k, _recognizes_ade20k, instead_of=("folder", "paired"), sign="names such as ADE_train_00000001.png"
)
COCO_STUFF = Layout(
    read_coco_stuff,
    _recognizes_coco_stuff,
    instead_of=("folder", "paired"),
    sign="annotations/train2017 with numbers of COCO",
)
CELEBAMASK_HQ = Layout(
    partial(read_celebamask_hq, face_parts=FACE_PARTS),
    _recognizes_celebamask_hq,
    instead_of=("folder",),
    sign="the folder CelebAMask-HQ-mask-anno",
)
CELEBAMASK_HQ_OFFICIAL = Layout(
    partial(read_celebamask_hq, face_parts=FACE_PARTS_OFFICIAL), lambda tree: False, sign="chosen by name"
)
INPAINTING = Layout(
    read_inpainting, _recognizes_inpainting, instead_of=("folder",), sign="name_mask.png beside name.png"
)
