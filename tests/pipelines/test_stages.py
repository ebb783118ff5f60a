"""The stages from raw images to images, by their commands, and what they say to bad input."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lfm import weights_file
from lfm.data import manifest as manifests
from pipelines.data.shard import ShardConfig, run
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, lfm, make_autoencoder
from tests.support.images import folder_contents, image_folder

# --- shard ------------------------------------------------------------------------------------------------------


def test_equal_input_gives_equal_bytes_whatever_the_workers(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 30)
    for name, workers in (("one", 1), ("two", 2)):
        run(ShardConfig(str(source), str(tmp_path / name), image_size=16, samples_per_shard=8, workers=workers))
    assert folder_contents(tmp_path / "one") == folder_contents(tmp_path / "two")


def test_a_finished_shard_is_not_written_again_and_a_lost_one_is(tmp_path: Path) -> None:
    config = ShardConfig(
        str(image_folder(tmp_path / "p", 30)), str(tmp_path / "raw"), image_size=16, samples_per_shard=8
    )
    run(config)
    before = folder_contents(tmp_path / "raw")
    kept, lost = tmp_path / "raw" / "000000.tar", tmp_path / "raw" / "000002.tar"
    time_before = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "raw" / manifests.MANIFEST).unlink()
    run(config)
    assert folder_contents(tmp_path / "raw") == before
    assert kept.stat().st_mtime_ns == time_before


def test_a_corrupt_image_is_rejected_named_and_counted(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 30)
    bad = source / "cat" / "broken.jpg"
    bad.write_bytes((source / "cat" / "0.jpg").read_bytes()[:200])
    refused = lfm("shard", source, tmp_path / "raw", "--image-size", 16)
    assert_one_line(refused, "1 of 31", "cat/broken.jpg", "--max-rejected")
    assert not (tmp_path / "raw" / manifests.MANIFEST).exists()
    accepted = lfm("shard", source, tmp_path / "raw", "--image-size", 16, "--max-rejected", 0.1)
    assert accepted.exit_code == 0, accepted.stderr
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    assert manifest.num_samples == 30
    assert [reject.source for reject in manifest.rejects] == ["cat/broken.jpg"]


def test_a_folder_without_images_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(lfm("shard", tmp_path / "empty", tmp_path / "raw"), tmp_path / "empty", "no images")
    assert_one_line(lfm("shard", tmp_path / "nowhere", tmp_path / "raw"), tmp_path / "nowhere", "no such folder")
    assert not (tmp_path / "raw").exists()


def test_the_destination_of_other_shards_is_refused(small_set: SmallSet, tmp_path: Path) -> None:
    shutil.copytree(small_set.raw, tmp_path / "raw")
    before = folder_contents(tmp_path / "raw")
    assert_one_line(lfm("shard", small_set.images, tmp_path / "raw", "--image-size", 8), "image_size", "--overwrite")
    assert folder_contents(tmp_path / "raw") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layout", "foldr"), "--layout foldr"),
        (("--format", "gif"), "--format gif"),
        (("--image-size", 0), "--image-size 0: must be at least 1"),
        (("--workers", 0), "--workers 0: must be at least 1"),
        (("--max-rejected", 2), "--max-rejected 2: must be at most 1"),
        (("--max-rejected", "nan"), "--max-rejected nan: must be a finite number"),
        (("--seed", -1), "--seed -1: must be at least 0"),
        (("--split", "train"), "--split train: no such split; it has none; leave it out"),
    ],
)
def test_a_wrong_flag_is_named(small_set: SmallSet, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    assert_one_line(lfm("shard", small_set.images, tmp_path / "raw", *arguments), said)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("damage", [b"junk", b"{}", b""])
@pytest.mark.parametrize("name", ["000001.tar", "000001.json"])
def test_a_damaged_shard_is_named_and_made_again(
    tmp_path: Path, name: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    source = image_folder(tmp_path / "pictures", 20)
    command = ("shard", source, tmp_path / "raw", "--image-size", 8, "--samples-per-shard", 8)
    assert lfm(*command).exit_code == 0
    before = folder_contents(tmp_path / "raw")
    for repair in ((), ("--overwrite",)):
        (tmp_path / "raw" / name).write_bytes(damage)
        caplog.clear()
        assert lfm(*command, *repair).exit_code == 0
        assert folder_contents(tmp_path / "raw") == before
        named = [record.getMessage() for record in caplog.records]
        assert repair or any(str(tmp_path / "raw" / name) in message for message in named), named


@pytest.mark.parametrize(
    "change", [{"class_counts": [1]}, {"samples": 7}, {"rejects": [{"source": "a", "reason": "b"}]}]
)
def test_a_record_with_other_counts_is_made_again(tmp_path: Path, change: dict[str, object]) -> None:
    """Of a file without a checksum, as they were written before."""
    source = image_folder(tmp_path / "pictures", 20)
    command = ("shard", source, tmp_path / "raw", "--image-size", 8, "--samples-per-shard", 8)
    assert lfm(*command).exit_code == 0
    before = folder_contents(tmp_path / "raw")
    record = json.loads((tmp_path / "raw" / "000001.json").read_text())
    del record["lfm_crc32"]
    (tmp_path / "raw" / "000001.json").write_text(json.dumps(record | change))
    assert lfm(*command).exit_code == 0
    assert folder_contents(tmp_path / "raw") == before


def test_overwrite_leaves_what_is_not_ours(small_set: SmallSet, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(small_set.raw, raw)
    for name in ("my.json", "my.tar", "notes.txt"):
        (raw / name).write_text("mine")
    assert lfm("shard", small_set.images, raw, "--image-size", 8, "--overwrite").exit_code == 0
    assert all((raw / name).read_text() == "mine" for name in ("my.json", "my.tar", "notes.txt"))
    assert not (raw / "000001.tar").exists()


def test_a_circle_of_links_counts_nothing_twice(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", 6)
    (source / "cat" / "up").symlink_to("..")
    (source / "cat" / "gone.jpg").symlink_to("nowhere")
    result = lfm("shard", source, tmp_path / "raw", "--image-size", 8, "--max-rejected", 0.2)
    assert result.exit_code == 0, result.stderr
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    assert manifest.num_samples == 6 and [reject.reason for reject in manifest.rejects] == ["unreadable"]


def test_a_misspelt_command_or_flag_is_answered_with_the_nearest(tmp_path: Path) -> None:
    command, flag = lfm("shrad", "a", "b"), lfm("shard", "a", "b", "--image-sise", 3)
    assert command.exit_code == flag.exit_code == 2
    assert "shard" in command.stderr and "--image-size" in flag.stderr


# --- sample -----------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_and_class_alone(small_set: SmallSet, weights: Path, tmp_path: Path) -> None:
    common = ("sample", weights, "--class-index", 2, "--num-steps", 2, "--guidance-scale", 2)
    assert lfm(*common, "--seeds", "0-5", "--batch-size", 4, "--out", tmp_path / "a").exit_code == 0
    assert lfm(*common, "--seeds", "5,3", "--batch-size", 1, "--out", tmp_path / "b").exit_code == 0
    for name in ("000003.png", "000005.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["nfe"]["mean"] == 2 * 2 * 2  # heun evaluates twice a step, guidance doubles it
    assert [image["class_index"] for image in record["pictures"]] == [2] * 6
    assert Image.open(io.BytesIO((tmp_path / "a" / "grid.png").read_bytes())).size[0] > 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--class-index", 8), "--class 8: the model knows classes 0 to 7"),
        (("--class-index", "x"), "--class x: unknown class 'x'; use names"),
        (("--seeds", "5-3"), "--seeds 5-3"),
        (("--seeds", "1,1"), "names a number twice"),
        (("--solver", "huen"), "did you mean heun"),
        (("--solver", "dopri5", "--num-steps", 3), "--num-steps"),
        (("--atol", 1e-3), "--atol"),
        (("--num-steps", 0), "--num-steps 0"),
        (("--guidance-scale", "inf"), "--guidance-scale inf: must be finite"),
        (("--seeds", "0-99999999999"), "more than 1,000,000 numbers"),
        (("--seeds", 10**30), "--seeds"),
        (("--rtol", -1), "--rtol -1: must be greater than 0"),
    ],
)
def test_sample_names_a_wrong_flag(weights: Path, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    assert_one_line(lfm("sample", weights, "--out", tmp_path / "out", *arguments), said)
    assert not (tmp_path / "out").exists()


def test_only_overwrite_loses_samples_and_the_same_command_repeats_them(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("sample", weights, "--out", out, "--num-steps", 1, "--seeds", "0-2")
    assert lfm(*command).exit_code == 0
    before = folder_contents(out)
    (out / "000001.png").unlink()
    record = json.loads(before["samples.json"])
    (out / "samples.json").write_text(json.dumps({key: record[key] for key in ("settings", "files")}))  # as if killed
    assert lfm(*command).exit_code == 0 and folder_contents(out) == before
    other = (*command[:-1], "3-4")
    assert_one_line(lfm(*other), out, "seeds", "--overwrite")
    assert folder_contents(out) == before
    (out / "000007.png").write_text("mine")
    assert lfm(*other, "--overwrite").exit_code == 0
    assert sorted(folder_contents(out)) == [
        "000003.png",
        "000004.png",
        "000007.png",
        "grid.png",
        "recipe.json",
        "samples.json",
    ]


def test_sample_refuses_a_folder_of_other_things(weights: Path, small_set: SmallSet) -> None:
    before = folder_contents(small_set.raw)
    assert_one_line(lfm("sample", weights, "--out", small_set.raw, "--overwrite"), small_set.raw, "something else")
    assert folder_contents(small_set.raw) == before


def test_sample_refuses_another_autoencoder_naming_both(small_set: SmallSet, weights: Path, tmp_path: Path) -> None:
    other = make_autoencoder(tmp_path / "other", seed=1)
    result = lfm("sample", weights, "--out", tmp_path / "out", "--autoencoder", other)
    assert_one_line(result, other, small_set.autoencoder, "name that one")
    assert not (tmp_path / "out").exists()


def test_sample_refuses_a_folder_without_weights_and_a_truncated_file(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert_one_line(lfm("sample", tmp_path / "nothing", "--out", tmp_path / "out"), tmp_path / "nothing", "train first")
    file = weights / weights_file.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert_one_line(lfm("sample", weights, "--out", tmp_path / "out"), file)


def test_dry_runs_print_the_plan_and_write_nothing(small_set: SmallSet, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (
        ("shard", small_set.images, out, "--image-size", 16),
        ("encode", small_set.raw, out, "--autoencoder", small_set.autoencoder),
        ("sample", weights, "--out", out),
        ("scenes", out),
        ("autoencoder", small_set.raw, out),
        ("demo", "--out", out),
    ):
        result = lfm(*arguments, "--dry-run")
        assert result.exit_code == 0 and str(out) in result.stdout, (arguments, result.stderr)
        assert not out.exists()


def test_the_tar_members_of_a_raw_shard_name_their_source(small_set: SmallSet) -> None:
    with tarfile.open(small_set.raw / "000000.tar") as tar:
        metadata = json.loads(tar.extractfile("000000000000.json").read())  # type: ignore[union-attr]
    assert (small_set.images / metadata["source"]).is_file()


def test_the_package_resolves_from_the_repository() -> None:
    import lfm as library
    import pipelines

    assert Path(library.__file__).parents[1] == Path(pipelines.__file__).parents[1]
    assert (REPOSITORY / "launch" / "train.py").is_file()
