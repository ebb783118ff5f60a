"""The table of layouts, and which of them a folder has.

To add a layout, write a module in this folder with a function from a `Tree` and a split to a `Source` and a `Layout` that
names it, and add one line to LAYOUTS.
"""

from __future__ import annotations

from dataclasses import replace

from lfm import storage
from lfm.data.sources import class_folders, databases, imagenet, segmentation_layouts
from lfm.data.sources.source import Layout, Source, Tree
from lfm.errors import ConfigError

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
    "hf": databases.HUGGING_FACE,
    "webdataset": databases.WEBDATASET,
}


def read(root: str, layout: str = "auto", split: str | None = None) -> Source:
    """Return the source in a folder.

    Args:
        layout: a name of LAYOUTS, or `auto` to recognize it by the names of the files.
        split: such as `train`, if the layout has splits.

    Raises:
        ConfigError: the layout is ambiguous or unknown, or a split must be chosen.
        DataError: the folder does not have the layout, or it is of a kind that cannot be read.
        StorageError: the folder does not exist.
    """
    tree = Tree(root, tuple(storage.find(root)))
    if layout == "auto":
        layout = _recognized(tree)
    if layout not in LAYOUTS:
        raise ConfigError(f"`layout` {layout}: unknown; one of auto, {', '.join(LAYOUTS)}")
    return replace(LAYOUTS[layout].read(tree, split), layout=layout)


def _recognized(tree: Tree) -> str:
    names = [name for name, layout in LAYOUTS.items() if layout.recognizes(tree)]
    more_general = {general for name in names for general in LAYOUTS[name].instead_of}
    candidates = [name for name in names if name not in more_general] or ["folder"]
    if len(candidates) > 1:
        raise ConfigError(
            f"{tree.root}: may be {' or '.join(candidates)}; choose one with `layout`, for example {candidates[0]}"
        )
    return candidates[0]
