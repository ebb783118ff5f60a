"""Trees of files named as in published collections, with small images of the modes and formats that those have.

The names are those of tests/data/layouts/*.txt; a layout is recognised by its names. What the files hold is generated.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath

import lmdb
import numpy as np
from PIL import Image

from tests.support.commands import REPOSITORY
from tests.support.images import image_bytes, random_pixels, save_image

LISTS = REPOSITORY / "tests" / "data" / "layouts"
ORIENTATION = 0x0112  # the EXIF tag

# The order in which the parts of a face are painted, by the name of the folder of expected maps; class ids start at 1.
FACE_PART_ORDERS = {
    "expected_mask_lfm_order": [
        "skin",
        "l_brow",
        "r_brow",
        "l_eye",
        "r_eye",
        "eye_g",
        "l_ear",
        "r_ear",
        "ear_r",
        "nose",
        "mouth",
        "u_lip",
        "l_lip",
        "neck",
        "neck_l",
        "cloth",
        "hair",
        "hat",
    ],
    "expected_mask_official_order": [
        "skin",
        "nose",
        "eye_g",
        "l_eye",
        "r_eye",
        "l_brow",
        "r_brow",
        "l_ear",
        "r_ear",
        "mouth",
        "u_lip",
        "l_lip",
        "hair",
        "hat",
        "ear_r",
        "neck_l",
        "neck",
        "cloth",
    ],
}
FACE_SIZE = 32  # of maps; images have twice that


def generate_trees(root: Path) -> Path:
    """Write all trees below `root` and return it; the same files every time."""
    databases: dict[str, list[str]] = defaultdict(list)
    for path in sorted(LISTS.glob("*.txt")):
        for line in path.read_text().splitlines():
            if "#" in line and not line.startswith("#"):
                database, key = line.split("#")
                databases[database].append(key)
            elif line and not line.startswith("#"):
                _write_file(root, line)
    for database, keys in databases.items():
        _write_lmdb(root / database, keys)
    _write_imagenet_tables(root / "layouts")
    for folder in FACE_PART_ORDERS:
        _write_expected_maps(root / "layouts" / "CelebAMask-HQ", folder)
    return root


def _write_file(root: Path, name: str) -> None:
    """Write one file of the lists, whose content depends on its name alone."""
    path, parts, stem = root / name, PurePosixPath(name).parts, PurePosixPath(name).stem
    seed = sum(name.encode())
    height, width = 20 + seed % 7, 24 + seed % 5  # images of a collection differ in size
    if parts[0] == "ccp_seg" or "ADEChallengeData2016" in parts or parts[0] == "coco_mini":
        height, width = _size_of_pair(stem)
    if path.suffix in (".txt", ".csv"):
        _write_text(path)
    elif "CelebA-HQ-img" in parts:
        save_image(path, random_pixels(2 * FACE_SIZE, 2 * FACE_SIZE, 3))
    elif "CelebAMask-HQ-mask-anno" in parts:
        save_image(path, _face_part(name))
    elif "annotations" in parts:
        save_image(path, _class_ids(height, width, parts[0] == "coco_mini"))
    elif "masks" in parts:
        save_image(path, _hole(height, width))
    elif "masks_handdrawn" in parts:
        soft = random_pixels(height, width)
        save_image(path, np.stack([soft] * 3, -1) if stem.startswith("bench2") else soft)
    elif stem.endswith("_mask"):
        save_image(path, _hole(32, 32))
    elif "inpaint_ldm" in parts:
        save_image(path, random_pixels(32, 32, 3))
    else:
        _write_photograph(path, height, width)


def _write_photograph(path: Path, height: int, width: int) -> None:
    """Write a JPEG, or one of the odd files that ImageNet and COCO have."""
    pixels = random_pixels(height, width, 3)
    if path.stem in ("n03124170_1", "000000010125"):
        save_image(path, pixels[..., 0], format="JPEG")
    elif path.stem == "n03124170_2":
        save_image(path, Image.fromarray(pixels).convert("CMYK"), format="JPEG")
    elif path.stem == "n03124170_3":
        save_image(path, pixels, format="PNG")
    elif path.stem == "n03124170_4":
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        save_image(path, pixels, format="JPEG", exif=exif)
    else:
        save_image(path, pixels, format="JPEG")


def _write_text(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "labels.txt":
        count = 59 if path.parent.name == "ccp_seg" else 182
        path.write_text("".join(f"{index}\tclass {index}\n" for index in range(count)))
    elif path.name == "sceneCategories.txt":
        path.write_text("ADE_train_00000001 street\n")
    elif path.parent.name == "ADEChallengeData2016":
        path.write_text("".join(f"images/{path.stem}/{n}.jpg annotations/{path.stem}/{n}.png\n" for n in range(3)))


def _write_imagenet_tables(root: Path) -> None:
    """Write the classes of both parts, and the class of each image of the flat validation part."""
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    wnids = sorted(path.name for path in (data / "train").iterdir())
    names = ["cowboy hat, ten-gallon hat", *(f"class {index}" for index in range(1, len(wnids)))]
    mapping = "".join(f"{wnid} {name}\n" for wnid, name in zip(wnids, names, strict=True))
    (root / "LOC_synset_mapping.txt").write_text(mapping)
    rows = ["ImageId,PredictionString\n"]
    for index, path in enumerate(sorted((data / "val").iterdir())):
        rows.append(f"{path.stem},{wnids[index * len(wnids) // 18]} 1 1 20 20 \n")
    (root / "LOC_val_solution.csv").write_text("".join(rows))


def _write_lmdb(path: Path, keys: list[str]) -> None:
    """Write raw RGB, JPEG or WebP values; every second value of `lsun` is WebP."""
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for index, key in enumerate(keys):
            pixels = random_pixels(24, 24 + index % 5, 3)
            if "celeba-lmdb" in path.parts:
                value = random_pixels(16, 16, 3).tobytes()
            else:
                value = image_bytes(pixels, format="WEBP" if "lsun" in path.parts and index % 2 else "JPEG")
            transaction.put(key.encode(), value)


def _write_expected_maps(root: Path, folder: str) -> None:
    """Write the map of each face under one order of its parts: later parts cover earlier ones."""
    for image in (root / "CelebA-HQ-img").iterdir():
        ids = np.zeros((FACE_SIZE, FACE_SIZE), np.uint8)
        for class_id, part in enumerate(FACE_PART_ORDERS[folder], 1):
            number = int(image.stem)
            path = root / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}_{part}.png"
            if path.is_file():
                ids[np.asarray(Image.open(path))[..., 0] > 127] = class_id
        save_image(root / folder / f"{image.stem}.png", ids)


def _face_part(name: str) -> np.ndarray:
    """Return a part of a face, RGB of 0 and 255: a rectangle that overlaps those of other parts."""
    part = np.zeros((FACE_SIZE, FACE_SIZE, 3), np.uint8)
    top, left = (int(n) for n in np.random.default_rng(sum(name.encode())).integers(0, FACE_SIZE // 2, 2))
    part[top : top + FACE_SIZE // 2, left : left + FACE_SIZE // 2] = 255
    return part


def _class_ids(height: int, width: int, coco: bool) -> np.ndarray:
    """Return a grey map of class ids; those of COCO-Stuff go up to 181, and its border is unlabelled."""
    ids = random_pixels(height, width, high=182 if coco else 59)
    ids[0] = 255 if coco else 0
    return ids


def _hole(height: int, width: int) -> np.ndarray:
    """Return a grey mask, 0 and 255, with a hole in the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return mask


def _size_of_pair(stem: str) -> tuple[int, int]:
    """Return height and width of an image, its map and its mask, which depend on their common name."""
    seed = sum(stem.encode())
    return 20 + seed % 7, 24 + seed % 5
