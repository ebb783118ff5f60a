"""The layout `folder`: images in one folder per class, or in a single folder."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import PurePosixPath

from lfm import storage
from lfm.data.sources.labels import in_order
from lfm.data.sources.names import (
    ANNOTATION_FOLDER,
    ANNOTATION_PREFIX,
    ANNOTATION_SUFFIX,
    COMPANION_FOLDER,
    IMAGE_FOLDER,
    SPLIT,
    SPLIT_LIKE,
    SUFFIXES,
    first_split,
    like_splits,
    notes_on_junk,
    stem,
)
from lfm.data.sources.source import Layout, Source, Tree, choose_split, split_folder
from lfm.errors import ConfigError, DataError
from lfm.types import SourceItem

SOME = 0.05  # share of the images above which names are no accident
_END = re.compile(r"(.+?)[_\-. ]+([A-Za-z]\w*)", re.DOTALL)
_BUCKET = re.compile(r"\d{4,}")
# A folder whose number says which part of a collection it is, such as images_001 or photos_part_2.
_PART = re.compile(
    r"(.*[_\-. ])?(parts?|images?|imgs?|batch|chunk|shard|split|folder|dir|data|subset|vol|volume)[_\-. ]?\d+",
    re.IGNORECASE,
)


def read_folder(tree: Tree, split: str | None) -> Source:
    """Read images whose first folder is their class; without folders there are no classes.

    Raises:
        ConfigError: the folder holds splits and none was chosen, or folders may be something else than classes.
        DataError: there are no images, or only some of them are in class folders.
    """
    tree, is_split = _of_split(tree, split)
    root, paths = tree.root, tree.images
    if not paths:
        suffixes = sorted({PurePosixPath(name).suffix.lower() for name in tree.names} - {""})
        others = f", only {', '.join(suffixes[:4])}" if suffixes else ""
        hidden = "".join(f"; {note}" for note in notes_on_junk(tree.hidden))
        raise DataError(
            f"{root}: no images there ({', '.join(SUFFIXES[:4])}, ...){others}; name the folder that holds them{hidden}"
        )
    folders = tree.top_folders
    if not folders or tree.choices.classes == "none":
        if not split and len(splits := sorted(filter(SPLIT.fullmatch, folders))) > 1:
            tree.about.notes.append(f"the splits {', '.join(splits)} are read together; `split` chooses one")
        return Source(root, tuple(map(SourceItem, paths)), read=tree.read, about=tree.about)
    loose = [path for path in paths if "/" not in path]
    if not split and not loose and not is_split and all(map(SPLIT.fullmatch, folders)):
        return read_folder(tree, choose_split(tree, folders, split))
    if split and _is_wrapped(tree, folders):
        tree.about.notes.append(f"looked through the folder {min(folders)}, which holds everything")
        return read_folder(tree.subtree(min(folders)), None)
    if tree.choices.classes == "auto":
        _check_folders(tree, folders)
        if not is_split and len(folders) > 1:
            _check_depth(tree, folders)
    if loose:
        raise DataError(
            f"{storage.join(root, loose[0])}: lies beside the class folders; move it into one, or leave it out"
        )
    place = -2 if tree.choices.classes == "inner-folders" else 0
    class_names = tuple(in_order({path.split("/")[place] for path in paths}, tree.choices))
    _describe(tree, class_names)
    index = {name: number for number, name in enumerate(class_names)}
    items = tuple(SourceItem(path, index[path.split("/")[place]]) for path in paths)
    return Source(root, items, class_names, read=tree.read, about=tree.about)


def _of_split(tree: Tree, split: str | None) -> tuple[Tree, bool]:
    """Return the files of a split, which is a folder, or a folder in every class; and whether it is one of the latter."""
    in_classes = [path.split("/")[1] for path in tree.images if path.count("/") >= 2]
    if not in_classes or len(in_classes) < len(tree.images) or not all(map(SPLIT.fullmatch, set(in_classes))):
        return split_folder(tree, split) if split else tree, False
    if any(map(SPLIT.fullmatch, tree.top_folders)):
        return split_folder(tree, split) if split else tree, False
    chosen = choose_split(tree, set(in_classes), split, ", folders in every class")
    return tree.only(name for name in tree.names if name.split("/")[1:2] == [chosen]), True


def _check_folders(tree: Tree, folders: set[str]) -> None:
    """Refuse folders that may not be classes.

    Raises:
        ConfigError: names both readings, and the option for each.
    """
    splits = sorted(name for name in folders if SPLIT.fullmatch(name) or SPLIT_LIKE.fullmatch(name))
    splits = splits or like_splits(folders)
    if splits:
        others = sorted(folders - set(splits)) or [path for path in tree.images if "/" not in path]
        beside = f" beside {', '.join(others[:3])}" if others else ""
        away = f", or move {', '.join(splits[:3])} elsewhere to read the others" if folders - set(splits) else ""
        raise ConfigError(
            f"{tree.root}: {', '.join(splits[:3])} may be a split or a class{beside}; choose `split` {first_split(splits)} to "
            f"read that folder alone, or `classes` folders to take all folders for classes{away}"
        )
    odd = sorted(
        name
        for name in folders
        if ANNOTATION_FOLDER.fullmatch(name) or IMAGE_FOLDER.fullmatch(name) or f".{name.lower()}" in SUFFIXES
    )
    if odd and len(folders) > 1:
        raise ConfigError(
            f"{tree.root}: {', '.join(odd[:3])} may hold images and their annotations, or classes; name the folder of the "
            "images to read them alone, or choose `classes` folders"
        )
    for name in sorted(folders):
        inner = {path.split("/")[1] for path in tree.images if path.startswith(f"{name}/") and path.count("/") >= 2}
        if same := sorted(inner & (folders - {name})):
            raise ConfigError(
                f"{tree.root}: {name} holds folders with the names of those beside it ({', '.join(same[:3])}), so it may be a "
                "copy of these or another set; name one of them, or choose `classes` folders or inner-folders"
            )
    if len(folders) > 1 and all(map(COMPANION_FOLDER.fullmatch, folders)) and _share_names(tree, folders):
        raise ConfigError(
            f"{tree.root}: {', '.join(sorted(folders)[:3])} may be versions of the same images, since their files have the "
            "same names, or classes; name one of the folders, or choose `classes` folders"
        )
    if len(folders) > 1 and all(map(_PART.fullmatch, folders)):
        raise ConfigError(
            f"{tree.root}: {', '.join(sorted(folders)[:3])} may be parts of one list of images, by their names, or classes; "
            "choose `classes` none or `classes` folders"
        )
    if len(folders) > 1 and _are_buckets(tree, folders):
        first = min(folders)
        raise ConfigError(
            f"{tree.root}: {first}, ... may be parts of one list of images, since the numbers of the images continue from "
            "folder to folder, or classes; choose `classes` none or `classes` folders"
        )


def _is_wrapped(tree: Tree, folders: set[str]) -> bool:
    """Whether the only folder of a split is no class: it is called images, or holds folders only."""
    if len(folders) != 1 or tree.choices.classes != "auto":
        return False
    is_deep = all(path.count("/") >= 2 for path in tree.images)
    return is_deep or (IMAGE_FOLDER.fullmatch(min(folders)) is not None and all("/" in path for path in tree.images))


def _check_depth(tree: Tree, folders: set[str]) -> None:
    """Refuse folders of folders, each of which may be the classes.

    Raises:
        ConfigError: names both readings, and the option for each.
    """
    inner = {path.split("/")[-2] for path in tree.images if path.count("/") >= 2}
    if all(path.count("/") >= 2 for path in tree.images) and len(inner) > 1:
        raise ConfigError(
            f"{tree.root}: classes may be the outer folders ({', '.join(sorted(folders)[:3])}) or the inner ones "
            f"({', '.join(sorted(inner)[:3])}); choose `classes` folders or `classes` inner-folders"
        )


def read_images(tree: Tree, split: str | None) -> Source:
    """Read images as `read_folder` does, if all of their names are those of images.

    Raises:
        ConfigError: some may annotate others; names both readings, and the option for each.
    """
    source = read_folder(tree, split)
    if "none" in (tree.choices.mask_files, tree.choices.map_files):
        return source
    images = [item.image for item in source.items]
    named = [name for name in images if _says_annotation(name.rpartition("/")[2])]
    if SOME * len(images) <= len(named) < len(images):
        raise ConfigError(
            f"{tree.root}: {named[0]} may annotate another image, by its name, or be one; rename such files as the images with "
            "_mask or _seg at the end, or choose `mask_files` none to read all of them as images"
        )
    stems = {stem(name) for name in images}
    ends = Counter(match[2] for name in stems if (match := _END.fullmatch(name)) and match[1] in stems)
    if ends and 3 * max(ends.values()) >= len(images):
        end = max(ends, key=lambda word: ends[word])
        raise ConfigError(
            f"{tree.root}: {ends[end]} names are those of other images and _{end}: they may annotate these; choose "
            f"`map_files` {end} or `mask_files` {end}, or `mask_files` none to read all of them as images"
        )
    by_stem: dict[str, set[str]] = {}
    for name in images:
        by_stem.setdefault(stem(name), set()).add(name.rpartition(".")[2])
    pairs = {name: suffixes for name, suffixes in by_stem.items() if len(suffixes) > 1}
    if pairs and len(pairs) >= SOME * len(by_stem):
        name, suffixes = next(iter(pairs.items()))
        maps = "png" if "png" in suffixes else max(suffixes)
        raise ConfigError(
            f"{tree.root}: {name} is there as {' and '.join(f'.{suffix}' for suffix in sorted(suffixes))}: the one may "
            f"annotate the other; choose `map_files` {maps} or `mask_files` {maps}, or `mask_files` none to read all as images"
        )
    return source


def _says_annotation(file: str) -> bool:
    match = ANNOTATION_SUFFIX.search(stem(file))
    is_end = match is not None and match["end"].strip("_-. ").lower() not in ("l", "color")
    return is_end or ANNOTATION_PREFIX.match(file) is not None


def _share_names(tree: Tree, folders: set[str]) -> bool:
    names = [{stem(name) for name in tree.subtree(folder).images} for folder in folders]
    return len(set.intersection(*names)) > 0.5 * min(map(len, names))


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
    if tree.choices.classes == "inner-folders":
        tree.about.labels_from = "names of the innermost folders"
        return
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


FOLDER = Layout(read_images, recognizes=lambda tree: bool(tree.images), sign="folders of images, or one folder")
