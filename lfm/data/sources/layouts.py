"""The table of layouts, and which of them a folder has.

To add a layout, write a module in this folder with a function from a `Tree` and a split to a `Source` and a `Layout` that
names it, and add one line to LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from lfm import storage
from lfm.data.sources import (
    annotated,
    archives,
    class_folders,
    databases,
    imagenet,
    metadata_folders,
    segmentation_layouts,
)
from lfm.data.sources.labels import with_labels
from lfm.data.sources.names import (
    ANNOTATION_FOLDER,
    ARCHIVES,
    IMAGE_FOLDER,
    SPLIT,
    SPLIT_LIKE,
    hidden_images,
    is_archive,
    is_junk,
    notes_on_empty,
    notes_on_junk,
)
from lfm.data.sources.source import Choices, Layout, Source, Tree
from lfm.errors import ConfigError, DataError

LAYOUTS: dict[str, Layout] = {
    "folder": class_folders.FOLDER,
    "imagenet": imagenet.IMAGENET,
    "lmdb": databases.LMDB,
    "lsun": databases.LSUN,
    "celebamask-hq": segmentation_layouts.CELEBAMASK_HQ,
    "celebamask-hq-official": segmentation_layouts.CELEBAMASK_HQ_OFFICIAL,
    "ade20k": segmentation_layouts.ADE20K,
    "coco-stuff": segmentation_layouts.COCO_STUFF,
    "paired": segmentation_layouts.PAIRED,
    "inpainting": segmentation_layouts.INPAINTING,
    "annotated": annotated.ANNOTATED,
    "edm": metadata_folders.EDM,
    "imagefolder": metadata_folders.IMAGE_FOLDER,
    "hf": databases.HUGGING_FACE,
    "webdataset": archives.WEBDATASET,
    "zip": archives.ZIP,
}

READ_FROM_ARCHIVES = set(LAYOUTS) - {"lmdb", "lsun", "hf", "webdataset", "zip"}
READ_FROM_CONTAINERS = set(LAYOUTS) - READ_FROM_ARCHIVES
NAME_FILES = ("annotated", "webdataset", "zip")  # layouts whose masks and segmentations the user may name
GENERAL = ("annotated", "folder")  # layouts that a tree has only if it has no other, the first one first


def read(root: str, layout: str = "auto", split: str | None = None, choices: Choices | None = None) -> Source:
    """Return the source in a folder or in one file: a tar, a zip, or a table.

    Args:
        layout: a name of LAYOUTS, or `auto` to recognize it by the names of the files.
        split: such as `train`, if the layout has splits.
        choices: decisions of the user that the layouts leave open.

    Raises:
        ConfigError: the layout is ambiguous or unknown, or something in it is and must be chosen.
        DataError: the folder does not have the layout, or it is of a kind that cannot be read.
        StorageError: the folder does not exist.
    """
    choices = choices or Choices()
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"`layout` {layout}: unknown; one of auto, {', '.join(LAYOUTS)}")
    tree = _open(root, replace(choices, classes="none", label_column=None) if choices.labels else choices)
    inner, layout, read_layout = recognize(tree, layout)
    source = replace(_read(inner, layout, read_layout, split), layout=layout, about=tree.about)
    if choices.labels:
        source = with_labels(source, choices)
    tree.about.unused += tree.unused(source)
    return source


def _read_archive(tree: Tree, split: str | None) -> Source:
    """Return the source in the tree of an archive.

    Raises:
        DataError: it holds no images, or a layout whose files must lie on a disk.
    """
    if not tree.images:
        hidden = "".join(f"; {note}" for note in notes_on_junk(tree.hidden))
        raise DataError(f"{tree.root}: no images in it; unpack it if it holds archives or databases{hidden}")
    inner, layout, read_layout = recognize(tree)
    if layout not in READ_FROM_ARCHIVES:
        raise DataError(f"{tree.root}: holds the layout {layout}, which is read from a folder only; unpack it")
    tree.about.notes.append(f"the archive holds the layout {layout}")
    source = _read(inner, layout, read_layout, split)
    tree.about.unused += tree.unused(source)
    return source


def _read(tree: Tree, layout: str, read_layout: Callable[[Tree, str | None], Source], split: str | None) -> Source:
    """Return the source of a layout, without the annotations that the user leaves out.

    Raises:
        ConfigError: the user has named annotations, and the layout reads others.
    """
    choices = tree.choices
    if choices.names_files and layout not in NAME_FILES:
        field = "map_files" if choices.map_files not in (None, "none") else "mask_files"
        raise ConfigError(
            f"{tree.root}: `{field}` {getattr(choices, field)}: the layout {layout} reads no files of that name; leave it "
            "out, or choose `layout` annotated"
        )
    source = read_layout(tree, split)
    if choices.map_files == "none":
        items = tuple(replace(item, segmentation=None) for item in source.items)
        source = replace(source, items=items, labels={})
    if choices.mask_files == "none":
        source = replace(source, items=tuple(replace(item, mask=None) for item in source.items))
    return source


def _open(root: str, choices: Choices) -> Tree:
    """Return the files of a folder, or of one archive or table, without junk."""
    if root.lower().endswith((".tar", ".parquet", ".arrow", *ARCHIVES)) and _is_file(root):
        folder, name = storage.parent(root), root.rpartition("/")[2]
        _refuse_archives(root, [name])
        return Tree(folder, (name,), choices, read_inner=_read_archive)
    if storage.is_local(root) and Path(root).is_file():
        raise DataError(
            f"{root}: is a file, but no tar, zip, parquet or arrow file; name a folder of images, or an archive"
        )
    names = _without(root, storage.find(root, hidden=True), choices.leave_out)
    used = tuple(name for name in names if not is_junk(name))
    junk = list(filter(is_junk, names))
    tree = Tree(root, used, choices, hidden=tuple(hidden_images(junk)), read_inner=_read_archive)
    empty = storage.empty_folders(root) if storage.is_local(root) else []
    tree.about.notes += notes_on_junk(junk) + notes_on_empty(empty)
    if not tree.images:
        _refuse_archives(root, used)
    return tree


def _without(root: str, names: list[str], paths: Iterable[str]) -> list[str]:
    """Return the names of files in `root` that do not lie at or below one of the paths."""
    for path in paths:
        if storage.is_local(root) != storage.is_local(path):
            continue
        one, other = (str(Path(p).resolve()) if storage.is_local(p) else p.rstrip("/") for p in (root, path))
        if other.startswith(f"{one}/"):
            left_out = other[len(one) + 1 :]
            names = [name for name in names if name != left_out and not name.startswith(f"{left_out}/")]
    return names


def _is_file(path: str) -> bool:
    return path.rpartition("/")[2] in storage.sizes(storage.parent(path))


def _refuse_archives(root: str, names: Iterable[str]) -> None:
    packed = [name for name in names if name.lower().endswith(ARCHIVES) and not name.lower().endswith(".zip")]
    if packed:
        raise DataError(
            f"{root}: {packed[0]} is compressed and cannot be read in parts; unpack it, or name a tar or zip"
        )


def recognize(tree: Tree, layout: str = "auto") -> tuple[Tree, str, Callable[[Tree, str | None], Source]]:
    """Return a tree without the folders that wrap it, the name of its layout, and the layout's function.

    Raises:
        ConfigError: it may have several layouts.
    """
    while True:
        name = _recognized(tree) if layout == "auto" else layout
        wrapper = _wrapper(tree)
        if wrapper is None or (
            name != "folder"
            and LAYOUTS[name].recognizes(tree)
            and not _holds_parts(tree.subtree(wrapper))
            and not _is_special(tree, wrapper, layout)
        ):
            return tree, name, LAYOUTS[name].read
        tree.about.notes.append(f"looked through the folder {wrapper}, which holds everything")
        tree = tree.subtree(wrapper)


def _holds_parts(tree: Tree) -> bool:
    """Whether all folders are splits, images or annotations by their names, so that the folder around them is no class."""
    parts = (SPLIT, SPLIT_LIKE, IMAGE_FOLDER, ANNOTATION_FOLDER)
    return len(tree.top_folders) > 1 and all(any(part.fullmatch(name) for part in parts) for name in tree.top_folders)


def _is_special(tree: Tree, wrapper: str, layout: str) -> bool:
    """Whether a folder that wraps everything, or one in it, has a special layout, and the tree around it a general one."""
    if layout != "auto" or _recognized(tree) not in GENERAL:
        return False
    inner = tree.subtree(wrapper)
    deeper = _wrapper(inner)
    return _recognized(inner) not in GENERAL or (deeper is not None and _is_special(inner, deeper, layout))


def _wrapper(tree: Tree) -> str | None:
    """Return the folder that holds all images, unless it is a split or the tree's own choice is to read folders.

    Raises:
        ConfigError: there are hidden folders of images beside it, so that all of them may be classes.
    """
    if len(tree.top_folders) != 1 or any("/" not in name for name in tree.images):
        return None
    name = next(iter(tree.top_folders))
    has_classes = bool(tree.subtree(name).top_folders)
    if SPLIT.fullmatch(name) or (tree.choices.classes == "folders" and not has_classes):
        return None
    hidden = sorted({path.partition("/")[0] for path in tree.hidden if path.count("/") == 1} - {name})
    if hidden and not has_classes and tree.choices.classes == "auto":
        raise ConfigError(
            f"{tree.root}: {name} may be a class, since the hidden folder {hidden[0]} beside it holds images, too, or the "
            f"folder of all images; rename {hidden[0]} to use it, or choose `classes` folders or `classes` none"
        )
    return name


def _recognized(tree: Tree) -> str:
    names = [name for name, layout in LAYOUTS.items() if layout.recognizes(tree)]
    more_general = {general for name in names for general in LAYOUTS[name].instead_of}
    candidates = [name for name in names if name not in more_general and name not in GENERAL]
    containers = [name for name in candidates if name in READ_FROM_CONTAINERS]
    archive = next(filter(is_archive, tree.names), None)
    others = [name for name in candidates if name not in containers] or [name for name in GENERAL if name in names][:1]
    if tree.images and (containers or archive) and len(others) == 1:
        raise ConfigError(
            f"{tree.root}: holds images, such as {tree.images[0]}, and {archive or f'files of the layout {containers[0]}'}; "
            f"choose `layout` {others[0]} to read the images alone, or move one of them elsewhere and name it"
        )
    candidates = candidates or [name for name in GENERAL if name in names][:1] or ["folder"]
    if len(candidates) > 1:
        raise ConfigError(
            f"{tree.root}: may be {' or '.join(candidates)}; choose one with `layout`, for example {candidates[0]}"
        )
    return candidates[0]
