"""The layout `folder`: images in one folder per class, or in a single folder."""

from __future__ import annotations

import re
from itertools import pairwise

from lfm import storage
from lfm.data.sources.labels import in_order
from lfm.data.sources.names import ANNOTATION_FOLDER, IMAGE_FOLDER, SPLIT, SPLIT_LIKE, SUFFIXES, stem
from lfm.data.sources.source import Layout, Source, Tree, choose_split
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

_BUCKET = re.compile(r"\d{4,}")


def read_folder(tree: Tree, split: str | None) -> Source:
    """Read images whose first folder is their class; without folders there are no classes.

    Raises:
        ConfigError: the folder holds splits and none was chosen, or folders may be something else than classes.
        DataError: there are no images, or only some of them are in class folders.
    """
    tree, is_split = _of_split(tree, split)
    root, paths = tree.root, tree.images
    if not paths:
        raise DataError(f"{root}: no images there ({', '.join(SUFFIXES[:4])}, ...); name the folder that holds them")
    folders = tree.top_folders
    if not folders or tree.choices.classes == "none":
        return Source(root, tuple(map(SourceItem, paths)), read=tree.read, about=tree.about)
    loose = [path for path in paths if "/" not in path]
    if not split and not loose and not is_split and all(map(SPLIT.fullmatch, folders)):
        return read_folder(tree, choose_split(root, folders, split))
    if tree.choices.classes == "auto":
        _check_folders(tree, folders)
    if loose:
        raise DataError(
            f"{storage.join(root, loose[0])}: lies beside the class folders; move it into one, or leave it out"
        )
    class_names = tuple(in_order(folders, tree.choices))
    _describe(tree, class_names)
    index = {name: number for number, name in enumerate(class_names)}
    items = tuple(SourceItem(path, index[path.split("/")[0]]) for path in paths)
    return Source(root, items, class_names, read=tree.read, about=tree.about)


def _of_split(tree: Tree, split: str | None) -> tuple[Tree, bool]:
    """Return the files of a split, which is a folder, or a folder in every class; and whether it is one of the latter."""
    in_classes = [path.split("/")[1] for path in tree.images if path.count("/") >= 2]
    if not in_classes or len(in_classes) < len(tree.images) or not all(map(SPLIT.fullmatch, set(in_classes))):
        return _split_folder(tree, split), False
    if any(map(SPLIT.fullmatch, tree.top_folders)):
        return _split_folder(tree, split), False
    chosen = choose_split(tree.root, set(in_classes), split)
    tree.about.splits = f"{chosen} of {', '.join(sorted(set(in_classes)))}, folders in every class"
    return tree.only(name for name in tree.names if name.split("/")[1:2] == [chosen]), True


def _split_folder(tree: Tree, split: str | None) -> Tree:
    if not split:
        return tree
    splits = sorted(filter(SPLIT.fullmatch, tree.top_folders))
    same = [name for name in splits if name.lower() == split.lower()]
    chosen = split if split in tree.top_folders or not same else same[0]
    if splits:
        tree.about.splits = f"{chosen} of {', '.join(splits)}"
    return tree.subtree(chosen)


def _check_folders(tree: Tree, folders: set[str]) -> None:
    """Refuse folders that may not be classes.

    Raises:
        ConfigError: names both readings, and the option for each.
    """
    splits = sorted(name for name in folders if SPLIT.fullmatch(name) or SPLIT_LIKE.fullmatch(name))
    if splits:
        others = sorted(folders - set(splits)) or [path for path in tree.images if "/" not in path]
        beside = f" beside {', '.join(others[:3])}" if others else ""
        raise ConfigError(
            f"{tree.root}: {', '.join(splits[:3])} may be a split or a class{beside}; choose `split` {splits[0]} to read "
            "that folder, or `classes` folders"
        )
    odd = sorted(name for name in folders if ANNOTATION_FOLDER.fullmatch(name) or IMAGE_FOLDER.fullmatch(name))
    if odd and len(folders) > 1:
        raise ConfigError(
            f"{tree.root}: {', '.join(odd[:3])} may hold images and their annotations, or classes; name the folder of the "
            "images to read them alone, or choose `classes` folders"
        )
    if len(folders) > 1 and _are_buckets(tree, folders):
        first = min(folders)
        raise ConfigError(
            f"{tree.root}: {first}, ... may be parts of one list of images, since the numbers of the images continue from "
            "folder to folder, or classes; choose `classes` none or `classes` folders"
        )


def _are_buckets(tree: Tree, folders: set[str]) -> bool:
    """Whether folders are numbered and so are their images, from one folder to the next, as in FFHQ."""
    if not all(map(_BUCKET.fullmatch, folders)):
        return False
    numbers: dict[str, list[int]] = {folder: [] for folder in folders}
    for path in tree.images:
        match = re.search(r"(\d{5,})$", stem(path))
        if match is None:
            return False
        numbers[path.split("/")[0]].append(int(match[1]))
    order = sorted(folders, key=int)
    return all(max(numbers[one]) < min(numbers[other]) for one, other in pairwise(order))


def _describe(tree: Tree, class_names: tuple[str, ...]) -> None:
    tree.about.labels_from = "names of folders"
    deeper = {path.split("/")[1] for path in tree.images if path.count("/") >= 2}
    if len(deeper) > 1:
        tree.about.notes.append(
            f"classes are the first folders; {len(deeper)} folders in them, such as {min(deeper)}, are not"
        )
    if all(name.isdecimal() for name in class_names):
        numeric = sorted(class_names, key=lambda name: (int(name), name))
        if tuple(numeric) != class_names:
            tree.about.notes.append(
                "classes are numbers sorted as text, so class 10 comes before 2; `class_order` number sorts by value"
            )


FOLDER = Layout(read_folder, recognizes=lambda tree: bool(tree.images), sign="folders of images, or one folder")
