"""A data set is complete when its manifest is there, is known by its digest, and is never mixed with another."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import AutoencoderRecord, ClassRecord, ColumnsRecord, Manifest, Member, Reject, ShardRecord
from lfm.errors import ConfigError, DataError, LfmError

SHARD = ShardRecord(
    name="000000.tar",
    samples=3,
    bytes=10240,
    sha256="a" * 64,
    crc32=7,
    class_counts=(1, 2),
    rejects=(Reject(source="é.jpg", reason="empty file"),),
    channel_sums=((0.1, 1e-17), (3.5, 7.25)),
    values_per_channel=9,
)
MANIFEST = Manifest(
    kind="latents",
    image_size=64,
    classes=(ClassRecord(index=0, name="cat", count=1), ClassRecord(index=1, name="dög", count=2)),
    recipe={"kind": "latents", "flips": True, "nested": {"a": [1, 2.5, None]}},
    parent_digest="b" * 64,
    autoencoder=AutoencoderRecord(
        name="embedded", content_hash="c", downsample_factor=8, latent_channels=4, scale_factor=0.18215, shift=0.0
    ),
    members=(
        Member(suffix="cls", dtype="S8", shape=(), offset=512),
        Member(suffix="latent.npy", dtype="<f2", shape=(8, 2, 2), offset=1536),
    ),
    stride=2048,
    channel_mean=(0.1, 0.2),
    channel_std=(1.0, 1e-9),
    columns=ColumnsRecord(bytes=9, crc32=7, types={"score": "float"}),
    shards=(SHARD, SHARD.model_copy(update={"name": "000001.tar", "samples": 4})),
)
RECIPE = {"kind": "raw", "image_size": 64, "split": None, "seed": 0}


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "place") if request.param == "local" else f"memory://{uuid.uuid4()}"


def put(folder: str, name: str, content: Any = b"") -> str:
    """A file of the folder: bytes as they are, all else as JSON."""
    path = storage.join(folder, name)
    storage.write_bytes(path, content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def one_line(error: pytest.ExceptionInfo[LfmError], where: str) -> str:
    """The message, which is one line that begins with the file."""
    assert str(error.value).startswith(f"{where}: ") and "\n" not in str(error.value)
    return str(error.value)


# --- the digest --------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(value=st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=4))
def test_a_digest_depends_on_content_and_not_on_order(value: dict[str, Any]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert (
        manifests.digest([value]) == manifests.digest([backwards]) == manifests.digest([json.loads(json.dumps(value))])
    )
    assert manifests.digest([value | {"one more": 1}]) != manifests.digest([value])


def test_the_index_is_not_in_the_digest() -> None:
    without = MANIFEST.model_copy(update={"columns": None})
    content = MANIFEST.model_dump(mode="json", exclude={"columns", "versions"})
    assert without.digest == MANIFEST.digest == manifests.digest([content])


def test_the_digest_survives_the_file(folder: str) -> None:
    manifests.publish(folder, MANIFEST)
    loaded = manifests.load(folder, "latents")
    assert loaded == MANIFEST and loaded.digest == MANIFEST.digest


def test_the_digest_is_the_same_in_every_process() -> None:
    script = "import sys; from lfm.data.manifest import Manifest; print(Manifest.model_validate_json(sys.stdin.read()).digest)"
    result = subprocess.run(
        [sys.executable, "-c", script], input=MANIFEST.model_dump_json(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == MANIFEST.digest


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values that are no containers."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for key, inner in enumerate(value) for leaf in leaves(inner, (*path, key))]
    return [path]


def test_every_value_is_in_the_digest() -> None:
    content = MANIFEST.model_dump(mode="json", exclude={"columns"})
    digests = {MANIFEST.digest}
    paths = leaves(content)
    assert len(paths) > 40
    for path in paths:
        changed = json.loads(json.dumps(content))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = (
            {"raw": "latents", "latents": "raw"}.get(str(place[path[-1]]), 77)
            if path == ("kind",)
            else f"{place[path[-1]]}x"
        )
        digests.add(manifests.digest([changed]))
    assert len(digests) == len(paths) + 1


def test_samples_and_rejects_are_counted_over_the_shards() -> None:
    assert MANIFEST.num_samples == 7
    assert [reject.source for reject in MANIFEST.rejects] == ["é.jpg", "é.jpg"]


# --- loading -----------------------------------------------------------------------------------------------------


def test_no_manifest_tells_what_to_run(folder: str) -> None:
    with pytest.raises(DataError) as error:
        manifests.load(folder, "raw")
    assert "make the shards with `lfm shard` first" in one_line(error, folder)
    manifests.claim(folder, RECIPE, overwrite=False)
    with pytest.raises(DataError) as error:
        manifests.load(folder, "latents")
    assert "not complete; run the same `lfm encode` again" in one_line(error, folder)


def test_the_other_kind_is_refused(folder: str) -> None:
    manifests.publish(folder, MANIFEST)
    with pytest.raises(DataError) as error:
        manifests.load(folder, "raw")
    message = one_line(error, storage.join(folder, manifests.MANIFEST))
    assert "holds latent shards, raw ones are needed; make them with `lfm shard`" in message


CONTENT = MANIFEST.model_dump(mode="json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        [],
        "text",
        None,
        3,
        {},
        {"kind": "raw"},
        {"kind": "latents"},
        CONTENT | {"shards": [{"name": "x"}]},
        CONTENT | {"image_size": "large"},
        CONTENT | {"unknown": 1},
        CONTENT | {"version": manifests.VERSION + 1},
    ],
    ids=lambda content: str(content)[:20] + str(content)[-12:],
)
def test_what_is_no_manifest_of_ours_is_one_line(folder: str, content: Any) -> None:
    path = put(folder, manifests.MANIFEST, content)
    with pytest.raises(DataError) as error:
        manifests.load(folder, "latents")
    one_line(error, path)


def test_a_record_that_is_none_is_one_line(folder: str) -> None:
    path = put(folder, "000000.json", {"name": "000000.tar"})
    with pytest.raises(DataError) as error:
        manifests.records(folder, ["000000.tar"])
    one_line(error, path)


# --- claiming ----------------------------------------------------------------------------------------------------


def content_of(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.find(folder)}


def test_an_empty_folder_is_claimed_and_the_same_recipe_goes_on(folder: str) -> None:
    manifests.claim(folder, RECIPE, overwrite=False)
    put(folder, "000000.tar", b"shard")
    before = content_of(folder)
    manifests.claim(folder, dict(reversed(RECIPE.items())), overwrite=False)
    assert content_of(folder) == before
    assert storage.read_json(storage.join(folder, manifests.RECIPE)) == RECIPE


VALUES = st.none() | st.integers() | st.text("xyz", max_size=60) | st.lists(st.integers(), max_size=3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.dictionaries(st.sampled_from("abcd"), VALUES), after=st.dictionaries(st.sampled_from("abcd"), VALUES))
def test_another_recipe_is_refused_by_the_names_of_the_changed_keys(before: dict, after: dict) -> None:
    folder = f"memory://{uuid.uuid4()}"
    manifests.claim(folder, before, overwrite=False)
    if before == after:
        return manifests.claim(folder, after, overwrite=False)
    missing = object()
    changed = {key for key in "abcd" if before.get(key, missing) != after.get(key, missing)}
    with pytest.raises(ConfigError) as error:
        manifests.claim(folder, after, overwrite=False)
    message = one_line(error, folder)
    assert "`overwrite`" in message
    assert changed == {key for key in "abcd" if f" {key} (" in message}
    assert storage.read_json(storage.join(folder, manifests.RECIPE)) == before
    return None


def test_a_tuple_is_no_change(folder: str) -> None:
    """JSON has none: a recipe must be compared, and explained, as it reads back."""
    manifests.claim(folder, {"a": (1, 2), "b": 1}, overwrite=False)
    manifests.claim(folder, {"a": (1, 2), "b": 1}, overwrite=False)
    with pytest.raises(ConfigError) as error:
        manifests.claim(folder, {"a": (1, 2), "b": 2}, overwrite=False)
    assert "b (1, now 2)" in str(error.value) and "a (" not in str(error.value)


@pytest.mark.parametrize("name", ["holiday.jpg", "000000.tar", "manifest.json", "notes"])
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(folder: str, name: str) -> None:
    put(folder, name, b"precious")
    with pytest.raises(ConfigError) as error:
        manifests.claim(folder, RECIPE, overwrite=False)
    assert "holds something else" in one_line(error, folder)
    assert content_of(folder) == {name: b"precious"}


def test_a_folder_of_folders_is_not_empty_either(folder: str) -> None:
    """A source of class folders, given as the destination by mistake."""
    put(folder, "cats/1.jpg", b"precious")
    with pytest.raises(ConfigError) as error:
        manifests.claim(folder, RECIPE, overwrite=False)
    assert "holds something else" in one_line(error, folder)
    assert content_of(folder) == {"cats/1.jpg": b"precious"}


@pytest.mark.parametrize("recipe", [[1], "text", 3, None])
def test_a_recipe_of_somebody_else_is_refused_and_overwritten_only_on_demand(folder: str, recipe: Any) -> None:
    path = put(folder, manifests.RECIPE, recipe)
    with pytest.raises(LfmError) as error:
        manifests.claim(folder, RECIPE, overwrite=False)
    assert "\n" not in str(error.value) and str(error.value).startswith(folder)
    manifests.claim(folder, RECIPE, overwrite=True)
    assert storage.read_json(path) == RECIPE


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 40, b'{"kind": "raw", "lfm_crc32": "00000000"}'])
def test_a_damaged_recipe_is_confirmed_by_the_manifest_or_all_shards_are_made_again(folder: str, damage: bytes) -> None:
    manifests.publish(folder, MANIFEST)
    path = put(folder, manifests.RECIPE, damage)
    with pytest.raises(ConfigError, match="different settings"):
        manifests.claim(folder, RECIPE, overwrite=False)
    manifests.claim(folder, MANIFEST.recipe, overwrite=False)
    assert storage.read_json(path) == MANIFEST.recipe and manifests.load(folder) == MANIFEST

    put(folder, manifests.RECIPE, damage)
    storage.remove(storage.join(folder, manifests.MANIFEST))
    put(folder, "000000.tar")
    manifests.commit(folder, SHARD)
    manifests.claim(folder, RECIPE, overwrite=False)
    assert storage.find(folder) == [manifests.RECIPE]


def test_a_damaged_recipe_beside_the_files_of_others_is_refused(folder: str) -> None:
    put(folder, manifests.RECIPE, b"{")
    put(folder, "mine.txt", b"precious")
    with pytest.raises(ConfigError, match="damaged, beside files"):
        manifests.claim(folder, RECIPE, overwrite=False)
    assert content_of(folder) == {manifests.RECIPE: b"{", "mine.txt": b"precious"}


@pytest.mark.parametrize("damage", ["record", "size", "empty", "flip"])
def test_a_damaged_record_is_discarded_and_the_others_stay(folder: str, damage: str) -> None:
    for name in ("000000.tar", "000001.tar"):
        put(folder, name, b"x" * 10)
        manifests.commit(folder, SHARD.model_copy(update={"name": name, "bytes": 10}))
    if damage == "size":
        put(folder, "000001.tar", b"x" * 9)
    else:
        path = storage.join(folder, "000001.json")
        content = storage.read_bytes(path)
        changed = {"record": b"{", "empty": b"", "flip": content.replace(b'"samples": 3', b'"samples": 2')}[damage]
        assert changed != content
        put(folder, "000001.json", changed)
    manifests.discard_damaged(folder)
    assert manifests.done(folder) == {"000000.tar"}


def hostile(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The content of a manifest with one value replaced."""
    content: Any = json.loads(json.dumps(CONTENT))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


NUMBERS = [
    path
    for path in leaves(CONTENT)
    if path[0] not in ("recipe", "version") and path[-1] not in ("name", "sha256", "source", "suffix", "dtype", "kind")
]
NUMBERS = [path for path in NUMBERS if path[-1] not in ("content_hash", "parent_digest", "reason", "detail")]
SIGNED = {"channel_mean", "channel_std", "channel_sums", "shift"}


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(NUMBERS), value=st.sampled_from([-1, float("nan"), float("inf"), -(10**30), "x", None, [], {}])
)
def test_every_number_of_a_manifest_has_limits(path: tuple[Any, ...], value: Any) -> None:
    folder = f"memory://{uuid.uuid4()}"
    put(folder, manifests.MANIFEST, hostile(path, value))
    if isinstance(value, int) and not SIGNED.isdisjoint(map(str, path)):
        return  # any finite number
    with pytest.raises(DataError) as error:
        manifests.load(folder, "latents")
    one_line(error, storage.join(folder, manifests.MANIFEST))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("members", 0, "dtype"), "O", "members.0.dtype"),
        (("members", 0, "dtype"), "V99999999999", "members.0.dtype"),
        (("members", 0, "shape"), [1] * 5, "members.0.shape"),
        (("members", 1, "shape"), [], "latent.npy is not of"),
        (("members", 1, "shape"), [7, 2, 2], "latent.npy is not of"),
        (("members", 1, "dtype"), "S8", "latent.npy is s8"),
        (("classes", 1, "name"), "a\udc80", "surrogates not allowed"),
        (("members", 0, "offset"), 2044, "reaches beyond its sample"),
        (("members", 0, "offset"), 8, "reaches beyond its sample"),
        (("stride",), 512, "reaches beyond its sample"),
        (("image_size",), 31623, "image_size"),
        (("shards", 1, "name"), "000000.tar", "000000.tar is listed twice"),
        (("shards", 1, "name"), "../000000.tar", "shards.1.name"),
        (("classes", 1, "index"), 0, "classes: their indices"),
        (("channel_std",), [1.0], "channel_mean and channel_std"),
        (("members", 1, "suffix"), "masked.npy", "latent.npy is missing"),
        (("recipe",), json.loads('{"a":' * 60 + "1" + "}" * 60), "is nested too deeply"),
    ],
)
def test_a_layout_that_would_crash_the_reader_is_refused_by_its_key(
    path: tuple[Any, ...], value: Any, message: str
) -> None:
    folder = f"memory://{uuid.uuid4()}"
    put(folder, manifests.MANIFEST, hostile(path, value))
    with pytest.raises(DataError) as error:
        manifests.load(folder, "latents")
    assert message in one_line(error, storage.join(folder, manifests.MANIFEST))


def test_credentials_are_not_stored(folder: str) -> None:
    recipe = {"source": "s3://KEY:se/cr@et@bucket/x", "other": ["https://host/x.tar?X-Amz-Signature=secret"]}
    manifests.claim(folder, recipe, overwrite=False)
    manifests.claim(folder, recipe, overwrite=False)
    stored = storage.read_bytes(storage.join(folder, manifests.RECIPE)).decode()
    assert "cr@et" not in stored and "secret" not in stored and "bucket/x" in stored


def test_overwrite_removes_the_shards_of_before(folder: str) -> None:
    manifests.claim(folder, RECIPE | {"seed": 1}, overwrite=False)
    for name in ("000000.tar", "000000.json", "manifest.json"):
        put(folder, name, b"old")
    manifests.claim(folder, RECIPE, overwrite=True)
    assert storage.find(folder) == [manifests.RECIPE]
    assert manifests.done(folder) == set()


def test_overwriting_begins_with_the_manifest(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, it must not leave a data set that says it is complete."""
    manifests.claim(folder, RECIPE | {"seed": 1}, overwrite=False)
    for name in ("000000.tar", "000000.json", "manifest.json"):
        put(folder, name, b"old")
    removed: list[str] = []
    monkeypatch.setattr(storage, "remove", lambda path: removed.append(path.rsplit("/", 1)[1]))
    manifests.claim(folder, RECIPE, overwrite=True)
    assert removed[0] == manifests.MANIFEST
    assert sorted(removed) == ["000000.json", "000000.tar", "manifest.json", "recipe.json"]


def test_a_killed_claim_is_taken_up_again(tmp_path: Path) -> None:
    """What is left is a temporary file; the same command must go on, as from everywhere else."""
    put(str(tmp_path), f"{storage.TEMPORARY_PREFIX}{manifests.RECIPE}.host.1", b"half")
    manifests.claim(str(tmp_path), RECIPE, overwrite=False)
    assert storage.read_json(str(tmp_path / manifests.RECIPE)) == RECIPE


def test_a_file_as_destination_is_one_line_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(LfmError) as error:
            manifests.claim(str(path), RECIPE, overwrite=overwrite)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert path.read_bytes() == b"precious"


# --- records -----------------------------------------------------------------------------------------------------


def test_a_shard_is_done_when_both_it_and_its_record_are_there(folder: str) -> None:
    assert manifests.done(folder) == set()
    manifests.claim(folder, RECIPE, overwrite=False)
    put(folder, "000000.tar")
    put(folder, f"{storage.TEMPORARY_PREFIX}000002.tar.host.1")
    manifests.commit(folder, SHARD.model_copy(update={"name": "000001.tar"}))
    assert manifests.done(folder) == set()
    manifests.commit(folder, SHARD)
    assert manifests.done(folder) == {"000000.tar"}
    put(folder, "000001.tar")
    assert manifests.done(folder) == {"000000.tar", "000001.tar"}
    with pytest.raises(DataError, match=r"000000\.tar: .* its record is of"):
        manifests.records(folder, ["000000.tar"])


def test_publishing_clears_what_killed_writers_left(tmp_path: Path) -> None:
    leftover = tmp_path / f"{storage.TEMPORARY_PREFIX}000002.tar.host.1"
    leftover.write_bytes(b"half")
    manifests.publish(str(tmp_path), MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == [manifests.MANIFEST]


CALLS: dict[str, Callable[[str], Any]] = {
    "done": manifests.done,
    "load": lambda folder: manifests.load(folder, "raw"),
    "records": lambda folder: manifests.records(folder, ["000000.tar"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_reading_changes_nothing(folder: str, call: str) -> None:
    put(folder, "000000.tar", b"x")
    before = content_of(folder)
    with contextlib.suppress(LfmError):
        CALLS[call](folder)
    assert content_of(folder) == before
