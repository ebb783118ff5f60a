"""Small collections of images as people have them: files in folders, tars, zips and tables, written from a dictionary."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 48
MISSING = 16 * 32 / SIZE**2  # of HOLE: 22 %
HOLE = np.zeros((SIZE, SIZE), np.uint8)
HOLE[8:24, 8:40] = 1
IDS = np.zeros((SIZE, SIZE), np.uint8)
IDS[:20], IDS[30:] = 1, 2

Files = Mapping[str, "bytes | str | np.ndarray | Image.Image"]


def photo(seed: int) -> Image.Image:
    """Return a smooth random image, another one for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def encode(content: bytes | str | np.ndarray | Image.Image, suffix: str = ".png", **options: object) -> bytes:
    """Return the bytes of a file: of text, or of an image in the format of its suffix."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    image = Image.fromarray(content) if isinstance(content, np.ndarray) else content
    buffer = io.BytesIO()
    if suffix == ".heic":
        import pillow_heif

        pillow_heif.register_heif_opener()
    if suffix == ".jxl":
        import pillow_jxl  # noqa: F401
    format = {".heic": "HEIF", ".jp2": "JPEG2000", ".jxl": "JXL"}.get(suffix.lower(), "")
    image.save(buffer, format or Image.registered_extensions()[suffix.lower()], **options)
    return buffer.getvalue()


def write_folder(root: Path, files: Files) -> None:
    """Write files by their names below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(content, path.suffix))


def write_tar(path: Path, files: Files, mode: str = "w") -> None:
    """Write files as a tar, and folders, whose names end in a slash; `mode` is that of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            data = encode(content, Path(name).suffix)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(data))


def write_zip(path: Path, files: Files) -> None:
    """Write files as a zip, and folders, whose names end in a slash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, encode(content, Path(name).suffix))


def write_parquet(path: Path, columns: Mapping[str, list], class_names: Mapping[str, list[str]] | None = None) -> None:
    """Write a table of Hugging Face; cells of images are encoded, and `class_names` are those of label columns."""
    import pyarrow
    import pyarrow.parquet

    def cell(value: object) -> object:
        if isinstance(value, np.ndarray | Image.Image):
            return {"bytes": encode(value), "path": None}
        return value

    table = pyarrow.table({name: [cell(value) for value in values] for name, values in columns.items()})
    if class_names:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in class_names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def photos(*names: str) -> dict[str, Image.Image]:
    """Return a photo for each name."""
    return {name: photo(number) for number, name in enumerate(names)}


def pairs(images: str, annotations: str, annotation: np.ndarray | Image.Image, count: int = 3) -> dict:
    """Return photos and their annotations by patterns of names with `{}` for the number."""
    return {images.format(number): photo(number) for number in range(count)} | {
        annotations.format(number): annotation for number in range(count)
    }
