"""The layout `folder`: images in one folder per class, or in a single folder."""

from __future__ import annotations

from lfm import storage
from lfm.data.sources.source import SPLIT, SUFFIXES, Layout, Source, Tree, choose_split
from lfm.errors import DataError
from lfm.types import SourceItem


def read_folder(tree: Tree, split: str | None) -> Source:
    """Read images whose first folder is their class; without folders there are no classes.

    Raises:
        ConfigError: the folder holds splits and none was chosen, or not the chosen one.
        DataError: there are no images, or only some of them are in class folders.
    """
    tree = tree.subtree(split or "")
    root, paths = tree.root, tree.images
    if not paths:
        raise DataError(f"{root}: no images there ({', '.join(SUFFIXES[:4])}, ...); name the folder that holds them")
    folders = {path.split("/")[0] for path in paths if "/" in path}
    if not folders:
        return Source(root, tuple(SourceItem(path) for path in paths))
    loose = [path for path in paths if "/" not in path]
    if not split and not loose and all(map(SPLIT.fullmatch, folders)):
        return read_folder(tree, choose_split(root, folders, split))
    if loose:
        raise DataError(
            f"{storage.join(root, loose[0])}: lies beside the class folders; move it into one, or leave it out"
        )
    class_names = tuple(sorted(folders))
    index = {name: number for number, name in enumerate(class_names)}
    return Source(root, tuple(SourceItem(path, index[path.split("/")[0]]) for path in paths), class_names)


FOLDER = Layout(read_folder, recognizes=lambda tree: bool(tree.images))
