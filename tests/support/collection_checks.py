"""Collections of images with what is right of them, and the comparison of their shards with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.sources.readers import inner_name
from tests.support.commands import assert_one_line, lfm
from tests.support.image_collections import (
    HOLE,
    IDS,
    SIZE,
    pairs,
    photo,
    photos,
    write_folder,
)
from tests.support.images import raw_samples


@dataclass(frozen=True)
class Collection:
    """An input of `lfm shard` and what is right: the samples, or parts of the refusal."""

    write: Callable[[Path], object]  # writes below a folder
    source: str = ""  # in that folder
    options: tuple[object, ...] = ()
    images: int = 3
    classes: dict[str, str] = field(default_factory=dict)  # class by the inner name of the image
    missing: float | None = None  # share of each mask
    ids: tuple[int, ...] | None = None  # in each map
    labels: dict[int, str] = field(default_factory=dict)  # some of the names of ids
    plan: tuple[str, ...] = ()  # parts of the plan
    refused: tuple[str, ...] = ()  # parts of the error


def folder(files: dict) -> Callable[[Path], None]:
    return lambda root: write_folder(root, files)


def check(collection: Collection, tmp_path: Path) -> None:
    """Shard a collection and compare the shards, or the error, with what is right."""
    root = tmp_path / "source"
    root.mkdir()
    collection.write(root)
    options = [
        root / option.removeprefix("@") if str(option).startswith("@") else option for option in collection.options
    ]
    command = ("shard", root / collection.source, tmp_path / "raw", "--image-size", SIZE, "--format", "png")
    result = lfm(*command, *options)
    if collection.refused:
        assert_one_line(result, *collection.refused)
        assert not (tmp_path / "raw" / manifests.MANIFEST).exists()
        return
    assert result.exit_code == 0, result.stderr
    for part in collection.plan:
        assert part in result.stdout, result.stdout
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    samples = {inner_name(name): sample for name, sample in raw_samples(tmp_path / "raw").items()}
    names = {record.index: record.name for record in manifest.classes}
    classes = {name: names[s.class_index] for name, s in samples.items() if s.class_index is not None}
    assert (len(samples), manifest.rejects) == (collection.images, []), result.stdout
    assert classes == collection.classes
    used = {record.name: record.count for record in manifest.classes if record.count}
    assert used == Counter(collection.classes.values())
    for sample in samples.values():
        assert (sample.mask is None) == (collection.missing is None)
        assert sample.mask is None or abs(sample.mask.mean() - (collection.missing or 0)) < 0.01
        assert (sample.segmentation is None) == (collection.ids is None)
        assert sample.segmentation is None or tuple(np.unique(sample.segmentation).tolist()) == collection.ids
    assert collection.labels.items() <= manifest.labels.items()


EDM_FILES = {f"{n // 6:05d}/img{n:08d}.png": photo(n) for n in range(8)}
EDM_LABELS = [[name, n % 3] for n, name in enumerate(EDM_FILES)]
EDM = EDM_FILES | {"dataset.json": json.dumps({"labels": EDM_LABELS})}
EDM_CLASSES = {name: str(label) for name, label in EDM_LABELS}
CAT_DOG = photos("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
CAT_DOG_CLASSES = {"cat/0.jpg": "cat", "cat/1.jpg": "cat", "dog/0.jpg": "dog"}
JUNK = {"__MACOSX/cat/._0.jpg": b"\0\5\x16\7", "cat/._0.jpg": b"\0\5\x16\7", "cat/Thumbs.db": b"x"}
RGBA_STROKES = np.stack([HOLE * 255] * 4, -1)
CUT_OUT = np.dstack([np.asarray(photo(9)), 255 - HOLE * 255])
CUT_OUT_OF_BLACK = np.dstack([np.zeros_like(CUT_OUT[..., :3]), CUT_OUT[..., 3]])
RED = np.stack([HOLE * 255, HOLE * 0, HOLE * 0], -1)
PALETTE_MASK = Image.frombytes("P", (SIZE, SIZE), HOLE.tobytes())
PALETTE_MASK.putpalette([0, 0, 0, 128, 0, 0])


def indexed(*colours: int) -> Image.Image:
    """A palette image of IDS whose indices have these colours."""
    image = Image.frombytes("P", (SIZE, SIZE), IDS.tobytes())
    image.putpalette([channel for colour in colours for channel in colour.to_bytes(3, "big")])
    return image


def coloured(*colours: int) -> np.ndarray:
    """An RGB map of IDS whose classes have these colours."""
    return np.array([list(colour.to_bytes(3, "big")) for colour in colours], np.uint8)[IDS]


def masks(mask: np.ndarray | Image.Image) -> Callable[[Path], None]:
    return folder(pairs("{}.png", "{}_mask.png", mask))


def maps(content: np.ndarray | Image.Image, **files: str) -> Callable[[Path], None]:
    return folder(
        pairs("images/{}.jpg", "annotations/{}.png", content)
        | {name.replace("_txt", ".txt"): t for name, t in files.items()}
    )


# Inputs that were once read wrong without a word, or not at all.
BOTH = {f"{n}.{suffix}": content for n in range(3) for suffix, content in (("jpg", photo(n)), ("png", IDS))}
