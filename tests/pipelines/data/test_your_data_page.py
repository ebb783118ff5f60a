"""The commands of docs/your-data.md, each run on a small collection of the kind that it is about."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import REPOSITORY, lfm
from tests.support.image_collections import (
    HOLE,
    IDS,
    pairs,
    photo,
    photos,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

CAT_DOG = photos("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
ROAD = np.array([[128, 64, 128], [128, 0, 0], [128, 128, 128]], np.uint8)[IDS]  # colours of CamVid


def folder(name: str, files: dict) -> Callable[[Path], object]:
    return lambda root: write_folder(root / name, files)


SOURCES: dict[str, Callable[[Path], object]] = {
    "lfm shard pictures raw": folder("pictures", CAT_DOG),
    "lfm shard pictures raw --near-duplicates report --sheet sheet.png": folder("pictures", CAT_DOG),
    "lfm shard pictures raw --near-duplicates drop": folder("pictures", CAT_DOG),
    "lfm shard pictures raw --split train": folder("pictures", photos("Train/cat/0.png", "val/cat/1.png")),
    "lfm shard pictures raw --classes inner-folders": folder(
        "pictures", photos("real/cat/0.png", "clipart/cat/1.png", "clipart/dog/2.png")
    ),
    "lfm shard pictures raw --labels train.csv --label-column breed": lambda root: (
        write_folder(root / "pictures", photos("0.png", "1.png")),
        (root / "train.csv").write_text("id,breed\n0,pug\n1,collie\n"),
    ),
    "lfm shard pictures.zip raw": lambda root: write_zip(root / "pictures.zip", CAT_DOG),
    "lfm shard shards raw --label-column species --map-files target.png": lambda root: write_tar(
        root / "shards" / "0.tar",
        pairs("{}.jpg", "{}.target.png", IDS) | {f"{n}.json": '{"species": 1}' for n in range(3)},
    ),
    "lfm shard ffhq-256x256.zip raw": lambda root: write_zip(
        root / "ffhq-256x256.zip", photos("0/a.png") | {"dataset.json": json.dumps({"labels": [["0/a.png", 3]]})}
    ),
    "lfm shard imagefolder raw --split train": folder(
        "imagefolder",
        photos("train/0.png", "test/1.png")
        | {f"{split}/metadata.csv": f"file_name,label\n{n}.png,cat\n" for n, split in enumerate(("train", "test"))},
    ),
    "lfm shard cifar100 raw --split train --label-column coarse_label": lambda root: write_parquet(
        root / "cifar100" / "train-0.parquet", {"img": [photo(0)], "fine_label": [1], "coarse_label": [2]}
    ),
    "lfm shard inpainting raw": folder("inpainting", pairs("{}.png", "{}_mask.png", HOLE)),
    "lfm shard supervisely raw --map-files masks_machine": folder(
        "supervisely", pairs("img/{}.jpg", "masks_machine/{}.jpg.png", IDS)
    ),
    "lfm shard cityscapes raw --split val": folder(
        "cityscapes", pairs("leftImg8bit/val/bonn/{}_leftImg8bit.png", "gtFine/val/bonn/{}_gtFine_labelIds.png", IDS)
    ),
    "lfm shard camvid raw --split train --palette camvid": folder(
        "camvid", pairs("train/{}.png", "trainannot/{}.png", ROAD) | pairs("val/{}.png", "valannot/{}.png", ROAD)
    ),
    "lfm shard voc raw --split train --ignore-label 255": folder(
        "voc",
        pairs("JPEGImages/{}.jpg", "SegmentationClass/{}.png", np.where(IDS == 2, 255, IDS).astype(np.uint8))
        | {"ImageSets/Segmentation/train.txt": "0\n1\n", "ImageSets/Segmentation/val.txt": "2\n"},
    ),
}


def commands() -> list[str]:
    lines = (REPOSITORY / "docs" / "your-data.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    lfm shard") and "SOURCE" not in line]


def test_every_command_of_the_page_is_run() -> None:
    assert sorted(commands()) == sorted(SOURCES)


@pytest.mark.parametrize("command", SOURCES)
def test_commands_of_the_page(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SOURCES[command](tmp_path)
    monkeypatch.chdir(tmp_path)
    result = lfm(*shlex.split(command)[1:], "--image-size", 32)
    assert result.exit_code == 0 and ", 0 rejected" in result.stdout, result.stderr
