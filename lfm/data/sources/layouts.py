"""The layouts by name, those of single files here, and which of them a folder has."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.databases import environments, hf, lmdb, webdataset
from lfm.data.sources.source import SPLIT, UNLABELLED, Source, Tree, choose_split, folder
from lfm.errors import ConfigError, DataError
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
WNID = re.compile(r"n\d{8}")
FACE_PARTS = {  # the parts whose class ids are 1 to 18, in the order in which they are painted
    "celebamask-hq": "skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r nose mouth u_lip l_lip neck neck_l cloth "
    "hair hat",
    "celebamask-hq-official": "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r "
    "neck_l neck cloth",
}


def _stem(name: str) -> str:
    return name[: -len(PurePosixPath(name).suffix)]


def _text(tree: Tree, name: str, *, above: int = 0) -> str | None:
    """A text file's content, looked for in the tree's root and in so many folders above it."""
    for _ in range(above + 1):
        path = storage.join(tree.root, name)
        if storage.exists(path):
            return storage.read_bytes(path).decode("utf-8", "replace")
        tree = replace(tree, root=storage.parent(tree.root))
    return None


# --- class folders -----------------------------------------------------------------------------------------------


def imagenet(tree: Tree, split: str | None) -> Source:
    """ImageNet as Kaggle packs it or as torchvision unpacks it; a class is a WordNet id, in their order."""
    mapping = (_text(tree, "LOC_synset_mapping.txt", above=3) or "").splitlines()
    names = {line.split(" ")[0]: line for line in mapping if line}
    data = next((tree.at(at) for at in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if tree.holds(at)), tree)
    parts = [name.split("/") for name in data.images]
    tops = {part[0] for part in parts}
    splits = set(filter(SPLIT.fullmatch, tops))
    if not split and splits and (len(splits) > 1 or splits == tops):
        split = choose_split(data.root, splits, split)
    wnids = sorted({*names, *(folder for part in parts for folder in part[:-1] if WNID.fullmatch(folder))})
    index = {wnid: number for number, wnid in enumerate(wnids)}
    chosen = data.at(split or "")
    if not chosen.images:
        raise DataError(f"{chosen.root}: no images there; name the folder that holds ILSVRC or train and val")
    solution = None
    if any("/" not in name for name in chosen.images):
        table = _text(tree, "LOC_val_solution.csv", above=3)
        if table is None:
            raise DataError(
                f"{chosen.root}: has no class folders; put Kaggle's LOC_val_solution.csv beside ILSVRC, or sort the "
                "images into folders by class"
            )
        solution = {row[0]: row[1].split(" ")[0] for row in csv.reader(io.StringIO(table)) if len(row) > 1}
    items = []
    for name in chosen.images:
        wnid = name.split("/")[0] if solution is None else solution.get(_stem(name), "")
        if wnid not in index:
            raise DataError(f"{storage.join(chosen.root, name)}: its class is not known; remove it or name its class")
        items.append(SourceItem(name, index[wnid]))
    return Source(chosen.root, tuple(items), tuple(names.get(wnid, wnid) for wnid in wnids))


# --- images with maps and masks --------------------------------------------------------------------------------


def _labels(tree: Tree, default: dict[int, str]) -> dict[int, str]:
    """The class ids of labels.txt, a line each: `3<tab>name`, `3: name`, or the name alone."""
    lines = [line.strip() for line in (_text(tree, "labels.txt") or "").splitlines() if line.strip()]
    found = [re.fullmatch(r"(\d+)\s*[:\s]\s*(.+)", line) for line in lines]
    named = {int(match[1]): match[2] for match in found if match}
    named = named if len(named) == len(lines) else dict(enumerate(lines))
    return {**named, **({} if 255 in named else {255: UNLABELLED})} if named else default


def _folders_of_pairs(tree: Tree, split: str | None) -> tuple[str, str, str | None] | None:
    """The folder of the images, that of the maps, and the split they are of."""
    tops = sorted({name.split("/")[0] for name in tree.names if "/" in name})
    fits: dict[str, tuple[str, str]] = {}
    for images, maps in PAIRS:
        for choice in [split] if split else tops:
            pair = images.format(split=choice), maps.format(split=choice)
            if tree.holds(pair[0]) and tree.holds(pair[1]):
                if "{" not in images or split:
                    return *pair, split
                fits[choice] = pair
    if fits:
        split = choose_split(tree.root, set(fits), split)
        return *fits[split], split
    return None


def paired(tree: Tree, split: str | None, default: dict[int, str] | None = None) -> Source:
    """Images, and maps (and masks, in `masks`) of the same name in a folder beside; ids are kept as they are."""
    pair = _folders_of_pairs(tree, split)
    if pair is None:
        known = ", ".join(" + ".join(pair) for pair in PAIRS).replace("{split}", "SPLIT")
        raise DataError(f"{tree.root}: no folders of images and maps there; name them like one of these: {known}")
    images, maps, split = pair
    lists = {name.rpartition("/")[2][:-4] for name in tree.names if name.startswith("ImageSets/Segmentation/")}
    if lists:
        split = choose_split(tree.root, lists, split)
    base = folder(tree.at(images), None if lists or images == split else split)
    inner = base.root[len(storage.join(tree.root, images)) + 1 :]  # the split's folder, if there is one
    listed = (_text(tree, f"ImageSets/Segmentation/{split}.txt") or "").split() if lists else None
    by_stem = {_stem(name): name for name in tree.images if name.startswith((f"{maps}/", "masks/"))}
    masks = tree.holds("masks")
    found = {
        _stem(name): (name, item) for item in base.items for name in [f"{inner}/{item.image}" if inner else item.image]
    }
    items = []
    for stem in found if listed is None else listed:
        name, item = found.get(stem, (f"{stem}.jpg", SourceItem("")))
        segmentation, mask = (by_stem.get(f"{at}/{stem}", f"{at}/{stem}.png") for at in (maps, "masks"))
        items.append(SourceItem(f"{images}/{name}", item.class_index, segmentation, mask if masks else None))
    return Source(tree.root, tuple(items), base.class_names, _labels(tree, default or {}))


def ade20k(tree: Tree, split: str | None) -> Source:
    """ADEChallengeData2016: 150 classes, 0 = other."""
    if tree.has(r"ADE_(train|val)_\d+_seg\.png$"):
        raise DataError(
            f"{tree.root}: is the full ADE20K, whose maps encode thousands of classes; download ADEChallengeData2016, "
            "the scene parsing benchmark with 150 classes, and name its folder"
        )
    return paired(tree, split, {0: "other", **{index: str(index) for index in range(1, 151)}})


def coco_stuff(tree: Tree, split: str | None) -> Source:
    """COCO-Stuff's pixel maps: ids 0 to 181 with gaps, 255 = unlabelled."""
    return paired(tree, split, {**{index: str(index) for index in range(182)}, 255: UNLABELLED})


def _refuse_split(tree: Tree, split: str | None) -> None:
    if split:
        raise ConfigError(f"{tree.root}: --split {split}: this layout has no splits; leave it out")


def celebamask_hq(tree: Tree, split: str | None, order: str) -> Source:
    """CelebAMask-HQ: a map of 19 classes painted from the parts of a face, 0 = background."""
    _refuse_split(tree, split)
    names = FACE_PARTS[order].split()
    parts: dict[int, dict[str, str]] = {}
    for name in tree.at("CelebAMask-HQ-mask-anno").images:
        number, _, part = _stem(name.rpartition("/")[2]).partition("_")
        if part not in names or not number.isdecimal():
            raise DataError(f"{tree.root}/CelebAMask-HQ-mask-anno/{name}: is no part of a face; remove it")
        parts.setdefault(int(number), {})[part] = f"CelebAMask-HQ-mask-anno/{name}"
    items = []
    for name in tree.at("CelebA-HQ-img").images:
        found = parts.get(int(_stem(name)), {}) if _stem(name).isdecimal() else {}
        painted = tuple((class_id, found[part]) for class_id, part in enumerate(names, 1) if part in found)
        items.append(SourceItem(f"CelebA-HQ-img/{name}", segmentation=painted))
    return Source(tree.root, tuple(items), labels=dict(enumerate(["background", *names])))


def inpainting(tree: Tree, split: str | None) -> Source:
    """name.png and name_mask.png side by side; white = hole."""
    tree = tree.at(split or "")
    masks = {_stem(name): name for name in tree.images if _stem(name).endswith("_mask")}
    names = [name for name in tree.images if name not in masks.values()]
    if not names:
        raise DataError(f"{tree.root}: no images beside the masks; name.png belongs to name_mask.png")
    found = ((name, f"{_stem(name)}_mask") for name in names)
    return Source(tree.root, tuple(SourceItem(name, mask=masks.get(mask, f"{mask}.png")) for name, mask in found))


# --- which one ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How to read a tree of this layout, how to tell that it has it, and which more general layouts it then stands for."""

    read: Callable[[Tree, str | None], Source]
    recognises: Callable[[Tree], bool]
    instead_of: tuple[str, ...] = ()


def _has(pattern: str) -> Callable[[Tree], bool]:
    return lambda tree: tree.has(pattern)


def _has_keys(tree: Tree, pattern: str) -> bool:
    found = (storage.join(tree.root, at) if at else tree.root for at in environments(tree)[:1])
    return any(re.fullmatch(pattern, next(readers.lmdb_keys(root), "")) for root in found)


def _has_pairs(tree: Tree) -> bool:
    return tree.has("^[a-z]+annot/") or any(tree.holds(a) and tree.holds(b) for a, b in PAIRS if "{" not in a)


HEX = r"[0-9a-f]{40}"
COCO = r"^(annotations|stuffthingmaps)/(train|val)2017/\d{12}\.png$"
LAYOUTS = {
    "folder": Layout(folder, lambda tree: bool(tree.images)),
    "imagenet": Layout(imagenet, _has(r"^(ILSVRC/)?Data/CLS-LOC/|^((train|val)/)?n\d{8}/"), ("folder",)),
    "lmdb": Layout(partial(lmdb, pattern=r"\d+"), lambda tree: _has_keys(tree, rf"(?!{HEX}).*")),
    "lsun": Layout(partial(lmdb, pattern=HEX), lambda tree: _has_keys(tree, HEX)),
    "celebamask-hq": Layout(
        partial(celebamask_hq, order="celebamask-hq"), _has("^CelebAMask-HQ-mask-anno/"), ("folder",)
    ),
    "celebamask-hq-official": Layout(partial(celebamask_hq, order="celebamask-hq-official"), lambda tree: False),
    "ade20k": Layout(ade20k, _has(r"ADE_(train|val)_\d{8}(_seg)?\.png$"), ("folder", "paired")),
    "coco-stuff": Layout(coco_stuff, _has(COCO), ("folder", "paired")),
    "paired": Layout(paired, _has_pairs, ("folder",)),
    "inpainting": Layout(inpainting, _has(r"_mask\.png$"), ("folder",)),
    "hf": Layout(hf, _has(r"\.(parquet|arrow)$")),
    "webdataset": Layout(webdataset, _has(r"\.tar$")),
}


def read(root: str, layout: str = "auto", split: str | None = None) -> Source:
    """The source in a folder.

    Args:
        layout: a name of LAYOUTS, or `auto` to tell it from the names of the files.
        split: such as `train`, where the layout has splits.

    Raises:
        ConfigError: the layout is ambiguous or unknown, or a split must be chosen.
        DataError: the folder does not have the layout, or it is of a kind that cannot be read.
        StorageError: there is no such folder.
    """
    tree = Tree(root, tuple(storage.find(root)))
    if layout == "auto":
        found = [name for name, known in LAYOUTS.items() if known.recognises(tree)]
        general = {name for special in found for name in LAYOUTS[special].instead_of}
        if len(candidates := [name for name in found if name not in general]) > 1:
            raise ConfigError(f"{root}: may be {' or '.join(candidates)}; choose one, as in --layout {candidates[0]}")
        layout = (candidates or ["folder"])[0]
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: unknown; one of auto, {', '.join(LAYOUTS)}")
    return replace(LAYOUTS[layout].read(tree, split), layout=layout)
