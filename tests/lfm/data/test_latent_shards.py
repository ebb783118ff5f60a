"""Shards are plain tars that others read too, of equal bytes for equal input, and a strided array to us."""

from __future__ import annotations

import io
import math
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm.data.latent_shards import LATENT_MEMBERS, LatentShard, latent_layout, latent_members
from lfm.data.manifest import Member
from lfm.data.raw_shards import IMAGE_ENCODINGS, raw_members, read_raw
from lfm.data.tar import BLOCK, encode_class, sample_key, write_tar
from lfm.errors import DataError
from lfm.types import LatentSample, RawSample

SMALL = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LOSSLESS = [name for name in IMAGE_ENCODINGS if name != "jpg"]


def raw_samples(count: int = 3, *, size: int = 9, everything: bool = True) -> list[RawSample]:
    random = np.random.default_rng(0)
    return [
        RawSample(
            key=sample_key(2, row),
            image=random.integers(0, 256, (size, size, 3)).astype(np.uint8),
            class_index=row * 7 if everything else None,
            mask=random.integers(0, 2, (size, size)).astype(np.uint8) if everything else None,
            segmentation=random.integers(0, 256, (size, size)).astype(np.uint8) if everything else None,
            metadata={"source": f"é/{row}.jpg", "width": 100} if everything else {},
        )
        for row in range(count)
    ]


def latent_samples(
    count: int, shape: tuple[int, int, int], *, classes: bool, flips: bool, conditions: bool = False, seed: int = 0
) -> list[LatentSample]:
    random = np.random.default_rng(seed)
    masked = {name: lambda: random.standard_normal(shape).astype(np.float16) for name in ("masked", "masked_flip")}
    maps = {"mask": lambda: random.integers(0, 2, shape[1:]).astype(np.uint8)}
    maps |= {"segmentation": lambda: random.integers(0, 300, (9, 9)).astype(np.uint16)}
    stored = (2 * shape[0], *shape[1:])
    return [
        LatentSample(
            key=sample_key(0, row),
            posterior=random.standard_normal(stored).astype(np.float16),
            posterior_flip=random.standard_normal(stored).astype(np.float16) if flips else None,
            class_index=int(random.integers(10**8)) if classes else None,
            **{name: make() for name, make in (maps | masked if conditions else {}).items()},
        )
        for row in range(count)
    ]


def raw_shard(path: Path, image_format: str = "webp", **options: Any) -> list[RawSample]:
    samples = raw_samples(**options)
    write_tar(path, (raw_members(sample, image_format) for sample in samples))
    return samples


def test_the_tar_is_webdatasets_own_byte_for_byte(tmp_path: Path) -> None:
    samples = [raw_members(sample, "png") for sample in raw_samples(count=3)]
    write_tar(tmp_path / "ours.tar", samples)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def layout(shape: tuple[int, int, int], **options: bool) -> tuple[tuple[Member, ...], int]:
    return latent_layout(latent_samples(1, shape, **options)[0])


def latent_shard(path: Path, *arguments: Any, **options: Any) -> list[LatentSample]:
    samples = latent_samples(*arguments, **options)
    write_tar(path, map(latent_members, samples))
    return samples


def read(path: Path) -> list[RawSample]:
    with path.open("rb") as stream:
        return list(read_raw(stream, "shard"))


def equal(one: RawSample, other: RawSample) -> bool:
    return (one.key, one.class_index, one.metadata) == (other.key, other.class_index, other.metadata) and all(
        np.array_equal(*pair)  # type: ignore[arg-type]
        for pair in ((one.image, other.image), (one.mask, other.mask), (one.segmentation, other.segmentation))
    )


# --- both kinds --------------------------------------------------------------------------------------------------


def write_either(kind: str, path: Path) -> None:
    if kind == "raw":
        raw_shard(path)
    else:
        latent_shard(path, 3, (4, 5, 6), classes=True, flips=True)


@pytest.mark.parametrize("kind", ["raw", "latents"])
def test_equal_input_gives_equal_bytes(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_either(kind, tmp_path / "a.tar")
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.5)
    monkeypatch.setenv("USER", "somebody")
    before = os.umask(0o077)
    try:
        write_either(kind, tmp_path / "b.tar")
    finally:
        os.umask(before)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("kind", ["raw", "latents"])
def test_a_shard_is_plain_ustar_of_no_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    write_either(kind, path)
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        assert not tar.pax_headers
    assert len(members) == (15 if kind == "raw" else 9)
    content = path.read_bytes()
    for member in members:
        header = content[member.offset : member.offset + BLOCK]
        assert member.offset_data == member.offset + BLOCK, "no extended header before it"
        assert header[156:157] == tarfile.REGTYPE and header[257:265] == b"ustar\x0000"
        assert member.mtime == 0 and not member.pax_headers
        assert len(member.name.split(".")[0]) == 12 and member.name.split(".")[0].isdigit()


@pytest.mark.parametrize("kind", ["raw", "latents"])
def test_tar_lists_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    write_either(kind, path)
    result = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    with tarfile.open(path) as tar:
        assert result.stdout.split() == tar.getnames()


# --- raw shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", LOSSLESS)
@pytest.mark.parametrize("everything", [True, False])
def test_a_raw_shard_reads_back_exactly(tmp_path: Path, image_format: str, everything: bool) -> None:
    samples = raw_shard(tmp_path / "a.tar", image_format, everything=everything)
    back = read(tmp_path / "a.tar")
    assert len(back) == len(samples) and all(map(equal, back, samples))


@SMALL
@given(ids=st.integers(0, 2**16 - 1), class_index=st.integers(0, 10**8 - 1))
def test_large_class_ids_survive(tmp_path: Path, ids: int, class_index: int) -> None:
    segmentation = np.full((4, 4), ids, np.uint16)
    sample = RawSample("000000000000", np.zeros((4, 4, 3), np.uint8), class_index, segmentation=segmentation)
    write_tar(tmp_path / "a.tar", [raw_members(sample, "png")])
    back = read(tmp_path / "a.tar")[0]
    assert back.class_index == class_index
    assert back.segmentation is not None and np.array_equal(back.segmentation, segmentation)
    assert encode_class(class_index) == b"%08d" % class_index


@pytest.mark.parametrize("image_format", LOSSLESS)
@pytest.mark.parametrize("decoder", ["pil", "rgb8"])
def test_vanilla_webdataset_reads_raw_shards(tmp_path: Path, image_format: str, decoder: str) -> None:
    samples = raw_shard(tmp_path / "a.tar", image_format)
    items = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode(decoder))
    assert [item["__key__"] for item in items] == [sample.key for sample in samples]
    for item, sample in zip(items, samples, strict=True):
        assert np.array_equal(np.asarray(item[image_format]), sample.image)
        assert item["cls"] == sample.class_index and item["json"] == sample.metadata
        assert sample.mask is not None
        mask = np.asarray(item["mask.png"])
        assert np.array_equal(mask[..., 0] if mask.ndim == 3 else mask, sample.mask * 255), "255 is the hole"


def test_what_the_shard_does_not_hold_is_none(tmp_path: Path) -> None:
    raw_shard(tmp_path / "a.tar", everything=False)
    sample = read(tmp_path / "a.tar")[0]
    assert (sample.class_index, sample.mask, sample.segmentation, sample.metadata) == (None, None, None, {})


def test_a_truncated_raw_shard_is_one_line_or_short(tmp_path: Path) -> None:
    """Whoever reads it compares the count; what must not come is a wrong sample, or an error without the name."""
    samples = raw_shard(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    for length in range(0, len(content), 301):
        seen = []
        try:
            for sample in read_raw(io.BytesIO(content[:length]), "here/a.tar"):
                seen.append(sample)
        except DataError as error:
            assert str(error).startswith("here/a.tar: ") and "\n" not in str(error)
        for back, sample in zip(seen[:-1], samples, strict=False):
            assert equal(back, sample)


GOOD = raw_members(raw_samples(1)[0], "webp")


@pytest.mark.parametrize(
    "members",
    [
        {name: GOOD[name] for name in ("__key__", "cls")},
        GOOD | {"webp": b"junk"},
        GOOD | {"webp": b""},
        GOOD | {"cls": b"cat"},
        GOOD | {"json": b"{"},
        GOOD | {"mask.png": b"junk"},
        GOOD | {"seg.png": GOOD["seg.png"][:60]},
    ],
    ids=["no image", "junk", "empty", "class", "json", "mask", "segmentation"],
)
def test_a_bad_member_is_one_line_with_shard_and_sample(tmp_path: Path, members: dict[str, Any]) -> None:
    write_tar(tmp_path / "a.tar", [members])
    with pytest.raises(DataError, match=r"^shard: sample 000002000000.*make the shard again$") as error:
        read(tmp_path / "a.tar")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"hello" * 999, bytes(range(256)) * 40, b"\x1f\x8b" + bytes(5000)])
def test_what_is_no_tar_is_one_line(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        list(read_raw(io.BytesIO(content), "here"))


def test_a_sample_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [GOOD, GOOD])
    with pytest.raises(DataError, match=r"^shard: "):
        read(tmp_path / "a.tar")


def test_samples_are_read_one_by_one(tmp_path: Path) -> None:
    raw_shard(tmp_path / "a.tar", count=9, size=64)
    with (tmp_path / "a.tar").open("rb") as stream:
        samples: Iterator[RawSample] = read_raw(stream, "shard")
        next(samples)
        assert stream.tell() < (tmp_path / "a.tar").stat().st_size / 2


# --- latent shards -----------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@SMALL
@given(
    shape=SHAPES,
    count=st.integers(0, 4),
    has=st.fixed_dictionaries({name: st.booleans() for name in ("classes", "flips", "conditions")}),
)
def test_the_strided_columns_are_what_webdataset_decodes(
    tmp_path: Path, shape: tuple[int, int, int], count: int, has: dict[str, bool]
) -> None:
    path = tmp_path / "a.tar"
    samples = latent_shard(path, count, shape, **has)
    members, stride = layout(shape, **has)
    assert stride % BLOCK == 0 and all(m.offset % BLOCK == 0 for m in members), "aligned"
    shard = LatentShard(path, count, members, stride)
    items = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    assert len(items) == count == len(shard.columns["latent.npy"])
    for row, (item, sample) in enumerate(zip(items, samples, strict=True)):
        assert item["__key__"] == sample.key
        for suffix, field in LATENT_MEMBERS.items():
            value = getattr(sample, field)
            assert (suffix in shard.columns) == (value is not None)
            if suffix == "cls" and value is not None:
                assert int(shard.columns[suffix][row]) == item[suffix] == value
            elif value is not None:
                assert shard.columns[suffix].dtype == item[suffix].dtype == value.dtype
                assert np.array_equal(shard.columns[suffix][row], item[suffix])
                assert np.array_equal(item[suffix], value)


@SMALL
@given(shape=SHAPES, classes=st.booleans(), flips=st.booleans())
def test_the_layout_is_the_tars_own(tmp_path: Path, shape: tuple[int, int, int], classes: bool, flips: bool) -> None:
    path = tmp_path / "a.tar"
    latent_shard(path, 3, shape, classes=classes, flips=flips)
    members, stride = layout(shape, classes=classes, flips=flips)
    with tarfile.open(path) as tar:
        entries = tar.getmembers()
    for number, entry in enumerate(entries):
        row, column = divmod(number, len(members))
        assert entry.name == f"{sample_key(0, row)}.{members[column].suffix}"
        header = BLOCK if entry.name.endswith(".npy") else 0
        assert entry.offset_data + header == row * stride + members[column].offset
        data = np.dtype(members[column].dtype).itemsize * math.prod(members[column].shape)
        assert entry.size == header + data


def test_an_npy_of_a_shard_is_an_ordinary_npy(tmp_path: Path) -> None:
    (sample,) = latent_samples(1, (4, 8, 8), classes=False, flips=False)
    loaded = np.load(io.BytesIO(latent_members(sample)["latent.npy"]), allow_pickle=False)
    assert loaded.dtype == np.float16 and np.array_equal(loaded, sample.posterior)
    backwards = LatentSample("1", np.asfortranarray(sample.posterior))
    assert np.array_equal(np.load(io.BytesIO(latent_members(backwards)["latent.npy"])), sample.posterior)


def test_a_truncated_latent_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    latent_shard(path, 4, (4, 8, 8), classes=True, flips=True)
    content, (members, stride) = path.read_bytes(), layout((4, 8, 8), classes=True, flips=True)
    for length in [0, 1, BLOCK, stride, 4 * stride - BLOCK, 4 * stride - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="truncated") as error:
            LatentShard(path, 4, members, stride)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    path.write_bytes(content[: 4 * stride])
    assert len(LatentShard(path, 4, members, stride).columns["cls"]) == 4


def test_a_latent_shard_is_mapped_and_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    latent_shard(path, 2, (1, 2, 2), classes=False, flips=False)
    before = path.read_bytes()
    column = LatentShard(path, 2, *layout((1, 2, 2), classes=False, flips=False)).columns["latent.npy"]
    assert isinstance(column, np.ndarray) and not column.flags.owndata
    column[:] = 0
    assert path.read_bytes() == before


def test_a_latent_shard_of_no_samples_is_empty(tmp_path: Path) -> None:
    """All of a raw shard's images can have been rejected."""
    write_tar(tmp_path / "a.tar", [])
    members, stride = layout((4, 32, 32), classes=True, flips=True)
    shard = LatentShard(tmp_path / "a.tar", 0, members, stride)
    assert {len(column) for column in shard.columns.values()} == {0}


@given(shard=st.integers(0, 10**7), row=st.integers(0, 10**7), other=st.tuples(*[st.integers(0, 10**7)] * 2))
def test_keys_are_digits_and_sort_as_the_samples_do(shard: int, row: int, other: tuple[int, int]) -> None:
    assert sample_key(shard, row).isdigit()
    if max(shard, row, *other) < 10**6:
        assert (sample_key(shard, row) < sample_key(*other)) == ((shard, row) < other)
