"""`lfm shard` and `lfm encode` keep what is known of every sample in an index."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm.data import manifest as manifests
from lfm.data.raw_shards import read_raw
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.images import image_bytes, random_pixels

SCORES = {"a.png": 0.5, "b.png": 2, "c.png": None, "d.png": 4.25, "e.png": -1}


def collection(root: Path, scores: dict[str, Any] = SCORES, caption: str = "an image") -> Path:
    """Write five images, one of them damaged, and a table of them."""
    root.mkdir(exist_ok=True)
    for number, name in enumerate(scores):
        (root / name).write_bytes(image_bytes(random_pixels(20 + number, 30, 3)))
    (root / "b.png").write_bytes(b"damaged")
    lines = [f"{name},{'' if score is None else score},{caption} {name},k{name[0]}" for name, score in scores.items()]
    (root / "metadata.csv").write_text("\n".join(["file_name,score,Caption text,label", *lines, ""]))
    return root


def shard(root: Path, dest: Path, *options: str) -> Any:
    arguments = ("--image-size", "16", "--samples-per-shard", "2", "--max-rejected", "0.5")
    return lfm("shard", root, dest, *arguments, *options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "columns.parquet").to_pylist()


def test_the_index_has_a_row_for_each_sample_in_the_order_of_the_shards(tmp_path: Path) -> None:
    """Keys, sizes and columns are those of the samples; the rejected image has no row."""
    assert shard(collection(tmp_path / "in"), tmp_path / "raw").exit_code == 0
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    assert manifest.columns and manifest.columns.types == {
        "key": "text", "class": "text", "source": "text", "width": "int", "height": "int",
        "score": "float", "Caption_text": "text", "label": "text",
    }  # fmt: skip
    samples = []
    for record in manifest.shards:
        with (tmp_path / "raw" / record.name).open("rb") as stream:
            samples += list(read_raw(stream, record.name))
    index = rows(tmp_path / "raw")
    assert [row["key"] for row in index] == [sample.key for sample in samples]
    assert len(index) == 4
    for row, sample in zip(index, samples, strict=True):
        assert sample.metadata["source"] == row["source"]
        assert (row["width"], row["height"]) == (sample.metadata["width"], sample.metadata["height"])
        assert row["score"] == SCORES[row["source"]]
        assert row["Caption_text"] == f"an image {row['source']}"
        assert row["class"] == row["label"] == manifest.classes[sample.class_index].name  # type: ignore[index]


def test_new_columns_renew_the_index_alone(tmp_path: Path) -> None:
    """The same command with another table keeps the shards, and their digest."""
    root = collection(tmp_path / "in")
    shard(root, tmp_path / "raw")
    before = manifests.load(str(tmp_path / "raw"), "raw")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "raw").glob("*.tar")}
    collection(root, SCORES | {"a.png": 9}, caption="another")
    assert shard(root, tmp_path / "raw").exit_code == 0
    after = manifests.load(str(tmp_path / "raw"), "raw")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "raw").glob("*.tar")} == times
    assert after.digest == before.digest and after.columns != before.columns
    assert {row["source"]: row["score"] for row in rows(tmp_path / "raw")}["a.png"] == 9


@pytest.mark.parametrize("damage", ["missing", "cut", "of another shard"])
def test_sizes_come_from_the_samples_where_older_shards_have_no_other(tmp_path: Path, damage: str) -> None:
    """Shards of before, or a damaged file beside them, give the same index."""
    root = collection(tmp_path / "in")
    shard(root, tmp_path / "raw")
    index = (tmp_path / "raw/columns.parquet").read_bytes()
    for name in ("000000.columns.json", "000001.columns.json"):
        path = tmp_path / "raw" / name
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:30])
        else:
            path.write_text(json.dumps({"row": [0] * 9, "width": [1] * 9, "height": [1] * 9}))
    (tmp_path / "raw/columns.parquet").unlink()
    assert shard(root, tmp_path / "raw").exit_code == 0
    assert (tmp_path / "raw/columns.parquet").read_bytes() == index


def test_without_pyarrow_shards_are_made_and_the_index_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says that columns are not kept; the same command with pyarrow keeps them, and the digest stays."""
    root = collection(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        assert shard(root, tmp_path / "raw").exit_code == 0
    assert sum("pip install lfm[hf]" in record.message for record in caplog.records) == 1
    before = manifests.load(str(tmp_path / "raw"), "raw")
    assert before.columns is None and "columns" not in json.loads((tmp_path / "raw/manifest.json").read_text())
    assert shard(root, tmp_path / "raw").exit_code == 0
    after = manifests.load(str(tmp_path / "raw"), "raw")
    assert after.columns is not None and after.digest == before.digest
    assert len(rows(tmp_path / "raw")) == 4


def test_latents_have_the_index_of_their_raw_shards(small_set: SmallSet, tmp_path: Path) -> None:
    """Encoding copies it; a damaged one ends in one line."""
    raw = tmp_path / "raw"
    shard(collection(tmp_path / "in"), raw)
    encode = ("encode", raw, tmp_path / "latents", "--autoencoder", small_set.autoencoder)
    assert lfm(*encode).exit_code == 0
    latents = manifests.load(str(tmp_path / "latents"), "latents")
    assert latents.columns == manifests.load(str(raw), "raw").columns
    assert (tmp_path / "latents/columns.parquet").read_bytes() == (raw / "columns.parquet").read_bytes()
    content = bytearray((raw / "columns.parquet").read_bytes())
    content[100] ^= 1
    (raw / "columns.parquet").write_bytes(content)
    assert_one_line(lfm(*encode), "columns.parquet", "checksum")


def test_columns_of_tables_and_of_the_json_of_tars(tmp_path: Path) -> None:
    """The rows of `--labels`, the cells of parquet and the JSON of webdataset's samples are kept alike."""
    images = {f"{name}.png": image_bytes(random_pixels(20 + number, 20, 3)) for number, name in enumerate("abc")}
    scores = [3, 1, 2]
    (tmp_path / "folder").mkdir()
    for name, content in images.items():
        (tmp_path / "folder" / name).write_bytes(content)
    table = tmp_path / "table.csv"
    lines = [f"{name},{score},x" for name, score in zip(images, scores, strict=True)]
    table.write_text("\n".join(["name,score,label", *lines, ""]))
    (tmp_path / "hf").mkdir()
    content = {"image": list(images.values()), "score": scores, "label": ["x"] * 3, "tags": [[1]] * 3}
    pq.write_table(pa.table(content), tmp_path / "hf/train.parquet")
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for (name, pixels), score in zip(images.items(), scores, strict=True):
            for member, data in (
                (name, pixels),
                (name.replace("png", "json"), json.dumps({"score": score, "label": "x"})),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data if isinstance(data, bytes) else data.encode()))
    for source, options in ((tmp_path / "folder", ("--labels", str(table))), (tmp_path / "hf", ()), (tars, ())):
        dest = tmp_path / f"raw-{source.name}"
        result = shard(source, dest, *options)
        assert result.exit_code == 0, result.output
        assert "score (int)" in result.output
        assert sorted(row["score"] for row in rows(dest)) == [1, 2, 3], source
        assert "tags" not in rows(dest)[0]
