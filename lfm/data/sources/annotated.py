"""The layout `annotated`: images with masks or segmentations, told apart by the names of folders or the ends of file names.

    images/0.jpg                       masks/0.png
    train/0.jpg                        train_masks/0_mask.gif
    leftImg8bit/val/city/x_leftImg8bit.png   gtFine/val/city/x_gtFine_labelIds.png
    0.png                              0_mask001.png

Where it is not clear which file annotates which image, or how, the readings are named and none is chosen.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from lfm.data.sources.class_folders import read_folder
from lfm.data.sources.names import (
    ANNOTATION_FOLDER,
    ANNOTATION_PREFIX,
    ANNOTATION_SUFFIX,
    IMAGE_FOLDER,
    SPLIT,
    is_image,
    plain_stem,
    stem,
)
from lfm.data.sources.segmentation_layouts import check_masks, labels_of
from lfm.data.sources.source import Layout, Source, Tree, choose_split
from lfm.errors import ConfigError
from lfm.types import SourceItem

# Annotations that are neither holes nor class ids.
_OTHER_KINDS = ("color", "instanceids", "instance", "instances", "segmentationobject", "matte")
Key = tuple[str, ...]


def annotation_family(name: str, stems: set[str]) -> str | None:
    """Return the kind of an annotation, by the end of its name or else by its folder; None for an image.

    Args:
        stems: paths of all images without suffix, and without words that say that they are images.
    """
    *folders, file = name.split("/")
    folder = next((part for part in reversed(folders) if ANNOTATION_FOLDER.fullmatch(part)), None)
    match = ANNOTATION_SUFFIX.search(stem(file))
    if match and (folder or f"{'/'.join(folders)}/{stem(file)[: match.start()]}".lstrip("/") in stems):
        return match["end"].lstrip("_-. ").rstrip("0123456789").rstrip("_-").lower()
    if folder is None and (prefix := ANNOTATION_PREFIX.match(file)):
        annotated = f"{'/'.join(folders)}/{stem(file)[prefix.end() :]}".lstrip("/")
        return prefix[1].lower() if annotated in stems else None
    return folder


def _families(tree: Tree) -> dict[str, list[str]]:
    """Return the annotations of each kind."""
    stems = {_path_stem(name) for name in tree.images} | {stem(name) for name in tree.images}
    suffixes = Counter(stem(name) for name in tree.images)
    chosen = {str(choice).lower() for choice in (tree.choices.mask_files, tree.choices.map_files)}
    families: dict[str, list[str]] = defaultdict(list)
    for name in tree.images:
        suffix = name.rpartition(".")[2].lower()
        end = next((end for end in chosen if _without_end(stem(name), end) in stems), None)
        if suffix in chosen and suffixes[stem(name)] > 1:  # 0.png beside 0.jpg
            families[suffix].append(name)
        elif end and not ANNOTATION_SUFFIX.search(stem(name)):
            families[end].append(name)
        elif family := annotation_family(name, stems):
            families[family].append(name)
    return families


def _without_end(stem_of_file: str, end: str) -> str | None:
    """Return a stem without the end `_end`, whatever its case; None if it does not end so."""
    cut = len(stem_of_file) - len(end)
    return (
        stem_of_file[: cut - 1]
        if cut > 1 and stem_of_file[cut:].lower() == end and stem_of_file[cut - 1] in "_-. "
        else None
    )


def _path_stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{plain_stem(stem(file))}"


def read_annotated(tree: Tree, split: str | None) -> Source:
    """Read images with masks or segmentations.

    Raises:
        ConfigError: a split must be chosen, or it is not clear which files annotate the images, or how.
    """
    families = _families(tree)
    annotations = {name for names in families.values() for name in names}
    images = [name for name in tree.images if name not in annotations]
    images, families, split = _of_split(tree, images, families, split)
    if not families and not {tree.choices.mask_files, tree.choices.map_files} & {"none"}:
        raise ConfigError(
            f"{tree.root}: the split {split} has no masks or segmentations; choose `mask_files` none to read its images alone"
        )
    if not images:
        raise ConfigError(
            f"{tree.root}: all images lie in folders of annotations ({', '.join(sorted(families)[:3])}); name the folder of "
            "the images, or choose `layout` folder if they annotate nothing, with `classes` folders if these are classes"
        )
    masks, maps = _chosen(tree, families)
    parts = {part: _pairs(tree, images, families, part) for part in (masks, maps) if part}
    if masks and not tree.choices.mask_files:
        check_masks(tree, masks, list(parts[masks].values()))
    if not parts and (choices := tree.choices).mask_files != "none" and choices.map_files != "none":
        raise ConfigError(
            f"{tree.root}: {', '.join(sorted(families)[:4])} hold neither holes nor class ids by their names; choose "
            "`mask_files` NAME, `map_files` NAME, or `mask_files` none to read the images alone"
        )
    aside = sorted(set(families) - {masks, maps})
    if aside:
        tree.about.notes.append(f"annotations left aside: {', '.join(aside)}; `mask_files` and `map_files` choose them")
    base = _base(tree, images, parts.values())
    items = tuple(
        replace(
            item,
            mask=parts.get(masks or "", {}).get(item.image),
            segmentation=parts.get(maps or "", {}).get(item.image),
        )
        for item in base.items
    )
    labels = labels_of(tree, {}) if maps else {}
    return Source(tree.root, items, base.class_names, labels, read=tree.read, about=tree.about)


def _of_split(
    tree: Tree, images: list[str], families: dict[str, list[str]], split: str | None
) -> tuple[list[str], dict[str, list[str]], str | None]:
    """Return the images and annotations of one split; those that belong to no split are of each."""
    split_of = {name: _split_of(name) for name in images}
    splits = {name for name in split_of.values() if name}
    if not splits:
        if split:
            raise ConfigError(f"{tree.root}: `split` {split}: no such split; leave it out")
        return images, families, None
    split = choose_split(tree, splits, split)
    chosen = {
        family: [name for name in names if (_split_of(name) or split).lower() == split.lower()]
        for family, names in families.items()
    }
    return [name for name in images if split_of[name] == split], {k: v for k, v in chosen.items() if v}, split


def _split_of(name: str) -> str | None:
    return next((part for part in map(_plain, name.split("/")[:-1]) if SPLIT.fullmatch(part)), None)


@lru_cache(maxsize=4096)  # many images lie in few folders
def _plain(folder: str) -> str:
    """Return a folder's name without the words that say images or annotations: `train` for `train_masks`."""
    if SPLIT.fullmatch(folder):
        return folder
    if IMAGE_FOLDER.fullmatch(folder):
        return ""
    if not ANNOTATION_FOLDER.fullmatch(folder):
        return folder
    words = [word for word in folder.replace("-", "_").split("_") if SPLIT.fullmatch(word)]
    head = folder[: -len("annot")] if folder.endswith("annot") else ""
    return words[0] if words else head if SPLIT.fullmatch(head) else ""


def _chosen(tree: Tree, families: dict[str, list[str]]) -> tuple[str | None, str | None]:
    """Return the families of the masks and of the maps, by the user's choice or their names.

    Raises:
        ConfigError: there are several of one kind, or the chosen one does not exist.
    """
    choices = tree.choices
    candidates = [
        name for name in families if name.lower() not in _OTHER_KINDS and not name.lower().endswith(_OTHER_KINDS)
    ]
    masks = [name for name in candidates if "mask" in name.lower() or "hole" in name.lower()]
    maps = [name for name in candidates if name not in masks]
    chosen = {field: _family(tree, families, field) for field in ("mask_files", "map_files")}
    result: list[str | None] = []
    for field, choice, names, other in (
        ("mask_files", choices.mask_files, masks, chosen["map_files"]),
        ("map_files", choices.map_files, maps, chosen["mask_files"]),
    ):
        names = [name for name in names if name != other]
        if chosen[field]:
            result.append(chosen[field])
        elif choice == "none" or not names:
            result.append(None)
        elif len(names) == 1:
            result.append(names[0])
        else:
            raise ConfigError(
                f"{tree.root}: {' and '.join(sorted(names)[:4])} may each be the annotations; choose "
                f"{' or '.join(f'`{field}` {name}' for name in sorted(names)[:4])}"
            )
    return result[0], result[1]


def _family(tree: Tree, families: dict[str, list[str]], field: str) -> str | None:
    """Return the family that the user chose by its name, the end of it, or its folder; None if there is no choice.

    Raises:
        ConfigError: there is none of that name, or several.
    """
    choice = getattr(tree.choices, field)
    if choice in (None, "none"):
        return None
    end = choice.lower().lstrip("_-. ")
    exact = [name for name in families if name.lower() in (choice.lower(), end)]
    same = exact or [name for name in families if name.lower().endswith(end)]
    same = same or [
        name
        for name, files in families.items()
        if any(choice.lower() in file.lower().split("/")[:-1] for file in files)
    ]
    if len(same) != 1:
        wrong = "several end so" if same else "no such annotations"
        raise ConfigError(f"{tree.root}: `{field}` {choice}: {wrong}; one of {', '.join(sorted(same or families))}")
    return same[0]


def _keys(name: str, *, family: str | None = None) -> list[Key]:
    """Return the path of an image by which its annotation is known: as it is, and without the end of its stem.

    Folders that are splits are left out, since all files are of one split.

    Args:
        family: that of an annotation.
    """
    inner = stem(name.rpartition("/")[2])
    inner = stem(inner) if is_image(inner) else inner
    folder = _plain_folders(name)
    if family is None:
        plain = plain_stem(inner)
    else:
        plain = _without_end(inner, family.lower()) or ANNOTATION_PREFIX.sub("", ANNOTATION_SUFFIX.sub("", inner))
    return [(*folder, inner), (*folder, plain)]


def _pairs(tree: Tree, images: list[str], families: dict[str, list[str]], family: str) -> dict[str, str]:
    """Return the annotation of each image that has one.

    Raises:
        ConfigError: no annotation belongs to an image, or several belong to one.
    """
    image_of: dict[Key, str] = {}
    for place in (1, 0):  # exact names last, since they win
        image_of |= {_keys(name)[place]: name for name in images}
    counts = Counter(key[-1] for key in {_keys(name)[1] for name in images})
    by_file = {key[-1]: name for key, name in image_of.items() if counts[key[-1]] <= 1}
    pairs: dict[str, str] = {}
    alone = []
    for name in families[family]:
        keys = _keys(name, family=family)
        image = next((image_of[key] for key in keys if key in image_of), None)
        image = image or next((by_file[key[-1]] for key in keys if _agree(by_file.get(key[-1]), key)), None)
        if image is None:
            alone.append(name)
        elif image in pairs:
            raise ConfigError(
                f"{tree.root}: {pairs[image]} and {name} both annotate {image}; leave one per image, or leave them out "
                "with `mask_files` none and `map_files` none"
            )
        else:
            pairs[image] = name
    if not pairs:
        raise ConfigError(
            f"{tree.root}: no name in {family} ({alone[0]}) belongs to an image ({images[0]}); rename the files, or leave "
            f"them out with `mask_files` none and `map_files` none, or choose `layout` folder with `classes` folders"
        )
    if alone:
        tree.about.notes.append(f"{len(alone)} of {family} belong to no image, such as {alone[0]}")
    if len(pairs) < len(images):
        tree.about.notes.append(f"{len(images) - len(pairs)} images have no file of {family}, and are rejected")
    return pairs


def _agree(image: str | None, annotation: Key) -> bool:
    """Whether the folders of an annotation are some of those of an image, or the other way round."""
    if image is None:
        return False
    folders, others = set(_keys(image)[0][:-1]), set(annotation[:-1])
    return folders <= others or others <= folders


def _base(tree: Tree, images: Iterable[str], parts: Iterable[dict[str, str]]) -> Source:
    """Return the images with their classes, which are folders if the user says so, or if those of annotations are the same.

    Other folders, such as the cities of Cityscapes, are no classes.

    Args:
        parts: annotations by their images, of each kind.
    """
    images, choice = sorted(images), tree.choices.classes
    plain = {name: _plain_folders(name) for name in images}
    while plain and all(len(folders) > 1 for folders in plain.values()) and len({f[0] for f in plain.values()}) == 1:
        plain = {name: folders[1:] for name, folders in plain.items()}  # a folder that wraps everything
    if choice in ("folders", "inner-folders"):
        return _of_classes(tree, {name: folders or ("",) for name, folders in plain.items()})
    folders = {folders[0] for folders in plain.values() if folders}
    if choice == "auto" and len(folders) > 1:
        if all(plain.values()) and any(map(_correspond, parts)):
            with contextlib.suppress(ConfigError):  # they may be something else than classes
                return _of_classes(tree, plain)
        tree.about.notes.append(
            f"folders of images ({', '.join(sorted(folders)[:3])}) are not taken for classes; `classes` folders does"
        )
    return Source(tree.root, tuple(map(SourceItem, images)))


def _plain_folders(name: str) -> Key:
    """Return the folders of a path, without those that say images, annotations or a split."""
    return tuple(part for part in map(_plain, name.split("/")[:-1]) if part and not SPLIT.fullmatch(part))


def _correspond(pairs: dict[str, str]) -> bool:
    """Whether annotations lie in a tree of their own with the folders of the images: images/cat/0.jpg and masks/cat/0.png."""
    return all(
        _plain_folders(name.partition("/")[0] + "/") == ()
        and any(map(ANNOTATION_FOLDER.fullmatch, annotation.split("/")[:-1]))
        and _plain_folders(name) == _plain_folders(annotation)
        and not stem(name).endswith("_leftImg8bit")  # Cityscapes
        for name, annotation in pairs.items()
    )


def _of_classes(tree: Tree, folders_of: dict[str, Key]) -> Source:
    """Return images with the classes that `read_folder` finds if each lies in the given folders.

    Raises:
        ConfigError: the folders may be something else than classes, or images of one name lie in the same of them.
    """
    images: dict[str, str] = {}
    for name, folders in folders_of.items():
        path = "/".join((*(folder or "." for folder in folders), name.rpartition("/")[2]))
        if images.setdefault(path, name) != name:
            raise ConfigError(
                f"{tree.root}: {images[path]} and {name} are of one name in the same class; rename one, or choose `classes` "
                "none"
            )
    base = read_folder(tree.only(images), None)
    items = (replace(item, image=images[item.image]) for item in base.items)
    return replace(base, items=tuple(sorted(items, key=lambda item: item.image)))


def _recognizes(tree: Tree) -> bool:
    families = _families(tree)
    annotations = sum(map(len, families.values()))
    return bool(families) and (
        annotations < len(tree.images) or tree.choices.classes not in ("folders", "inner-folders")
    )


ANNOTATED = Layout(read_annotated, _recognizes, sign="names of folders or files that say mask, seg, label or gt")
