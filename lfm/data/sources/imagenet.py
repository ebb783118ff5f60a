"""The layout `imagenet`: ImageNet as Kaggle packs it or as torchvision unpacks it."""

from __future__ import annotations

import csv
import io
import re

from lfm import storage
from lfm.data.sources.names import SPLIT, stem
from lfm.data.sources.source import Layout, Source, Tree, choose_split, read_text, split_folder
from lfm.errors import DataError
from lfm.types import SourceItem

WORDNET_ID = re.compile(r"n\d{8}")
_PARENTS = 3  # Kaggle's tables lie beside ILSVRC, so many folders above that of a split


def read_imagenet(tree: Tree, split: str | None) -> Source:
    """Read ImageNet; a class is a WordNet id, in the order of the ids.

    Raises:
        ConfigError: there are several splits and none was chosen.
        DataError: there are no images, or the class of one is unknown.
    """
    mapping = (read_text(tree, "LOC_synset_mapping.txt", parents=_PARENTS) or "").splitlines()
    names = {line.split(" ")[0]: line for line in mapping if line}
    folders = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
    data = next((tree.subtree(folder) for folder in folders if tree.has_images(folder)), tree)
    paths = [name.split("/") for name in data.images]
    top_folders = {path[0] for path in paths}
    splits = set(filter(SPLIT.fullmatch, top_folders))
    if not split and splits and (len(splits) > 1 or splits == top_folders):
        split = choose_split(data, splits, split)
    wordnet_ids = sorted({*names, *(folder for path in paths for folder in path[:-1] if WORDNET_ID.fullmatch(folder))})
    index = {wordnet_id: number for number, wordnet_id in enumerate(wordnet_ids)}
    chosen = split_folder(data, split) if split else data
    if not chosen.images:
        raise DataError(f"{chosen.root}: no images there; name the folder that holds ILSVRC or train and val")
    if tree.choices.classes == "none":
        return Source(chosen.root, tuple(map(SourceItem, chosen.images)), read=tree.read, about=tree.about)
    solution = _validation_classes(tree, chosen) if any("/" not in name for name in chosen.images) else None
    items = []
    for name in chosen.images:
        wordnet_id = name.split("/")[0] if solution is None else solution.get(stem(name), "")
        if wordnet_id not in index:
            raise DataError(
                f"{storage.join(chosen.root, name)}: its class is not known; move it into the folder of its class, name the "
                "class in a table and choose `labels`, or choose `classes` none"
            )
        items.append(SourceItem(name, index[wordnet_id]))
    class_names = tuple(names.get(wordnet_id, wordnet_id) for wordnet_id in wordnet_ids)
    tree.about.labels_from = "names of folders" if solution is None else "LOC_val_solution.csv"
    return Source(chosen.root, tuple(items), class_names, read=tree.read, about=tree.about)


def _validation_classes(tree: Tree, chosen: Tree) -> dict[str, str]:
    """Return the WordNet id of each image of Kaggle's validation split, which has no class folders."""
    table = read_text(tree, "LOC_val_solution.csv", parents=_PARENTS)
    if table is None:
        raise DataError(
            f"{chosen.root}: has no class folders; put Kaggle's LOC_val_solution.csv beside ILSVRC, or sort the "
            "images into folders by class"
        )
    return {row[0]: row[1].split(" ")[0] for row in csv.reader(io.StringIO(table)) if len(row) > 1}


def _recognizes(tree: Tree) -> bool:
    return tree.has_name(r"^(ILSVRC/)?Data/CLS-LOC/|^((train|val)/)?n\d{8}/")


IMAGENET = Layout(read_imagenet, _recognizes, instead_of=("folder",), sign="folders with the names of WordNet ids")
