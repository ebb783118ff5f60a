"""Tars and zips: samples of webdataset, and archives of folders, which are read as the folders would be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lfm import storage
from lfm.data.sources import readers
from lfm.data.sources.imagenet import WORDNET_ID
from lfm.data.sources.labels import LABEL_KEYS, Label, as_label, classes, column_of, notes_on_indices, parse_text
from lfm.data.sources.names import (
    SPLIT,
    SUFFIXES,
    empty_folders,
    hidden_images,
    is_archive,
    is_image,
    is_junk,
    notes_on_empty,
    notes_on_junk,
    stem,
)
from lfm.data.sources.readers import TarMember, TarRest
from lfm.data.sources.source import Layout, Source, Tree, choose_split, split_by_names
from lfm.errors import ConfigError, DataError, StorageError
from lfm.types import SourceItem

# Endings of the members of a sample, the preferred one first.
_TEXTS = ("cls", "cls.txt", "class", "class.txt", "label", "label.txt", "cls.name", "class_name")
_MAPS = ("seg.png", "segmentation.png", "label.png", "annotation.png")
_MASKS = ("mask.png", "mask.jpg", "mask.webp")
_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
_NAMED_IMAGES = tuple(f"{word}.{ending}" for word in ("image", "img", "input", "rgb") for ending in _IMAGES)
_READ = (*(f".{ending}" for ending in _TEXTS), ".json")


def read_webdataset(tree: Tree, split: str | None) -> Source:
    """Read tars: samples of webdataset, or one tar of folders.

    A sample has an image, and may have a class (.cls, .cls.txt, or in .json), a segmentation (.seg.png) and a mask (.mask.png).

    Raises:
        ConfigError: a split must be chosen, or files of equal names lie in folders of several tars.
        DataError: a tar is damaged.
    """
    tars, split = split_by_names(tree, [name for name in tree.names if name.endswith(".tar")], split)
    rest = TarRest()
    samples = [(tar, sample) for tar in tars for sample in readers.tar_samples(tree.root, tar, _READ, rest)]
    tree.about.notes += notes_on_junk(sorted(rest.junk))
    if not samples:
        hidden = "".join(f"; {note}" for note in notes_on_junk(hidden_images(sorted(rest.junk))))
        raise DataError(f"{storage.join(tree.root, tars[0])}: no images in it; name the folder that holds them{hidden}")
    if _is_folder([sample for _, sample in samples], hidden_images(rest.junk)):
        return _read_folders(tree, tars, split, rest)
    samples = _of_split(replace(tree, root=storage.join(tree.root, tars[0])), samples, split)
    items, labels = [], []
    images, maps, masks = _endings(tree, [sample for _, sample in samples])
    for tar, sample in samples:
        missing = f"{tar}#{readers.NOWHERE}#{sample['__key__']}"
        image = next((sample[end].item for end in images if end in sample), missing)
        seg, mask = (next((sample[end].item for end in ends if end in sample), None) for ends in (maps, masks))
        items.append(SourceItem(image, None, seg, mask, _columns(sample)))
        labels.append(_label(tree, f"{tree.root}/{tar}: sample {sample['__key__']}", sample))
    if tree.choices.classes == "folders" or not any(label is not None for _, label in labels):
        labels = _folder_labels(tree, samples)
    by_text = all(label is None or kind != ".json" for kind, label in labels)
    where = f"{tree.root}/{tars[0]}"
    indices, names = classes([label for _, label in labels], tree.choices, where, keep_indices=by_text)
    if names:
        tree.about.labels_from = (
            f"{', '.join(sorted({source for source, label in labels if label is not None}))} of the samples"
        )
    _note_unused(tree, [sample for _, sample in samples], {*images, *maps, *masks})
    tree.about.notes += notes_on_indices(indices, names)
    items = [replace(item, class_index=index) for item, index in zip(items, indices, strict=True)]
    return Source(tree.root, tuple(items), names, read=readers.tar_member, about=tree.about)


def _of_split(
    tree: Tree, samples: list[tuple[str, dict[str, Any]]], split: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """Return the samples in the folder of a split.

    Raises:
        ConfigError: there are several splits and none was chosen, or the chosen one does not exist.
    """
    folders = [next(filter(SPLIT.fullmatch, sample["__key__"].split("/")[:-1]), None) for _, sample in samples]
    splits = {folder for folder in folders if folder}
    if not splits or None in folders:
        if split:
            raise ConfigError(f"{tree.root}: `split` {split}: no such split; it has none; leave it out")
        return samples
    chosen = choose_split(tree, splits, split)
    return [sample for sample, folder in zip(samples, folders, strict=True) if folder == chosen]


def _endings(tree: Tree, samples: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the endings of the image, the segmentation and the mask of a sample, the preferred ones first.

    Raises:
        ConfigError: a chosen ending does not exist, or samples have several images.
        DataError: no sample has an image by its ending.
    """
    existing = {ending for sample in samples for ending in sample}
    annotations = []
    for field, choice, known in (
        ("map_files", tree.choices.map_files, _MAPS),
        ("mask_files", tree.choices.mask_files, _MASKS),
    ):
        chosen = (choice or "").lstrip(".").lower()
        if chosen not in ("", "none", *existing):
            raise ConfigError(f"{tree.root}: `{field}` {choice}: no sample has a member that ends in .{chosen}")
        annotations.append(() if chosen == "none" else (chosen,) if chosen else known)
    maps, masks = annotations
    images = tuple(end for end in (*_IMAGES, *_NAMED_IMAGES) if end not in (*maps, *masks))
    if not existing & {*images}:
        others = [f".{end}" for end in sorted(existing) if is_image(f".{end}") and end not in (*maps, *masks)]
        if others:
            raise DataError(
                f"{tree.root}: no sample has a member .png, .jpg or the like, only {', '.join(others[:4])}; rename the one "
                "that is the image, or unpack the tars to read all of them as images"
            )
    twice = next((ends for sample in samples if len(ends := [end for end in images if end in sample]) > 1), [])
    if twice and "none" not in (tree.choices.map_files, tree.choices.mask_files):
        other = "png" if "png" in twice else twice[-1]
        raise ConfigError(
            f"{tree.root}: samples hold {' and '.join(f'.{end}' for end in twice)}, and one may annotate the other; choose "
            f"`map_files` {other} or `mask_files` {other}, or `map_files` none to read .{twice[0]} alone"
        )
    return images, maps, masks


def _folder_labels(tree: Tree, samples: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, Label]]:
    """Return the folders of samples, or the names of their tars, as labels if the user says so; else none.

    Raises:
        ConfigError: they may be classes, and the user has not decided.
    """
    folders = [sample["__key__"].removeprefix("./").rpartition("/")[0].partition("/")[0] for _, sample in samples]
    tars = [stem(tar.rpartition("/")[2]) for tar, _ in samples]
    if len(set(folders)) > 1:
        kind, names, may_be = "folders", folders, True
    else:
        kind, names = "names of tars", tars
        kinds = {re.sub(r"[\d_.-]+", "", name) for name in tars}
        may_be = len(set(tars)) > 1 and (len(kinds) > 1 or all(map(WORDNET_ID.fullmatch, tars)))
    if tree.choices.classes == "folders":
        return [(kind, name) for name in names]
    if may_be and tree.choices.classes == "auto" and not tree.choices.label_column:
        raise ConfigError(
            f"{tree.root}: the {kind} of the samples ({', '.join(sorted(set(names))[:3])}) may be classes, or mean nothing; "
            "choose `classes` folders or `classes` none"
        )
    return [("", None)] * len(samples)


def _label(tree: Tree, where: str, sample: dict[str, Any]) -> tuple[str, Label]:
    """Return where a sample's label comes from, and the label."""
    for ending in () if tree.choices.label_column else _TEXTS:
        if ending in sample:
            return f".{ending}", parse_text((sample[ending].content or b"").decode("utf-8", "replace"))
    if "json" not in sample or tree.choices.classes == "none":
        return "", None
    try:
        content = json.loads(sample["json"].content or b"")
    except (ValueError, RecursionError) as error:
        if tree.choices.label_column:
            raise DataError(f"{where}: its JSON cannot be read; repair it, or leave out `label_column`") from error
        return "", None
    if not isinstance(content, dict):
        return "", None
    if column := tree.choices.label_column:
        if column not in content:
            raise ConfigError(f"{where}: `label_column` {column}: its JSON has no such key, only {', '.join(content)}")
        return ".json", as_label(content[column], where)
    key = column_of(content, LABEL_KEYS)
    if key is None or isinstance(content[key], list | dict):
        return "", None
    return ".json", as_label(content[key], where)


def _columns(sample: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a sample's JSON."""
    try:
        content = json.loads(sample["json"].content or b"")
    except (ValueError, RecursionError, KeyError):
        return None
    return content if isinstance(content, dict) else None


def _note_unused(tree: Tree, samples: list[dict[str, Any]], used: set[str]) -> None:
    """Note the endings and JSON keys that are not read and may hold labels or annotations."""
    endings = {ending for sample in samples for ending in sample if not ending.startswith("__")}
    if others := sorted(endings - used - {*_TEXTS, "json"}):
        tree.about.notes.append(f"members of samples left aside: {', '.join(f'.{ending}' for ending in others[:8])}")
    if "json" not in endings or tree.choices.classes == "none":
        return
    keys: set[str] = set()
    for sample in samples[:100]:
        try:
            content = json.loads(sample["json"].content or b"")
        except (ValueError, RecursionError, KeyError, AttributeError):
            continue
        keys |= set(content) if isinstance(content, dict) else set()
    known = [key for key in (column_of(keys, (key,)) for key in LABEL_KEYS) if key is not None]
    if ".json" in tree.about.labels_from and known[1:] and not tree.choices.label_column:
        tree.about.notes.append(
            f"labels are those of the key {known[0]}; not used: {', '.join(known[1:])} (`label_column` chooses)"
        )
    if not tree.about.labels_from:
        tree.about.notes.append(
            f"the JSON of samples is not used; its keys are {', '.join(sorted(keys)[:8])}; `label_column` chooses one as label"
        )


# --- archives of folders -----------------------------------------------------------------------------------------


def _is_folder(samples: list[dict[str, Any]], hidden: list[str]) -> bool:
    """Whether a tar holds folders that mean something, instead of samples: classes, annotations, or a table.

    Args:
        hidden: images that are left out because of a dot; their folders may be classes, too.
    """
    plain = all(
        ending.startswith("__") or is_image(f".{ending}") or ending in ("csv", "txt", "json", "jsonl")
        for sample in samples
        for ending in sample
    )
    has_own_labels = any(ending in sample for sample in samples for ending in (*_TEXTS, *_MAPS, *_MASKS))
    pairs = sum("json" in sample and len(sample) > 3 for sample in samples)
    if not plain or has_own_labels or pairs:
        return False
    keys = [sample["__key__"] for sample in samples if any(f"{suffix[1:]}" in sample for suffix in SUFFIXES)]
    only_images = all(ending.startswith("__") or is_image(f".{ending}") for sample in samples for ending in sample)
    if not keys or (only_images and len(keys) < len(samples)):  # names with dots, such as IMG.1.jpg
        return not _are_views(samples)
    folders = {name.removeprefix("./").rpartition("/")[0] for name in (*keys, *hidden)}
    names = {key.rpartition("/")[2] for key in [sample["__key__"] for sample in samples]}
    return len(folders) > 1 or bool(names & {"dataset", "metadata"}) or any(key.endswith("_mask") for key in keys)


def _are_views(samples: list[dict[str, Any]]) -> bool:
    """Whether each of several samples has the same images by words in their names, such as .left.png and .right.png."""
    views = {frozenset(ending for ending in sample if not ending.startswith("__")) for sample in samples}
    words = [ending.partition(".") for ending in min(views, key=len)]
    return (
        len(samples) > 1
        and len(views) == 1
        and len(words) > 1
        and all(end and word.isalpha() for word, _, end in words)
    )


def _read_folders(tree: Tree, tars: list[str], split: str | None, rest: TarRest) -> Source:
    members: dict[str, TarMember] = {}
    for tar in tars:
        for member in readers.tar_members(tree.root, tar):
            if members.setdefault(member.name.removeprefix("./"), member) is not member:
                raise ConfigError(
                    f"{tree.root}: {member.name} is in several tars, whose folders cannot be told from one another; name "
                    "one tar, or unpack them"
                )
    tree.about.notes += notes_on_empty(empty_folders(rest.folders, [*members, *rest.junk, *rest.folders]))
    archive = storage.join(tree.root, tars[0])

    def read(root: str, name: str) -> bytes:
        inner = storage.join(root, name)[len(archive) + 1 :]
        if inner not in members:
            raise StorageError(f"{archive}#{inner}: no such file in the tar")
        return readers.tar_member(tree.root, members[inner].item)

    names, hidden = tuple(sorted(members)), tuple(hidden_images(sorted(rest.junk)))
    inner_tree = replace(tree, root=archive, names=names, hidden=hidden, read=read, archive=archive)
    source = tree.read_inner(inner_tree, split)
    missing = f"{tars[0]}#{readers.NOWHERE}#"
    return _outer(
        source,
        archive,
        tree.root,
        readers.tar_member,
        lambda name: members[name].item if name in members else missing + name,
    )


def read_zip(tree: Tree, split: str | None) -> Source:
    """Read a zip as the folder that it holds, without unpacking it; of several zips, that of the split.

    Raises:
        ConfigError: there are several zips, or a split must be chosen.
        DataError: the zip is damaged.
    """
    zips, split = split_by_names(tree, list(filter(_is_zip, tree.names)), split)
    if len(zips) != 1:
        raise ConfigError(f"{tree.root}: holds {len(zips)} zips ({', '.join(zips[:3])}, ...); name one of them")
    archive = storage.join(tree.root, zips[0])
    names = readers.zip_names(archive)
    used = tuple(name for name in names if not is_junk(name))
    junk = list(filter(is_junk, names))
    tree.about.notes += notes_on_junk(junk) + notes_on_empty(readers.zip_empty_folders(archive))
    hidden = tuple(hidden_images(junk))
    inner = replace(tree, root=archive, names=used, hidden=hidden, read=partial(_zip_file, archive), archive=archive)
    source = tree.read_inner(inner, split)
    return _outer(source, archive, tree.root, readers.zip_member, lambda name: f"{zips[0]}#{name}")


def _zip_file(archive: str, root: str, name: str) -> bytes:
    return readers.zip_content(archive, storage.join(root, name)[len(archive) + 1 :])


def _outer(
    source: Source, archive: str, root: str, read: Callable[[str, str], bytes], item_of: Callable[[str], str]
) -> Source:
    """Return the source of an archive with the names of its items as the archive's readers take them."""
    prefix = source.root[len(archive) + 1 :]

    def moved(part: Any) -> Any:
        if part is None:
            return None
        if isinstance(part, tuple):
            return tuple((class_id, moved(name)) for class_id, name in part)
        return item_of(f"{prefix}/{part}" if prefix else part)

    items = tuple(
        replace(item, image=moved(item.image), segmentation=moved(item.segmentation), mask=moved(item.mask))
        for item in source.items
    )
    return replace(source, root=root, items=items, read=read)


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip") and is_archive(name)


WEBDATASET = Layout(read_webdataset, lambda tree: tree.has_name(r"\.tar$"), sign="tars")
ZIP = Layout(read_zip, lambda tree: any(map(_is_zip, tree.names)), sign="a zip")
